"""Against dense matrices in float64, computed here from what clients were sent and what they sent back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from fedpilot import aggregation_error, base_deltas, lora, memory, planning, rounds
from fedpilot.aggregation_error import AggregationError
from fedpilot.algorithms.fed_pilot import FedPilot
from fedpilot.algorithms.fedex_lora import FedExLoRA
from fedpilot.algorithms.fedit import FedIT
from fedpilot.algorithms.ffa_lora import FFALoRA
from fedpilot.algorithms.flexlora import FlexLoRA
from fedpilot.algorithms.flora import FLoRA
from fedpilot.algorithms.hetlora import HetLoRA
from fedpilot.algorithms.xgblora import XGBLoRA
from fedpilot.attachments import InstancePool
from fedpilot.memory import MemoryProfile
from fedpilot.types import (
    Algorithm,
    BaseDelta,
    ClientProfile,
    Deployment,
    Failure,
    ModelSpec,
    Plan,
    Task,
    Tensors,
    Upload,
)
from tests import toy

SPEC = toy.spec()
RANK = 3
CLIENTS = tuple(ClientProfile(k, n, 10**9) for k, n in enumerate((8, 13, 21)))


@pytest.fixture(scope="module")
def profile() -> MemoryProfile:
    return memory.trace(toy.program, SPEC, batch=8, patterns=("AB", "B"), checkpointing=False)


# --- the same by hand ---------------------------------------------------------------------------------------------


def weight(tensors: Tensors, base: BaseDelta, module: str) -> torch.Tensor:
    """Effective change of a module's weight, dense, in float64."""
    out_features, in_features = SPEC.modules[module]
    total = torch.zeros(out_features, in_features, dtype=torch.float64)
    a, b = lora.a_name(module), lora.b_name(module)
    if a in tensors:
        total += SPEC.scale * tensors[b].double() @ tensors[a].double()
    change = base_deltas.total(base).get(f"{module}.weight")
    return total if change is None else total + change.double()


def by_hand(
    before: Deployment, after: Deployment, sent: Mapping[int, Task], uploads: Sequence[Upload], weights: Sequence[float]
) -> float:
    far = ideal = 0.0
    for module in SPEC.modules:
        total, mass = torch.zeros(SPEC.modules[module], dtype=torch.float64), 0.0
        for upload, share in zip(uploads, weights, strict=True):
            if not any(name.rpartition(".")[0] == module for name in upload.tensors):
                continue
            task = sent[upload.client_id]
            old = weight(task.tensors, task.base_delta, module)
            new = weight({**task.tensors, **upload.tensors}, task.base_delta, module)
            total, mass = total + share * (new - old), mass + share
        mean = total / mass if mass else total
        made = weight(after.tensors, after.base_delta, module) - weight(before.tensors, before.base_delta, module)
        far, ideal = far + float((made - mean).square().sum()), ideal + float(mean.square().sum())
    return float(np.sqrt(far / ideal))


@dataclass
class Trial:
    """Two rounds of a method with real clients; the second is measured."""

    algorithm: Algorithm[Any]
    clients: Sequence[ClientProfile] = CLIENTS

    def __post_init__(self) -> None:
        state = self.algorithm.init(np.random.default_rng(0))
        for number in (1, 2):
            entries = self.algorithm.plan(state, self.clients, np.random.default_rng(number))
            self.plans = [plan for plan in entries if isinstance(plan, Plan)]
            self.sent = {plan.client_id: self.algorithm.distribute(state, plan) for plan in self.plans}
            self.uploads = [
                self.algorithm.local_update(task, toy.site(self.clients[k])) for k, task in self.sent.items()
            ]
            self.before, state = state, self.algorithm.aggregate(state, self.uploads)
        self.after = state

    def measured(self) -> float:
        error = AggregationError(self.algorithm, self.before, self.plans)
        for upload in self.uploads:
            assert error.take(upload) is upload
        return error.result(self.after)

    def expected(self, weights: Sequence[float] | None = None) -> float:
        deploy = self.algorithm.deploy
        shares = [float(upload.num_examples) for upload in self.uploads] if weights is None else weights
        return by_hand(deploy(self.before), deploy(self.after), self.sent, self.uploads, shares)


