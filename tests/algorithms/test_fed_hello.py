"""Identities of Fed-HeLLo: weights of its shapes and clusters, its draws, and Fisher scores by hand."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from tests import toy
from torch import nn

from fedpilot import lora, memory, planning, tensors
from fedpilot.algorithms.fed_hello import FedHello, FedHelloState
from fedpilot.algorithms.fedit import FedIT
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.types import ClientProfile, LeftOut, Plan, Tensors, Upload

SPEC = toy.spec()
PLENTY = 10**9
RANK = 2
ALLOCATIONS = ("fim", "geometric", "random-geometric")


def hello(profile: MemoryProfile, **options: Any) -> FedHello:
    return FedHello(SPEC, profile, rank=RANK, **options)


def peak(profile: MemoryProfile, *blocks: int) -> int:
    return memory.peak_bytes(profile, planning.train_blocks(SPEC, 0, RANK, blocks))


def plan_of(algorithm: FedHello, state: FedHelloState, budget: int, seed: int = 0) -> Plan:
    (plan,) = algorithm.plan(state, [ClientProfile(0, 9, budget)], np.random.default_rng(seed))
    assert isinstance(plan, Plan)
    return plan


def trained(plan: Plan) -> tuple[int, ...]:
    return planning.trained_blocks(SPEC, plan)


def state_of(round: int = 0, fim: Mapping[int, float] | None = None) -> FedHelloState:
    return FedHelloState(round, toy.random_adapter(SPEC, RANK), fim or {})


def constant(value: float, blocks: tuple[int, ...]) -> Tensors:
    shapes = lora.shapes(SPEC, dict.fromkeys(lora.blocks_modules(SPEC, blocks), RANK))
    return {name: torch.full(shape, value) for name, shape in shapes.items()}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_where_everything_fits_it_is_fedit_with_uniform_weights_bit_for_bit(
    allocation: Any, profile: MemoryProfile
) -> None:
    clients = [ClientProfile(k, 5 + 3 * k, PLENTY) for k in range(3)]
    digests, scores = [], {}
    methods = (
        hello(profile, allocation=allocation, warmup_rounds=1, refresh_every=1, fim_examples=3),
        FedIT(SPEC, profile, RANK, weights="uniform"),
    )
    for algorithm in methods:
        state: Any = algorithm.init(np.random.default_rng(0))
        for _ in range(3):
            plans = algorithm.plan(state, clients, np.random.default_rng(1))
            uploads = [
                algorithm.local_update(algorithm.distribute(state, plan), toy.site(client))
                for plan, client in zip(plans, clients, strict=True)
                if isinstance(plan, Plan)
            ]
            state = algorithm.aggregate(state, uploads)
        digests.append(tensors.digest(state.adapter))
        scores[type(algorithm)] = getattr(state, "fim", None)
    assert len(uploads) == 3
    assert digests[0] == digests[1]
    assert set(scores[FedHello]) == ({0, 1, 2} if allocation == "fim" else set())


# --- what is drawn ------------------------------------------------------------------------------------------------


def test_the_first_draw_follows_the_clusters_three_to_two_to_one(profile: MemoryProfile) -> None:
    """With room for any one block and no two of them, the drawn block is the first that was drawn."""
    budget = max(peak(profile, block) for block in range(3))
    assert budget < min(peak(profile, *pair) for pair in ((0, 1), (0, 2), (1, 2)))
    algorithm, state = hello(profile, warmup_rounds=9), state_of(fim={0: 50.0, 1: 0.1, 2: 3.0})
    clients = [ClientProfile(k, 5, budget) for k in range(2000)]
    plans = algorithm.plan(state, clients, np.random.default_rng(3))
    counts = Counter(trained(plan) for plan in plans if isinstance(plan, Plan))
    assert set(counts) == {(0,), (1,), (2,)}
    for block, share in ((0, 3 / 6), (2, 2 / 6), (1, 1 / 6)):
        sigma = (2000 * share * (1 - share)) ** 0.5
        assert abs(counts[block,] - 2000 * share) < 3 * sigma


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("fim", [{}, {0: 3.0, 1: 1.0, 2: 2.0}])
def test_no_plan_exceeds_its_budget_and_no_further_block_would_fit(
    allocation: Any, fim: Mapping[int, float], profile: MemoryProfile
) -> None:
    algorithm, state = hello(profile, allocation=allocation, warmup_rounds=0, fim_examples=4), state_of(0, fim)
    (out,) = algorithm.plan(state, [ClientProfile(0, 5, 1)], np.random.default_rng(0))
    assert isinstance(out, LeftOut)
    assert out.needed_bytes is not None
    for budget in range(out.needed_bytes, peak(profile, 0, 1, 2) + 64, 64):
        plan = plan_of(algorithm, state, budget, seed=budget)
        assert plan.peak_bytes is not None
        assert peak(profile, *trained(plan)) <= plan.peak_bytes <= budget
        for block in set(range(3)) - set(trained(plan)):
            assert peak(profile, *trained(plan), block) > budget
        assert plan.blocks is None
        assert plan.ranks == dict.fromkeys(SPEC.modules, RANK)


def test_the_fixed_shape_takes_its_widest_blocks_first_whatever_the_generator(profile: MemoryProfile) -> None:
    budget = max(peak(profile, block) for block in range(3))
    for shape, widest in (("triangle", 0), ("inverted-triangle", 2), ("uniform", 2)):
        algorithm = hello(profile, allocation="geometric", shape=shape)
        assert {trained(plan_of(algorithm, state_of(), budget, seed)) for seed in range(5)} == {(widest,)}
    random = hello(profile, allocation="random-geometric", shape="triangle")
    assert {trained(plan_of(random, state_of(), budget, seed)) for seed in range(30)} == {(0,), (1,), (2,)}


# --- scores -------------------------------------------------------------------------------------------------------


def test_a_score_is_the_mean_over_examples_of_the_squared_gradient_norm(profile: MemoryProfile) -> None:
    """By autograd, example by example; the norm of the mean gradient, squared, is something else."""
    algorithm = hello(profile, warmup_rounds=0, fim_examples=5)
    state, client = state_of(), ClientProfile(0, 9, PLENTY)
    (plan,) = algorithm.plan(state, [client], np.random.default_rng(0))
    assert isinstance(plan, Plan)
    upload = algorithm.local_update(algorithm.distribute(state, plan), toy.site(client))
    model = toy.site(client).model
    model.load(algorithm.distribute(state, plan))
    assert isinstance(model, toy.ToyModel)
    live = model.live()
    for block in range(3):
        pair = [live[name] for name in lora.names([f"blocks.{block}.linear"])]
        squares, mean = [], [torch.zeros_like(p) for p in pair]
        for i in range(5):
            loss = nn.functional.cross_entropy(model.net(model.x[i : i + 1]), model.y[i : i + 1])
            gradients = torch.autograd.grad(loss, pair)
            squares.append(sum(float(g.square().sum()) for g in gradients))
            mean = [m + g / 5 for m, g in zip(mean, gradients, strict=True)]
        assert upload.metrics[f"fim/{block}"] == pytest.approx(sum(squares) / 5, rel=1e-4)
        assert sum(float(m.square().sum()) for m in mean) < 0.9 * sum(squares) / 5


def test_scores_are_averaged_over_the_clients_that_measured_a_block(profile: MemoryProfile) -> None:
    uploads = [
        Upload(0, 1, constant(2.0, (1, 2)), {"loss": 9.0, "fim/1": 1.0, "fim/2": 4.0}),
        Upload(1, 3, constant(6.0, (2,)), {"fim/2": 8.0}),
    ]
    state = state_of(4, {0: 7.0, 2: 99.0})
    after = hello(profile).aggregate(state, uploads)
    assert (after.round, after.fim) == (5, {0: 7.0, 1: 1.0, 2: 6.0})
    assert hello(profile, weights="examples").aggregate(state, uploads).fim == {0: 7.0, 1: 1.0, 2: 7.0}


def test_a_block_is_the_plain_mean_over_its_holders_and_keeps_its_bits_without_any(profile: MemoryProfile) -> None:
    state = state_of()
    uploads = [Upload(0, 1, constant(2.0, (1, 2))), Upload(1, 3, constant(6.0, (2,)))]
    for weights, mean in (("uniform", 4.0), ("examples", 5.0)):
        after = hello(profile, weights=weights).aggregate(state, uploads).adapter
        for kind in ("lora_A", "lora_B"):
            assert torch.equal(after[f"blocks.0.linear.{kind}"], state.adapter[f"blocks.0.linear.{kind}"])
            assert (after[f"blocks.1.linear.{kind}"] == 2.0).all()
            assert (after[f"blocks.2.linear.{kind}"] == mean).all()
        assert (after["head.weight"] == mean).all()


def test_weights_are_the_shapes_until_the_first_scores_and_then_the_clusters(profile: MemoryProfile) -> None:
    algorithm = hello(profile, shape="triangle")
    assert algorithm.selection_weights(state_of()) == pytest.approx({0: 3 / 6, 1: 2 / 6, 2: 1 / 6})
    scored = state_of(1, {0: 1.0, 1: 9.0, 2: 4.0})
    assert algorithm.selection_weights(scored) == pytest.approx({0: 1 / 6, 1: 3 / 6, 2: 2 / 6})
    unmeasured = state_of(1, {1: 9.0, 2: 1.0})  # block 0 counts as 5
    assert algorithm.selection_weights(unmeasured) == pytest.approx({0: 2 / 6, 1: 3 / 6, 2: 1 / 6})
    assert algorithm.explain(scored) == {"fim/0": 1.0, "fim/1": 9.0, "fim/2": 4.0}


def test_scores_are_asked_for_after_the_warm_up_and_at_refreshes(profile: MemoryProfile) -> None:
    def asked(allocation: Any, fim: Mapping[int, float]) -> list[bool]:
        algorithm = hello(profile, allocation=allocation, warmup_rounds=2, refresh_every=3)
        return [bool(plan_of(algorithm, state_of(done, fim), PLENTY).scored) for done in range(7)]

    assert asked("fim", {2: 1.0}) == [False, False, True, False, False, True, False]
    assert asked("fim", {}) == [False, False, True, True, True, True, True]  # until somebody could measure
    assert not any(asked("geometric", {}) + asked("random-geometric", {}))


def test_a_poor_client_measures_only_the_deepest_blocks_that_fit_it(profile: MemoryProfile) -> None:
    algorithm = hello(profile, warmup_rounds=0)
    scored = {name.split(".")[1] for name in plan_of(algorithm, state_of(), peak(profile, 1, 2)).scored}
    assert scored < {"0", "1", "2"}
    assert {name.split(".")[1] for name in plan_of(algorithm, state_of(), PLENTY).scored} == {"0", "1", "2"}


@pytest.mark.parametrize("name", ["fim_examples", "warmup_rounds", "refresh_every"])
def test_numbers_that_make_no_sense_are_refused_before_the_run(name: str, profile: MemoryProfile) -> None:
    with pytest.raises(PlanError, match=f"{name} must be at least .*, got -1"):
        hello(profile, **{name: -1})
