"""Fixtures that many tests share."""

import pytest

from fedpilot import memory
from fedpilot.memory import MemoryProfile
from tests import toy


@pytest.fixture(scope="session")
def profile() -> MemoryProfile:
    """The memory profile of the toy classifier, traced."""
    return memory.trace(toy.program, toy.spec(), batch=8, patterns=("AB", "B"), checkpointing=False)
