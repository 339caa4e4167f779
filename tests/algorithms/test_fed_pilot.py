"""Identities of Fed-piLot, by hand-computable numbers."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests import toy
from tests.hostile import CLIENTS, Engine

from fedpilot import lora, memory, planning, tensors
from fedpilot.algorithms.fed_pilot import FedPilot, FedPilotState
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.rounds import run_rounds
from fedpilot.types import ClientProfile, LeftOut, Plan, Tensors, Upload

SPEC = toy.spec()
PLENTY = 10**9


def pilot(profile: MemoryProfile, **options: Any) -> FedPilot:
    return FedPilot(SPEC, profile, rank=2, **options)


def constant(value: float, blocks: tuple[int, ...], rank: int = 2) -> Tensors:
    """An upload's tensors, every entry alike."""
    shapes = lora.shapes(SPEC, dict.fromkeys(lora.blocks_modules(SPEC, blocks), rank))
    return {name: torch.full(shape, value) for name, shape in shapes.items()}


def state_of(value: float) -> FedPilotState:
    return FedPilotState(round=1, adapter=constant(value, (0, 1, 2)))


def entry(state: FedPilotState, block: int) -> float:
    values = state.adapter[lora.b_name(f"blocks.{block}.linear")]
    assert (values == values[0, 0]).all()
    return float(values[0, 0])


# --- aggregation ------------------------------------------------------------------------------------------------------


def test_layerwise_is_the_mean_over_the_holders_of_a_block(profile: MemoryProfile) -> None:
    uploads = [Upload(0, 1, constant(2.0, (1, 2))), Upload(1, 3, constant(6.0, (2,)))]
    after = pilot(profile, aggregation="layerwise").aggregate(state_of(1.0), uploads)
    assert [entry(after, j) for j in range(3)] == [1.0, 2.0, 5.0]
    assert (after.adapter["head.weight"] == 5.0).all()


def test_stagg_moves_by_coverage_and_carries_velocity(profile: MemoryProfile) -> None:
    """ρ_1 = 1/4, w_1 = 1/2 + 1/8; θ moves from 1 towards 2 by w, then goes on with what it carried."""
    algorithm, w = pilot(profile, aggregation="stagg"), 0.625
    uploads = [Upload(0, 1, constant(2.0, (1, 2))), Upload(1, 3, constant(2.0, (2,)))]
    first = algorithm.aggregate(state_of(1.0), uploads)
    assert [entry(first, j) for j in range(3)] == pytest.approx([1.0, 1.0 + w, 2.0])
    second = algorithm.aggregate(first, uploads)
    theta, velocity = 1.0 + w, w
    assert entry(second, 1) == pytest.approx(theta + w * (2.0 - theta) + (1 - w) * velocity)
    assert entry(second, 2) == 2.0
    assert second.round == 3


def test_stagg_leaves_a_block_that_nobody_trained_at_rest_whatever_its_velocity(profile: MemoryProfile) -> None:
    algorithm = pilot(profile)
    moving = algorithm.aggregate(state_of(1.0), [Upload(0, 1, constant(2.0, (0, 1, 2)))])
    after = algorithm.aggregate(moving, [Upload(0, 1, constant(3.0, (2,)))])
    assert entry(after, 0) == entry(moving, 0)
    assert torch.equal(after.velocity["blocks.0.linear.lora_A"], moving.velocity["blocks.0.linear.lora_A"])


def test_comagg_lengthens_the_step_of_a_block_that_few_trained(profile: MemoryProfile) -> None:
    """c_1 = 1/4, c_2 = 1: s_1 = min(sqrt(4), s_max) = 2, s_2 = 1."""
    uploads = [Upload(0, 1, constant(2.0, (1, 2))), Upload(1, 3, constant(2.0, (2,)))]
    after = pilot(profile, aggregation="comagg").aggregate(state_of(1.0), uploads)
    assert [entry(after, j) for j in range(3)] == pytest.approx([1.0, 3.0, 2.0])
    capped = pilot(profile, aggregation="comagg", s_max=1.5).aggregate(state_of(1.0), uploads)
    assert entry(capped, 1) == pytest.approx(2.5)
    assert after.coverage == pytest.approx({0: 0.0, 1: 0.25, 2: 1.0})


