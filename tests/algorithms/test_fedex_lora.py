"""Identities of FedEx-LoRA."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tests import toy

from fedpilot import base_deltas, lora, rounds, tensors
from fedpilot.algorithms.fedex_lora import FedExLoRA, FedExLoRAState
from fedpilot.algorithms.flora import FLoRA
from fedpilot.errors import PlanError
from fedpilot.exchange import download_bytes
from fedpilot.memory import MemoryProfile
from fedpilot.types import ClientProfile, Deployment, Failure, ModelSpec, Plan, Site, Task, Tensors, Upload

RANK = 2
SHAPES = {"0.tall": (90, 30), "0.wide": (40, 70), "1.wide": (40, 70)}
SPEC = ModelSpec(SHAPES, {"0.tall": 0, "0.wide": 0, "1.wide": 1}, 2, 1.5, {"head.weight": torch.ones(3, 5)})
TRAINED = frozenset(lora.names(SHAPES)) | {"head.weight"}


def fedex(**options: Any) -> FedExLoRA:
    return FedExLoRA(SPEC, None, **{"rank": RANK, **options})  # type: ignore[arg-type]


def task_of(algorithm: FedExLoRA, state: FedExLoRAState, client: int) -> Task:
    return algorithm.distribute(state, Plan(client, dict.fromkeys(SHAPES, algorithm.rank), TRAINED))


def trained(task: Task, seed: int) -> Upload:
    """An upload that differs from what went down in every entry; client k has 3 + 4 k examples."""
    generator = torch.Generator().manual_seed(1000 * seed + task.plan.client_id)
    moved = {name: t + torch.randn(t.shape, generator=generator) for name, t in task.tensors.items()}
    return Upload(task.plan.client_id, 3 + 4 * task.plan.client_id, moved)


def products(adapter: Tensors) -> dict[str, torch.Tensor]:
    """Module -> B A, in float64; zero where there is no pair."""
    held = lora.modules_of(adapter)
    return {
        module: adapter[lora.b_name(module)].double() @ adapter[lora.a_name(module)].double()
        if module in held
        else torch.zeros(shape, dtype=torch.float64)
        for module, shape in SHAPES.items()
    }


def effective(deployment: Deployment) -> dict[str, torch.Tensor]:
    """Module -> what it adds to the pristine weight: the base delta and s B A."""
    total, pairs = base_deltas.total(deployment.base_delta), products(deployment.tensors)
    return {m: total.get(base_deltas.weight_name(m), torch.zeros(1)) + SPEC.scale * pairs[m] for m in SHAPES}


def shares(algorithm: FedExLoRA, uploads: Sequence[Upload]) -> list[float]:
    weights = [upload.num_examples if algorithm.weights == "examples" else 1 for upload in uploads]
    return [weight / sum(weights) for weight in weights]


def relative_error(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    return max(float((found[m] - expected[m]).norm() / expected[m].norm()) for m in expected)


@pytest.mark.parametrize("weights", ["uniform", "examples"])
@pytest.mark.parametrize("assign", ["avg", "keep", "reinit"])
@pytest.mark.parametrize("rank", [RANK, 12])
def test_the_deployed_weights_are_the_exact_mean_in_every_round(assign: str, weights: str, rank: int) -> None:
    """Rounds of four of six clients; at rank 12 the stacked rank exceeds the matrices."""
    algorithm = fedex(assign=assign, weights=weights, rank=rank)
    state, rng = algorithm.init(np.random.default_rng(0)), np.random.default_rng(1)
    exact = {module: torch.zeros(shape, dtype=torch.float64) for module, shape in SHAPES.items()}
    for round in range(5):
        tasks = [task_of(algorithm, state, int(client)) for client in rng.choice(6, 4, replace=False)]
        uploads = [trained(task, round) for task in tasks]
        for share, task, upload in zip(shares(algorithm, uploads), tasks, uploads, strict=True):
            started, ended = products(task.tensors), products(upload.tensors)
            exact = {m: exact[m] + SPEC.scale * share * (ended[m] - started[m]) for m in SHAPES}
        state = algorithm.aggregate(state, iter(uploads))
        assert relative_error(effective(algorithm.deploy(state)), exact) < 1e-5


def test_plain_averages_miss_the_mean_by_exactly_the_residual() -> None:
    algorithm = fedex(weights="examples")
    state = algorithm.init(np.random.default_rng(0))
    uploads = [trained(task_of(algorithm, state, client), 0) for client in range(4)]
    after = algorithm.aggregate(state, uploads)
    mean = tensors.weighted_mean((upload.tensors, float(upload.num_examples)) for upload in uploads)
    residual = base_deltas.total(after.base)
    for name, tensor in mean.items():
        torch.testing.assert_close(after.adapter[name], tensor)
    for module in SHAPES:
        b, a = lora.b_name(module), lora.a_name(module)
        expected = sum(
            share * (u.tensors[b] - mean[b]).double() @ (u.tensors[a] - mean[a]).double()
            for share, u in zip(shares(algorithm, uploads), uploads, strict=True)
        )
        found = residual[base_deltas.weight_name(module)].double()
        torch.testing.assert_close(found, SPEC.scale * expected, rtol=0, atol=1e-4)
        assert found.norm() > 1


@pytest.mark.parametrize("clients", [1, 2, 4])
def test_the_residual_has_one_rank_less_than_the_clients(clients: int) -> None:
    algorithm = fedex(weights="examples")
    state = algorithm.init(np.random.default_rng(0))
    after = algorithm.aggregate(state, (trained(task_of(algorithm, state, client), 0) for client in range(clients)))
    (step,) = after.base.steps
    ranks = {module: step[base_deltas.a_name(module)].shape[0] for module in base_deltas.modules_of(step)}
    assert ranks == dict.fromkeys(SHAPES, (clients - 1) * RANK)


@pytest.mark.parametrize("rank", [RANK, 12])
def test_identical_clients_leave_no_residual(rank: int) -> None:
    algorithm = fedex(rank=rank, weights="examples")
    state = algorithm.init(np.random.default_rng(0))
    one = trained(task_of(algorithm, state, 0), 0)
    after = algorithm.aggregate(state, (Upload(k, 3 + 4 * k, one.tensors) for k in range(5)))
    assert sum(map(tensors.num_bytes, after.base.steps)) == 0
    assert after.base.version == 1


@pytest.mark.parametrize("residual_rank", [1, 3])
def test_truncation_costs_exactly_the_tail_singular_values(residual_rank: int) -> None:
    full, cut = fedex(), fedex(residual_rank=residual_rank)
    state = full.init(np.random.default_rng(0))
    uploads = [trained(task_of(full, state, client), 0) for client in range(4)]
    exact, near = (base_deltas.total(a.aggregate(state, uploads).base) for a in (full, cut))
    for name in exact:
        values = torch.linalg.svdvals(exact[name].double())
        tail = float(values[residual_rank:].square().sum().sqrt())
        assert float((exact[name] - near[name]).double().norm()) == pytest.approx(tail, rel=1e-4)
        assert tail > 1
        assert torch.linalg.matrix_rank(near[name], rtol=1e-4) == residual_rank


@pytest.mark.parametrize("options", [{}, {"residual_rank": 1}, {"assign": "reinit"}, {"assign": "keep"}], ids=str)
def test_server_and_clients_hold_the_same_base_after_twenty_rounds(options: dict[str, Any]) -> None:
    """Each client replays its own downloads; up to four of seven clients train in a round, and some of them fail."""
    algorithm, rng = fedex(**options), np.random.default_rng(2)
    state = algorithm.init(np.random.default_rng(0))
    totals: dict[int, Tensors] = {}
    for round in range(20):
        uploads = []
        for client in rng.choice(7, int(rng.integers(1, 5)), replace=False):
            task = task_of(algorithm, state, int(client))
            if rng.random() < 0.2:  # it failed: what it was sent is lost
                continue
            totals[int(client)] = base_deltas.replayed(totals.get(int(client), {}), task.base_delta)
            assert tensors.digest(totals[int(client)]) == tensors.digest(base_deltas.total(state.base))
            uploads.append(trained(task, round))
        state = algorithm.aggregate(state, uploads) if uploads else state
    assert state.base.version > 10
    assert (state.base.snapshot_version > 0) is (algorithm.residual_rank is None)  # twenty steps of rank 1 stay a log


def test_a_late_client_pays_for_every_residual_that_it_missed() -> None:
    algorithm = fedex()
    state, r = algorithm.init(np.random.default_rng(0)), RANK
    sides = sum(out_features + in_features for out_features, in_features in SHAPES.values())
    adapter = 4 * (r * sides + 15)
    assert download_bytes(task_of(algorithm, state, 9)) == adapter
    for round, clients in enumerate(([9, 0, 1], [0, 1], [2, 3, 4])):
        uploads = [trained(task_of(algorithm, state, client), round) for client in clients]
        state = algorithm.aggregate(state, uploads)
    ranks = [2 * r, r, 2 * r]  # one client less than took part, each round
    # Client 9 was sent version 0 in round 1, client 0 version 1 in round 2, client 4 version 2 in round 3, 5 nothing.
    expected = {9: sum(ranks), 0: ranks[1] + ranks[2], 4: ranks[2], 5: sum(ranks)}
    found = {client: download_bytes(task_of(algorithm, state, client)) - adapter for client in expected}
    assert found == {client: 4 * rank * sides for client, rank in expected.items()}


class Engine:
    """Toy sites; keeps the tasks."""

    def __init__(self, algorithm: Any, clients: Sequence[ClientProfile]) -> None:
        self.algorithm, self.clients, self.tasks = algorithm, clients, list[Task]()

    def exchange(self, round: int, tasks: Any) -> Any:
        for task in tasks:
            self.tasks.append(task)
            result: Upload | Failure = self.algorithm.local_update(task, toy.site(self.clients[task.plan.client_id]))
            yield result


def test_reinit_is_flora_with_equal_ranks(profile: MemoryProfile) -> None:
    clients = [ClientProfile(k, 5 + 3 * k, 10**9) for k in range(6)]
    found = []
    for algorithm in (
        FedExLoRA(toy.spec(), profile, rank=3, assign="reinit", weights="examples"),
        FLoRA(toy.spec(), profile, r_min=3, r_max=3),
    ):
        engine: Any = Engine(algorithm, clients)
        *_, (state, _) = rounds.run_rounds(
            algorithm, engine, clients, lambda d: {"loss": 0.0}, num_rounds=4, seed=1, cohort_size=4
        )
        deployed = algorithm.deploy(state)  # type: ignore[arg-type]
        found.append({**deployed.tensors, **base_deltas.total(deployed.base_delta)})
        assert [tensors.digest(task.tensors) for task in engine.tasks[:4]] == [
            tensors.digest(engine.tasks[0].tensors)
        ] * 4
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-5, atol=1e-5)
        assert tensor.norm() > 0.01


@dataclass
class Spy:
    """A model that trains nothing and keeps the task that it was given."""

    task: Task | None = None

    def load(self, task: Task) -> None:
        self.task = task

    def fit(self, trainable: frozenset[str], **options: Any) -> Mapping[str, float]:
        return {"loss": 0.0}

    def read(self) -> Tensors:
        assert self.task is not None
        return self.task.tensors


def test_with_keep_each_client_goes_on_with_its_own_pair_from_the_global_model() -> None:
    algorithm = fedex(assign="keep")
    state = algorithm.init(np.random.default_rng(0))
    own: dict[int, Tensors] = {}
    for round in range(3):
        uploads = [trained(task_of(algorithm, state, client), round) for client in range(round, round + 3)]
        own |= {upload.client_id: upload.tensors for upload in uploads}
        state = algorithm.aggregate(state, uploads)
    target = effective(algorithm.deploy(state))
    for client in (0, 3, 9):  # one that left early, one of the last round, one that never took part
        spy = Spy()
        algorithm.local_update(task_of(algorithm, state, client), Site(ClientProfile(client, 5, 0), spy))  # type: ignore[arg-type]
        assert spy.task is not None
        if client in own:
            names = lora.names(SHAPES)
            assert all(torch.equal(spy.task.tensors[name], own[client][name]) for name in names)
        assert relative_error(effective(Deployment(spy.task.tensors, spy.task.base_delta)), target) < 1e-5


def test_unlike_ranks_are_refused_with_the_methods_that_can() -> None:
    with pytest.raises(PlanError, match=r"got 2, 8: .*choose flora, flexlora or hetlora"):
        fedex(ranks=(2, 8), rank=8)
    with pytest.raises(PlanError, match=r"got 2, 8: .*choose flora, flexlora or hetlora"):
        fedex(ranks=(2,), rank=8).init(np.random.default_rng(0))
    assert fedex(ranks=(8, 8), rank=8).init(np.random.default_rng(0)).adapter
    with pytest.raises(PlanError, match="residual_rank must be at least 1, got 0"):
        fedex(residual_rank=0)
