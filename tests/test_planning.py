"""Plans that several algorithms share."""

from dataclasses import replace

import numpy as np
import pytest

from fedpilot import lora, memory, planning
from fedpilot.memory import MemoryProfile
from fedpilot.types import ClientProfile, LeftOut, Plan
from tests import toy

SPEC = toy.spec()
PLENTY = 10**9
NO_RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def recomputing() -> MemoryProfile:
    """The toy's profile with micro-batches of 8, 4 and 2 of a batch of 8."""
    return memory.trace(toy.program, SPEC, batch=8, micro_batches=(2, 4, 8), checkpointing=False)


def plan_for(allocate: planning.BlockAllocation, budget: int, values: dict[int, float] | None = None) -> Plan | LeftOut:
    (entry,) = allocate([ClientProfile(0, 5, budget)], [values or dict.fromkeys(range(3), 1.0)], NO_RNG)
    return entry


def test_training_blocks_means_their_pairs_and_the_head_and_no_other() -> None:
    plan = planning.train_blocks(SPEC, 4, 2, [0, 2])
    trained = lora.names(["blocks.0.linear", "blocks.2.linear"])
    assert plan.trainable == frozenset(trained) | frozenset(SPEC.head)
    assert plan.ranks == dict.fromkeys(SPEC.modules, 2)
    assert planning.trained_blocks(SPEC, plan) == (0, 2)


def test_a_smaller_micro_batch_lets_a_client_in_that_the_whole_batch_leaves_out(recomputing: MemoryProfile) -> None:
    allocate = planning.BlockAllocation(SPEC, recomputing, rank=2, ranks=(2,))
    whole = memory.peak_bytes(recomputing, planning.train_blocks(SPEC, 0, 2, [2]))
    small = plan_for(allocate, whole - 1)
    assert isinstance(small, Plan)
    assert small.micro_batch in (2, 4)
    assert small.peak_bytes is not None
    assert small.peak_bytes < whole


def test_the_largest_micro_batch_is_taken_where_all_train_the_same(recomputing: MemoryProfile) -> None:
    plan = plan_for(planning.BlockAllocation(SPEC, recomputing, rank=2, ranks=(2,)), PLENTY)
    assert isinstance(plan, Plan)
    assert plan.micro_batch is None
    assert planning.trained_blocks(SPEC, plan) == (0, 1, 2)


def test_the_budget_that_a_left_out_client_is_told_is_the_least_that_does(recomputing: MemoryProfile) -> None:
    allocate = planning.BlockAllocation(SPEC, recomputing, rank=2, ranks=(2,))
    out = plan_for(allocate, 10)
    assert isinstance(out, LeftOut)
    assert out.needed_bytes is not None
    assert isinstance(plan_for(allocate, out.needed_bytes), Plan)
    assert isinstance(plan_for(allocate, out.needed_bytes - 1), LeftOut)


def test_ranks_are_chosen_with_blocks_and_a_small_budget_gets_small_ones(profile: MemoryProfile) -> None:
    allocate = planning.BlockAllocation(SPEC, profile, rank=4, ranks=(1, 4))
    ample = plan_for(allocate, PLENTY)
    assert isinstance(ample, Plan)
    assert set(ample.ranks.values()) == {4}
    assert ample.peak_bytes is not None
    tight = plan_for(allocate, ample.peak_bytes - 1)
    assert isinstance(tight, Plan)
    assert set(tight.ranks.values()) == {1, 4}


def test_a_deadline_is_a_budget_too_and_its_reason_is_said(profile: MemoryProfile) -> None:
    allocate = planning.BlockAllocation(SPEC, profile, rank=2, ranks=(2,))
    client = ClientProfile(0, 5, PLENTY, num_steps=3, flops_per_second=1000.0)
    (free,) = allocate([client], [dict.fromkeys(range(3), 1.0)], NO_RNG)
    assert isinstance(free, Plan)
    assert free.seconds is not None
    late = replace(client, deadline_s=free.seconds * 0.9)
    (hurried,) = allocate([late], [dict.fromkeys(range(3), 1.0)], NO_RNG)
    assert isinstance(hurried, Plan)
    assert hurried.seconds is not None
    assert hurried.seconds <= free.seconds * 0.9
    (out,) = allocate([replace(client, deadline_s=1e-6)], [dict.fromkeys(range(3), 1.0)], NO_RNG)
    assert isinstance(out, LeftOut)
    assert out.needed_bytes is None
    assert "deadline" in out.reason


def test_clients_with_and_without_a_deadline_are_planned_together(profile: MemoryProfile) -> None:
    allocate = planning.BlockAllocation(SPEC, profile, rank=2, ranks=(2,))
    free = ClientProfile(0, 5, PLENTY, flops_per_second=1000.0)
    late = replace(free, client_id=1, deadline_s=1e-6)
    first, second = allocate([free, late], [dict.fromkeys(range(3), 1.0)] * 2, NO_RNG)
    assert isinstance(first, Plan)
    assert isinstance(second, LeftOut)


@pytest.mark.parametrize("solver", ["exact", "additive", "suffix", "random", "all"])
def test_no_solver_exceeds_a_budget_and_all_take_everything_if_they_can(
    solver: planning.Solver, profile: MemoryProfile
) -> None:
    allocate = planning.BlockAllocation(SPEC, profile, rank=2, ranks=(2,), solver=solver)
    ample = plan_for(allocate, PLENTY)
    assert isinstance(ample, Plan)
    assert planning.trained_blocks(SPEC, ample) == (0, 1, 2)
    assert ample.peak_bytes is not None
    for budget in range(0, ample.peak_bytes + 200, 97):
        entry = plan_for(allocate, budget, {0: 0.5, 1: 0.3, 2: 0.2})
        if isinstance(entry, Plan):
            assert memory.peak_bytes(profile, entry) == entry.peak_bytes
            assert entry.peak_bytes <= budget