@pytest.mark.parametrize("aggregation", ["stagg", "comagg", "layerwise"])
def test_full_coverage_is_the_plain_mean_bit_for_bit(aggregation: Any, profile: MemoryProfile) -> None:
    uploads = [Upload(k, 3 + 4 * k, toy.random_adapter(SPEC, 2, k)) for k in range(3)]
    state = FedPilotState(round=5, adapter=toy.random_adapter(SPEC, 2, 50))
    algorithm = pilot(profile, aggregation=aggregation)
    for _ in range(2):
        state = algorithm.aggregate(state, uploads)
    mean = tensors.weighted_mean((upload.tensors, float(upload.num_examples)) for upload in uploads)
    assert tensors.digest(state.adapter) == tensors.digest(mean)


def test_a_block_trained_at_a_lower_rank_counts_in_its_own_slots_only(profile: MemoryProfile) -> None:
    uploads = [Upload(0, 1, constant(2.0, (2,), rank=1)), Upload(1, 1, constant(4.0, (2,)))]
    after = pilot(profile, ranks=(1, 2), aggregation="layerwise").aggregate(state_of(1.0), uploads)
    assert after.adapter["blocks.2.linear.lora_A"][:, 0].tolist() == [3.0, 4.0]


# --- scores -----------------------------------------------------------------------------------------------------------


def upload_with_scores(client_id: int, num_examples: int, scores: dict[int, float]) -> Upload:
    return Upload(client_id, num_examples, constant(1.0, (2,)), {f"score/{j}": v for j, v in scores.items()})


def test_global_scores_compare_clients_over_the_blocks_that_all_could_afford(profile: MemoryProfile) -> None:
    """Client 1 measures block 2 alone, so block 2 is each client's unit: 4/2, 6/2, 2/2 and 5/5."""
    uploads = [upload_with_scores(0, 1, {0: 4.0, 1: 6.0, 2: 2.0}), upload_with_scores(1, 3, {2: 5.0})]
    after = pilot(profile).aggregate(state_of(1.0), uploads)
    assert after.global_scores == pytest.approx({0: 2.0, 1: 3.0, 2: 1.0})
    assert after.local_scores == {0: {0: 4.0, 1: 6.0, 2: 2.0}, 1: {2: 5.0}}


def test_global_scores_run_over_refreshes(profile: MemoryProfile) -> None:
    algorithm = pilot(profile, score_ema=0.25)
    first = algorithm.aggregate(state_of(1.0), [upload_with_scores(0, 1, {1: 1.0, 2: 1.0})])
    second = algorithm.aggregate(first, [upload_with_scores(0, 1, {1: 3.0, 2: 1.0})])
    assert second.global_scores == pytest.approx({1: 0.25 * 1.5 + 0.75 * 1.0, 2: 0.25 * 0.5 + 0.75 * 1.0})


def test_what_another_common_block_does_to_units_does_not_move_global_scores(profile: MemoryProfile) -> None:
    """The same truth, 4 : 2 : 1, first in units of its mean, then in units of block 2, which all measured."""
    algorithm = pilot(profile)
    first = algorithm.aggregate(state_of(1.0), [upload_with_scores(0, 1, {0: 4.0, 1: 2.0, 2: 1.0})])
    poor, rich = upload_with_scores(1, 3, {2: 1.0}), upload_with_scores(0, 1, {0: 4.0, 1: 2.0, 2: 1.0})
    second = algorithm.aggregate(first, [rich, poor])
    assert second.global_scores == pytest.approx(first.global_scores)
    third = algorithm.aggregate(second, [upload_with_scores(1, 3, {2: 9.0})])
    assert third.global_scores == pytest.approx(first.global_scores)