Make = Callable[[ModelSpec, MemoryProfile], Algorithm[Any]]

EXACT: Mapping[str, Make] = {
    "fedex-lora": lambda s, p: FedExLoRA(s, p, rank=RANK, weights="examples"),
    "fedex-lora-uniform": lambda s, p: FedExLoRA(s, p, rank=RANK, weights="uniform"),
    "flora": lambda s, p: FLoRA(s, p, r_min=1, r_max=RANK),
    "flexlora-at-full-rank": lambda s, p: FlexLoRA(s, p, r_min=6, r_max=6),
    "ffa-lora": lambda s, p: FFALoRA(s, p, rank=RANK, weights="examples"),
    "xgblora": lambda s, p: XGBLoRA(s, p, blocks_per_round=2),
    "xgblora-freeze-a": lambda s, p: XGBLoRA(s, p, blocks_per_round=2, server="freeze_a"),
}

INEXACT: Mapping[str, Make] = {
    "fedit": lambda s, p: FedIT(s, p, rank=RANK),
    "hetlora": lambda s, p: HetLoRA(s, p, r_min=1, r_max=RANK, gamma=0.6),
    "flexlora-cut": lambda s, p: FlexLoRA(s, p, r_min=1, r_max=2),
    "xgblora-proj1": lambda s, p: XGBLoRA(s, p, blocks_per_round=2, server="proj1"),
    "fed-pilot-stagg": lambda s, p: FedPilot(s, p, rank=RANK),
}


@pytest.mark.parametrize("name", EXACT)
def test_it_is_zero_for_methods_that_are_exact(name: str, profile: MemoryProfile) -> None:
    assert Trial(EXACT[name](SPEC, profile)).measured() <= 1e-5


def test_flexlora_with_unlike_ranks_has_the_mean_of_the_products_and_not_of_the_updates(
    profile: MemoryProfile,
) -> None:
    """A cut at r_max = 6 loses nothing; what counts as an update is what rank 1 cut off on the way down."""
    algorithm = FlexLoRA(SPEC, profile, r_min=1, r_max=6)
    least = memory.peak_bytes(profile, planning.train_all(SPEC, 0, 1))
    trial = Trial(algorithm, (replace(CLIENTS[0], memory_bytes=least), *CLIENTS[1:]))
    assert [set(plan.ranks.values()) for plan in trial.plans] == [{1}, {6}, {6}]
    total = sum(upload.num_examples for upload in trial.uploads)
    for module in SPEC.modules:
        products = [u.num_examples / total * weight(u.tensors, BaseDelta(), module) for u in trial.uploads]
        found = weight(algorithm.deploy(trial.after).tensors, BaseDelta(), module)
        torch.testing.assert_close(found, torch.stack(products).sum(dim=0), rtol=1e-4, atol=1e-5)
    assert trial.measured() > 1e-2
    assert trial.measured() == pytest.approx(trial.expected(), rel=1e-4)


@pytest.mark.parametrize("name", INEXACT)
def test_it_is_the_distance_of_dense_matrices_for_methods_that_are_not(name: str, profile: MemoryProfile) -> None:
    trial = Trial(INEXACT[name](SPEC, profile))
    assert trial.measured() > 1e-3
    assert trial.measured() == pytest.approx(trial.expected(), rel=1e-4)


def test_clients_weigh_alike_where_the_method_says_uniform(profile: MemoryProfile) -> None:
    trial = Trial(FedIT(SPEC, profile, rank=RANK, weights="uniform"))
    assert trial.measured() == pytest.approx(trial.expected([1.0, 1.0, 1.0]), rel=1e-4)
    assert trial.measured() != pytest.approx(trial.expected(), rel=1e-3)


