"""No client ever exceeds its budget: the peak of the real step, counted, against what was planned for it."""

import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedpilot import memory, planning, tensors
from fedpilot.algorithms.fed_pilot import FedPilot
from fedpilot.memory import MemoryProfile
from fedpilot.record import RunDirectory
from fedpilot.training import TrainingSettings
from fedpilot.types import ClientProfile, LeftOut, ModelSpec, Plan
from tests import tiny

TRAINING = TrainingSettings(learning_rate=1e-3, batch_size=4)


@pytest.fixture(scope="module")
def bert_profile() -> MemoryProfile:
    """The profile of the tiny BERT, with recomputation and two micro-batches."""
    sketch = tiny.build("bert", device="fake")
    return memory.trace(
        lambda plan, micro: sketch.program(plan, TRAINING, micro), sketch.spec, batch=4, micro_batches=(2, 4)
    )


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0.0, 1.1), checkpointing=st.booleans(), seed=st.integers(0, 10**6))
def test_the_counted_peak_of_the_real_step_keeps_the_budget(
    bert_profile: MemoryProfile, share: float, checkpointing: bool, seed: int
) -> None:
    model = tiny.shared("bert")
    rng = np.random.default_rng(seed)
    everything = memory.peak_bytes(bert_profile, planning.train_all(model.spec, 0, 8))
    allocate = planning.BlockAllocation(model.spec, bert_profile, 8, (2, 8), checkpointing=checkpointing)
    low = allocate([ClientProfile(0, 4, 1)], [_values(model.spec.num_blocks, rng)], rng)[0]
    assert isinstance(low, LeftOut)
    assert low.needed_bytes is not None
    budget = int(low.needed_bytes + share * (everything - low.needed_bytes))
    (plan,) = allocate([ClientProfile(0, 4, budget)], [_values(model.spec.num_blocks, rng)], rng)
    assert isinstance(plan, Plan)
    measured = memory.measure_peak(model.program(plan, TRAINING))
    assert measured == plan.peak_bytes
    assert measured <= budget


def _values(num_blocks: int, rng: np.random.Generator) -> dict[int, float]:
    return {block: float(value) for block, value in enumerate(rng.random(num_blocks))}


def _recomputing() -> tuple[ModelSpec, MemoryProfile, Plan, int]:
    """A model, its costs, the plan that trains all of it, and the bytes that it takes with all of it recomputed."""
    sketch = tiny.build("bert", device="fake")
    spec = sketch.spec
    profile = memory.trace(lambda plan, micro: sketch.program(plan, TRAINING, micro), spec, batch=4)
    everything = planning.train_all(spec, 0, 8)
    recomputed = replace(everything, checkpointed=frozenset(range(spec.num_blocks)))
    return spec, profile, everything, memory.peak_bytes(profile, recomputed)


def test_recomputing_in_the_time_of_plain_training_goes_as_deep_as_that_time_allows() -> None:
    """Where memory is enough for recomputing everything: all blocks without a bound, at 1 none beyond plain time."""
    spec, profile, everything, budget = _recomputing()
    rich = ClientProfile(0, 4, 10**12, 3, None, 1e6)
    poor = replace(rich, memory_bytes=budget)
    plain = planning.priced(profile, everything, rich)
    assert plain.seconds is not None
    assert plain.peak_bytes is not None
    assert plain.peak_bytes > poor.memory_bytes

    def planned(client: ClientProfile, **options: Any) -> tuple[int, float]:
        algorithm = FedPilot(spec, profile, checkpointing=True, **options)
        rng = np.random.default_rng(0)
        (plan,) = algorithm.plan(algorithm.init(rng), [client], rng)
        assert isinstance(plan, Plan)
        assert plan.seconds is not None
        assert planning.fits(plan, client)
        return len(planning.trained_blocks(spec, plan)), plan.seconds

    blocks, seconds = planned(poor)
    assert (blocks, seconds > plain.seconds) == (12, True)
    blocks, seconds = planned(poor, max_time=1.0)
    assert 0 < blocks < 12
    assert seconds <= plain.seconds * (1 + 1e-9)
    assert planned(rich, max_time=1.0) == (12, pytest.approx(plain.seconds))
    suffix, _ = planned(poor, solver="suffix", max_time=1.0)
    assert blocks > suffix


def test_recomputing_while_a_round_waits_anyway_makes_no_round_longer() -> None:
    """The clients of many examples set the pace; those of few recompute as much as their memory asks for."""
    spec, profile, _, budget = _recomputing()
    slow = ClientProfile(0, 40, budget, 10, None, 1e6)
    quick, rich = replace(slow, client_id=1, num_steps=3), replace(slow, client_id=2, num_steps=3, memory_bytes=10**12)
    cohort = [slow, quick, rich]

    def planned(**options: Any) -> list[Plan | LeftOut]:
        algorithm = FedPilot(spec, profile, **options)
        rng = np.random.default_rng(0)
        return list(algorithm.plan(algorithm.init(rng), cohort, rng))

    def blocks(entry: Plan | LeftOut) -> int:
        return len(planning.trained_blocks(spec, entry)) if isinstance(entry, Plan) else 0

    plain, bounded = planned(), planned(checkpointing=True, max_time="round")
    longest = max(plan.seconds or 0.0 for plan in plain if isinstance(plan, Plan))
    for before, after in zip(plain, bounded, strict=True):
        assert isinstance(after, Plan)
        assert after.seconds is not None
        assert after.seconds <= longest * (1 + 1e-9)
        assert blocks(after) >= blocks(before)
    assert [blocks(plan) for plan in (plain[1], bounded[1], bounded[2])] == [blocks(plain[0]), 12, 12]
    assert blocks(plain[1]) < 12


@pytest.mark.slow
def test_a_run_of_a_real_model_that_is_killed_and_resumed_ends_with_the_same_adapter(tmp_path: Path) -> None:
    recipe = Path(__file__).parent.parent / "recipes" / "tiny.toml"
    command = [sys.executable, "-m", "fedpilot.cli", "run"]
    shorter = ["--set", "run.rounds=4", "--set", "data.limit=120"]
    subprocess.run([*command, str(recipe), *shorter, "--out", str(tmp_path / "whole")], check=True, timeout=600)
    moments = random.Random(7)
    path = tmp_path / "killed"
    arguments = [str(recipe), *shorter, "--out", str(path)]
    kills = 0
    while kills < 5:
        process = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL)
        try:
            process.wait(moments.uniform(8.0, 20.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        if (path / "manifest.json").exists():
            arguments = ["--resume", str(path)]
        if process.returncode == 0:
            break
    assert kills > 0
    subprocess.run([*command, *arguments], check=True, timeout=600)
    for which in ("last", "best"):
        whole, resumed = (RunDirectory.open(tmp_path / name).load_adapter(which)[0] for name in ("whole", "killed"))
        assert tensors.digest(whole.tensors) == tensors.digest(resumed.tensors)