def test_the_mix_is_local_where_affordable_and_global_elsewhere(profile: MemoryProfile) -> None:
    """The scored blocks 1 and 2 are worth .75 globally, of which the client's own scores give .75 to block 1."""
    state = replace(state_of(1.0), global_scores={0: 1.0, 1: 2.0, 2: 1.0}, local_scores={7: {1: 3.0, 2: 1.0}})
    mixed = pilot(profile, lam=0.5).combined_scores(state, 7)
    assert mixed == pytest.approx({0: 0.25, 1: 0.5 * 0.75 * 0.75 + 0.5 * 0.5, 2: 0.5 * 0.75 * 0.25 + 0.5 * 0.25})
    assert sum(mixed.values()) == pytest.approx(1.0)
    assert pilot(profile, lam=0.0).combined_scores(state, 7) == pytest.approx({0: 0.25, 1: 0.5, 2: 0.25})
    assert pilot(profile, lam=1.0).combined_scores(state, 7) == pytest.approx({0: 0.25, 1: 0.5625, 2: 0.1875})
    assert pilot(profile).combined_scores(state, 8) == pytest.approx({0: 0.25, 1: 0.5, 2: 0.25})


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_no_block_gains_by_being_affordable(lam: float, profile: MemoryProfile) -> None:
    state = replace(state_of(1.0), global_scores={0: 2.0, 1: 2.0, 2: 2.0}, local_scores={7: {1: 3.0, 2: 3.0}})
    assert pilot(profile, lam=lam).combined_scores(state, 7) == pytest.approx(dict.fromkeys(range(3), 1 / 3))


def test_all_scores_zero_gives_equal_values_instead_of_nan(profile: MemoryProfile) -> None:
    after = pilot(profile).aggregate(state_of(1.0), [upload_with_scores(0, 2, {0: 0.0, 1: 0.0, 2: 0.0})])
    values = pilot(profile).combined_scores(after, 0)
    assert list(values.values()) == pytest.approx([1 / 3] * 3)


def test_scores_are_asked_for_after_the_warm_up_and_at_refreshes(profile: MemoryProfile) -> None:
    algorithm = pilot(profile, warmup_rounds=1, refresh_every=3)
    clients = [ClientProfile(k, 5, PLENTY) for k in range(2)]
    asked = []
    for done in range(5):
        state = replace(state_of(1.0), round=done, local_scores={0: {2: 1.0}})
        plans = algorithm.plan(state, clients, np.random.default_rng(0))
        asked.append([bool(plan.scored) for plan in plans if isinstance(plan, Plan)])
    assert asked == [[False, False], [True, True], [False, False], [False, False], [True, True]]


def test_a_round_that_measures_takes_longer_and_keeps_the_deadline(profile: MemoryProfile) -> None:
    algorithm = pilot(profile, ig_examples=5)
    client = ClientProfile(0, 9, PLENTY, num_steps=3, flops_per_second=1e3)

    def planned(done: int, deadline: float | None) -> Plan:
        state = replace(state_of(1.0), round=done)
        (plan,) = algorithm.plan(state, [replace(client, deadline_s=deadline)], np.random.default_rng(0))
        assert isinstance(plan, Plan)
        assert plan.seconds is not None
        return plan

    plain, measuring = planned(0, None), planned(1, None)
    assert measuring.trainable == plain.trainable
    assert measuring.seconds == memory.seconds(profile, measuring, 1e3, 3, 5) > plain.seconds
    assert planned(1, measuring.seconds).scored == measuring.scored
    fewer = planned(1, (plain.seconds + measuring.seconds) / 2)
    assert fewer.trainable == plain.trainable
    assert fewer.scored < measuring.scored
    assert not planned(1, plain.seconds).scored