def test_a_modules_mean_is_over_its_holders(profile: MemoryProfile) -> None:
    full = memory.peak_bytes(profile, Trial(FedIT(SPEC, profile, rank=RANK)).plans[0])
    clients = [replace(CLIENTS[0], memory_bytes=full), *(replace(c, memory_bytes=full - 100) for c in CLIENTS[1:])]
    trial = Trial(FedPilot(SPEC, profile, rank=RANK, aggregation="layerwise"), clients)
    assert len({len(plan.trainable) for plan in trial.plans}) > 1
    assert trial.measured() == pytest.approx(trial.expected(), rel=1e-4)


# --- uploads of every kind ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Canned:
    """A method that exists to be measured: states and uploads are given."""

    before: Deployment
    after: Deployment
    spec: ModelSpec = SPEC

    def distribute(self, state: str, plan: Plan) -> Task:
        return Task(plan, self.deploy(state).tensors, self.before.base_delta)

    def deploy(self, state: str) -> Deployment:
        return self.before if state == "before" else self.after


def canned(before: Deployment, after: Deployment, uploads: Sequence[Upload]) -> float:
    plans = [Plan(upload.client_id, {}, frozenset(upload.tensors)) for upload in uploads]
    error = AggregationError[Any](Canned(before, after), "before", plans)  # type: ignore[arg-type]
    for upload in uploads:
        error.take(upload)
    return error.result("after")


MODULE = "blocks.0.linear"
OUT, IN = SPEC.modules[MODULE]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pair(rank: int, seed: int) -> dict[str, torch.Tensor]:
    return {
        lora.a_name(MODULE): random(rank, IN, seed=seed),
        lora.b_name(MODULE): random(OUT, rank, seed=seed + 1),
    }


def dense_error(made: torch.Tensor, changes: Sequence[tuple[torch.Tensor, float]]) -> float:
    mean = sum(change * share for change, share in changes) / sum(share for _, share in changes)
    return float((made - mean).norm() / mean.norm())


def test_pairs_of_a_smaller_rank_and_single_factors_count_as_the_product_that_they_make() -> None:
    start, after = pair(3, 1), pair(3, 5)
    smaller, only_b = pair(2, 10), {lora.b_name(MODULE): random(OUT, 3, seed=20)}
    only_a = {lora.a_name(MODULE): random(3, IN, seed=30)}
    uploads = [Upload(0, 5, smaller), Upload(1, 9, only_b), Upload(2, 2, only_a)]

    def product(tensors: Tensors) -> torch.Tensor:
        return lora.delta({**start, **tensors}, MODULE, SPEC.scale)

    changes = [(product(upload.tensors) - product({}), float(upload.num_examples)) for upload in uploads]
    expected = dense_error(product(after) - product({}), changes)
    assert canned(Deployment(start), Deployment(after), uploads) == pytest.approx(expected, rel=1e-5)


def test_changes_of_whole_weights_and_their_factors_count_too() -> None:
    whole = {f"{MODULE}.weight": random(OUT, IN, seed=1)}
    factors = {f"{MODULE}.base_B": random(OUT, 2, seed=2), f"{MODULE}.base_A": random(2, IN, seed=3)}
    base = base_deltas.extended(BaseDelta(), {f"{MODULE}.weight": random(OUT, IN, seed=4)})
    step = base_deltas.pair(MODULE, random(OUT, 1, seed=5), random(1, IN, seed=6))
    uploads = [Upload(0, 4, whole), Upload(1, 6, factors)]
    changes = [
        (whole[f"{MODULE}.weight"], 4.0),
        (factors[f"{MODULE}.base_B"] @ factors[f"{MODULE}.base_A"], 6.0),
    ]
    expected = dense_error(base_deltas.dense(step)[f"{MODULE}.weight"], changes)
    before, after = Deployment({}, base), Deployment({}, base_deltas.extended(base, step))
    assert canned(before, after, uploads) == pytest.approx(expected, rel=1e-5)


def test_a_log_that_was_folded_in_between_tells_the_same() -> None:
    first, second = ({f"{MODULE}.weight": random(OUT, IN, seed=seed)} for seed in (1, 2))
    before = BaseDelta(1, {}, 0, (first,))
    after = BaseDelta(2, base_deltas.added({}, [first, second]), 2, ())
    uploads = [Upload(0, 4, second)]
    assert canned(Deployment({}, before), Deployment({}, after), uploads) <= 1e-6


