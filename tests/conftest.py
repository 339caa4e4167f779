"""Fixtures that many tests share."""

from collections.abc import Iterator
from typing import Any

import pytest

from fedpilot import memory
from fedpilot.config import setup
from fedpilot.memory import MemoryProfile
from fedpilot.model import AdaptedModel
from fedpilot.training import TrainingSettings
from tests import toy


@pytest.fixture(scope="session")
def profile() -> MemoryProfile:
    """The memory profile of the toy classifier, traced."""
    return memory.trace(toy.program, toy.spec(), batch=8, patterns=("AB", "B"), checkpointing=False)


@pytest.fixture(scope="module")
def traced_once() -> Iterator[None]:
    """Traces each model and kind of step once for all tests of a file."""
    profile_of, known = setup.profile_of, {}

    def remembered(sketch: AdaptedModel, training: TrainingSettings, **options: Any) -> MemoryProfile:
        key = (sketch.settings, training, tuple(options.items()))
        if key not in known:
            known[key] = profile_of(sketch, training, **options)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "profile_of", remembered)
        yield