def test_a_poor_client_scores_only_what_fits_it(profile: MemoryProfile) -> None:
    algorithm = pilot(profile)
    poor = ClientProfile(0, 5, 1)
    (left_out,) = algorithm.plan(state_of(1.0), [poor], np.random.default_rng(0))
    budget = left_out.needed_bytes  # type: ignore[union-attr]
    assert budget is not None
    (plan,) = algorithm.plan(state_of(1.0), [replace(poor, memory_bytes=budget)], np.random.default_rng(0))
    assert isinstance(plan, Plan)
    assert plan.peak_bytes is not None
    assert plan.peak_bytes <= budget
    assert {name.split(".")[1] for name in plan.scored} <= {"2"}


def test_a_score_is_the_norm_of_the_gradient_of_a_blocks_pair(profile: MemoryProfile) -> None:
    algorithm = pilot(profile, ig_examples=5)
    state = FedPilotState(round=1, adapter=toy.random_adapter(SPEC, 2))
    client = ClientProfile(0, 9, PLENTY)
    (plan,) = algorithm.plan(state, [client], np.random.default_rng(0))
    assert isinstance(plan, Plan)
    site = toy.site(client)
    upload = algorithm.local_update(algorithm.distribute(state, plan), site)
    other = toy.site(client)
    other.model.load(algorithm.distribute(state, plan))
    gradients = other.model.gradients(frozenset(lora.names(SPEC.modules)), num_examples=5)
    for j in range(3):
        pair = lora.names([f"blocks.{j}.linear"])
        expected = math.sqrt(sum(float(gradients[name].square().sum()) for name in pair))
        assert upload.metrics[f"score/{j}"] == pytest.approx(expected, rel=1e-5)


def test_the_first_gradient_of_a_is_zero_because_b_is(profile: MemoryProfile) -> None:
    algorithm = pilot(profile)
    site = toy.site(ClientProfile(0, 9, PLENTY))
    fresh = algorithm.init(np.random.default_rng(0))
    (plan,) = algorithm.plan(fresh, [site.profile], np.random.default_rng(0))
    assert isinstance(plan, Plan)
    site.model.load(algorithm.distribute(fresh, plan))
    gradients = site.model.gradients(frozenset(lora.names(SPEC.modules)), num_examples=9)
    assert not any(gradients[name].any() for name in gradients if name.endswith("lora_A"))
    assert all(gradients[name].any() for name in gradients if name.endswith("lora_B"))


def test_values_decide_which_block_is_trained(profile: MemoryProfile) -> None:
    """With room for the lowest block and little else, the block with the highest score is taken."""
    algorithm = pilot(profile, lam=0.0)
    state = replace(state_of(1.0), global_scores={0: 1.0, 1: 50.0, 2: 1.0}, local_scores={0: {2: 1.0}})
    (all_blocks,) = algorithm.plan(state, [ClientProfile(0, 5, PLENTY)], np.random.default_rng(0))
    assert isinstance(all_blocks, Plan)
    assert all_blocks.values[1] == max(all_blocks.values.values())
    assert {name.split(".")[1] for name in all_blocks.trainable if "lora" in name} == {"0", "1", "2"}
    only_last = ClientProfile(0, 5, 1)
    (out,) = algorithm.plan(state, [only_last], np.random.default_rng(0))
    tight = replace(only_last, memory_bytes=out.needed_bytes)  # type: ignore[union-attr]
    (plan,) = algorithm.plan(state, [tight], np.random.default_rng(0))
    assert isinstance(plan, Plan)
    assert len([name for name in plan.trainable if name.endswith("lora_A")]) == 1


def test_less_time_than_plain_training_takes_is_refused(profile: MemoryProfile) -> None:
    with pytest.raises(PlanError, match=r"max_time must be at least 1, got 0\.9"):
        pilot(profile, max_time=0.9)