def test_where_nobody_changed_anything_it_is_zero_and_where_only_the_server_did_it_has_no_bound() -> None:
    start = pair(2, 1)
    same = [Upload(0, 3, start)]
    assert canned(Deployment(start), Deployment(start), same) == 0.0
    assert canned(Deployment(start), Deployment(pair(2, 7)), same) == float("inf")


# --- large models -------------------------------------------------------------------------------------------------


def test_the_sketch_is_near_the_truth_and_exactly_zero_where_that_is(
    profile: MemoryProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregation_error, "DENSE_BYTES", 0)
    for name in ("fedit", "hetlora"):
        trial = Trial(INEXACT[name](SPEC, profile))
        assert trial.measured() == pytest.approx(trial.expected(), rel=0.25)
        assert trial.measured() != pytest.approx(trial.expected(), rel=1e-4)
    for make in EXACT.values():
        assert Trial(make(SPEC, profile)).measured() <= 1e-5


def test_it_never_makes_an_out_by_in_product_where_it_sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aggregation_error, "DENSE_BYTES", 0)
    monkeypatch.setattr(aggregation_error, "WIDTH", 2)
    aggregation_error._sketch.cache_clear()
    made: list[tuple[int, ...]] = []
    product = AggregationError._product

    def watched(self: AggregationError[Any], b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        result = product(self, b, a)
        made.append(tuple(result.shape))
        return result

    monkeypatch.setattr(AggregationError, "_product", watched)
    canned(Deployment(pair(2, 1)), Deployment(pair(2, 3)), [Upload(0, 3, pair(2, 5))])
    aggregation_error._sketch.cache_clear()
    assert made == [(OUT, 2), (OUT, 2)]


# --- in a run -----------------------------------------------------------------------------------------------------


class Engine:
    def __init__(self, algorithm: Algorithm[Any]) -> None:
        self._algorithm = algorithm

    def exchange(self, round: int, tasks: Iterator[Task]) -> Iterator[Upload | Failure]:
        for task in tasks:
            k = task.plan.client_id
            yield Failure(k, "away") if k == 2 else self._algorithm.local_update(task, toy.site(CLIENTS[k]))


def recorded(algorithm: Algorithm[Any], **options: Any) -> list[rounds.RoundRecord]:
    run = rounds.run_rounds(
        algorithm, Engine(algorithm), CLIENTS, lambda deployment: {"loss": 1.0}, num_rounds=2, seed=0, **options
    )
    return [record for _, record in run]


def test_each_round_records_it_with_its_time_where_asked_for(profile: MemoryProfile) -> None:
    for record in recorded(FedIT(SPEC, profile, rank=RANK), measure_aggregation=True):
        assert 0 < record.facts["aggregation_error"] < 10
        assert record.seconds["aggregation_error"] > 0
    for record in recorded(FedIT(SPEC, profile, rank=RANK)):
        assert "aggregation_error" not in record.facts


def test_a_pool_or_a_bank_has_none_rather_than_a_zero_that_means_nothing(profile: MemoryProfile) -> None:
    class Pooled(FedIT):
        def deploy(self, state: Any) -> Deployment:
            return replace(super().deploy(state), attachment=InstancePool(2, 1))

    for record in recorded(Pooled(SPEC, profile, rank=RANK), measure_aggregation=True):
        assert record.aggregated
        assert "aggregation_error" not in record.facts


def test_measuring_changes_no_bit_of_the_run(profile: MemoryProfile) -> None:
    for make in (EXACT["flora"], INEXACT["fedit"]):
        algorithm = make(SPEC, profile)
        finals = []
        for measure in (False, True):
            *_, (state, _) = rounds.run_rounds(
                algorithm,
                Engine(algorithm),
                CLIENTS,
                lambda deployment: {},
                num_rounds=2,
                seed=0,
                measure_aggregation=measure,
            )
            finals.append(algorithm.deploy(state).tensors)
        assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