def test_times_that_are_compared_without_a_known_speed_are_not_given_out(profile: MemoryProfile) -> None:
    for speed, known in ((None, False), (1e3, True)):
        client = ClientProfile(0, 5, PLENTY, num_steps=2, flops_per_second=speed)
        (plan,) = pilot(profile, max_time=1.0).plan(state_of(1.0), [client], np.random.default_rng(0))
        assert isinstance(plan, Plan)
        assert (plan.seconds is not None) == known


def test_straggler_gives_everybody_what_the_smallest_budget_allows(profile: MemoryProfile) -> None:
    smallest = memory.peak_bytes(profile, planning.train_blocks(SPEC, 0, 2, [1, 2]))
    clients = [ClientProfile(0, 5, smallest), ClientProfile(1, 5, PLENTY), ClientProfile(2, 5, 1)]
    algorithm = pilot(profile, solver="straggler", budget_bytes=smallest)
    few, many, out = algorithm.plan(state_of(1.0), clients, np.random.default_rng(0))
    assert isinstance(few, Plan)
    assert isinstance(many, Plan)
    assert few.trainable == many.trainable == planning.trainable(SPEC, lora.blocks_modules(SPEC, [1, 2]))
    assert isinstance(out, LeftOut)
    with pytest.raises(PlanError, match="budget_bytes"):
        replace(algorithm, budget_bytes=None).plan(state_of(1.0), clients, np.random.default_rng(0))


# --- the mean over rounds ---------------------------------------------------------------------------------------------


def adapters(algorithm: FedPilot, num_rounds: int) -> tuple[list[Tensors], FedPilotState, list[float]]:
    """θ after each round, the last state, and each round's aggregation error."""
    states: list[FedPilotState] = []
    errors: list[float] = []
    for state, record in run_rounds(
        *(algorithm, Engine(algorithm), CLIENTS, lambda _: {}),
        num_rounds=num_rounds,
        seed=3,
        cohort_size=2,
        measure_aggregation=True,
    ):
        if record is not None:
            states.append(state)
            errors.append(record.facts["aggregation_error"])
    return [state.adapter for state in states], states[-1], errors


@pytest.mark.parametrize("eta", [0.0, 3.0])
def test_the_deployed_mean_weighs_rounds_as_a_polynomial_and_rounds_go_on_without_it(
    eta: float, profile: MemoryProfile
) -> None:
    plain, _, errors = adapters(pilot(profile), 5)
    found, state, same_errors = adapters(pilot(profile, temporal_mean=eta), 5)
    assert [tensors.digest(adapter) for adapter in found] == [tensors.digest(adapter) for adapter in plain]
    assert same_errors == errors
    # Γ(t + η) / Γ(t): 1 in every round at η = 0, t (t + 1) (t + 2) at η = 3
    weights = [math.gamma(t + eta) / math.gamma(t) for t in range(1, 6)]
    deployed = pilot(profile, temporal_mean=eta).deploy(state).tensors
    for name, tensor in deployed.items():
        expected = sum(w * adapter[name].double() for w, adapter in zip(weights, plain, strict=True)) / sum(weights)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)
    assert tensors.norm(tensors.subtract(deployed, plain[-1])) > 1e-3 * tensors.norm(plain[-1])
    (newest,) = pilot(profile, temporal_mean=eta).deploy_more(state).values()
    assert newest.tensors is state.adapter


def test_without_a_mean_the_newest_round_is_deployed_and_nothing_beside_it(profile: MemoryProfile) -> None:
    algorithm, state = pilot(profile), state_of(1.0)
    assert algorithm.deploy(state).tensors is state.adapter
    assert not algorithm.deploy_more(state)


@pytest.mark.parametrize("eta", [-0.5, math.nan, math.inf])
def test_a_mean_that_weighs_the_past_more_is_refused(eta: float, profile: MemoryProfile) -> None:
    with pytest.raises(PlanError, match="temporal_mean must be 0 or more"):
        pilot(profile, temporal_mean=eta)
