"""Identities of federated GaLore."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny, toy
from torch import nn

from fedpilot import base_deltas, exchange, memory, rounds, tensors
from fedpilot.algorithms.galore import GaLore, GaLoreState
from fedpilot.client import ClientModel
from fedpilot.engines.in_process import InProcess
from fedpilot.errors import PlanError, TrainingError
from fedpilot.evaluation import evaluate
from fedpilot.galore import GaLoreAdamW
from fedpilot.memory import MemoryProfile
from fedpilot.training import TrainingSettings
from fedpilot.types import BaseDelta, ClientProfile, LeftOut, Plan, Projection, Site, StepKind, Task, Tensors, Upload

SPEC = toy.spec()
RICH = 10**9
WEIGHTS = tuple(base_deltas.weight_name(module) for module in SPEC.modules)


@cache
def profile() -> MemoryProfile:
    """Its rank is 2; tests that price nothing use it for other ranks too."""
    kind = StepKind(("W",), projection=Projection(2, 200, 0.25))
    return memory.trace(partial(toy.program, kind=kind), SPEC, batch=8, patterns=("W",), checkpointing=False)


def method(**options: Any) -> GaLore:
    return GaLore(SPEC, profile(), **{"rank": 2, **options})


def local(algorithm: GaLore, state: GaLoreState, client: ClientProfile) -> tuple[Task, Upload, Site]:
    """One client's round."""
    (plan,) = algorithm.plan(state, [client], np.random.default_rng(0))
    assert isinstance(plan, Plan)
    task, site = algorithm.distribute(state, plan), toy.site(client)
    return task, algorithm.local_update(task, site), site


def started(algorithm: GaLore) -> GaLoreState:
    return algorithm.init(np.random.default_rng(0))


def random_changes(seed: int, names: Sequence[str] = WEIGHTS) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {base_deltas.weight_name(module): shape for module, shape in SPEC.modules.items()}
    changes = {name: torch.randn(shapes[name], generator=generator) for name in names}
    return changes | {name: torch.randn(t.shape, generator=generator) for name, t in SPEC.head.items()}


def random_factors(seed: int, rank: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, torch.Tensor] = {}
    for module, (out_features, in_features) in SPEC.modules.items():
        factors[base_deltas.a_name(module)] = torch.randn(rank, in_features, generator=generator)
        factors[base_deltas.b_name(module)] = torch.randn(out_features, rank, generator=generator)
    return factors | {name: torch.randn(t.shape, generator=generator) for name, t in SPEC.head.items()}


def dense_of(changes: Tensors) -> Tensors:
    return base_deltas.dense({name: tensor for name, tensor in changes.items() if name not in SPEC.head})


# --- the client ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [2, 200])
def test_one_client_is_centralised_galore_bit_for_bit(gap: int) -> None:
    """A round of one client against the optimiser over the same data; what is averaged is what it trained."""
    algorithm, client = method(gap=gap), ClientProfile(1, 9, RICH)
    state = started(algorithm)
    _, upload, site = local(algorithm, state, client)
    net, data = toy.Net(), toy.site(client).model
    assert isinstance(data, toy.ToyModel)
    whole = [net.get_parameter(name).requires_grad_(True) for name in WEIGHTS]
    for name in SPEC.head:
        net.get_parameter(name).requires_grad_(True)
    optimiser = GaLoreAdamW(whole, list(net.head.parameters()), Projection(2, gap, 0.25), learning_rate=data.lr / 10)
    for _ in range(data.steps):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(data.x), data.y).backward()
        optimiser.step()
    assert isinstance(site.model, toy.ToyModel)
    for name in (*WEIGHTS, *SPEC.head):
        assert torch.equal(site.model.net.get_parameter(name), net.get_parameter(name))
    after = algorithm.aggregate(state, [upload])
    for name, change in dense_of(upload.tensors).items():
        torch.testing.assert_close(base_deltas.total(after.base)[name], change, rtol=1e-6, atol=0)
        torch.testing.assert_close(net.get_parameter(name).detach(), toy.Net().get_parameter(name) + change)
    assert all(torch.equal(after.head[name], net.get_parameter(name)) for name in SPEC.head)


def test_an_upload_is_factored_where_one_projector_made_it_and_factors_are_smaller() -> None:
    client = ClientProfile(1, 9, RICH)
    for options, factored in (
        ({"rank": 2, "gap": 3}, {0, 1, 2}),  # 3 steps, one projector; 2 (5 + 6) < 30, 2 (7 + 6) < 42, 2 (4 + 6) < 24
        ({"rank": 3, "gap": 3}, {1}),  # 3 (7 + 6) < 42 alone
        ({"rank": 2, "gap": 2}, set()),  # two projectors
    ):
        algorithm = method(**options)
        task, upload, site = local(algorithm, started(algorithm), client)
        pairs = {SPEC.block_of[name.removesuffix(".base_A")] for name in upload.tensors if name.endswith("base_A")}
        assert pairs == factored
        whole = exchange.whole_weights(SPEC, algorithm.step_kind)
        sent = {name: (tuple(SPEC.head[name].shape), torch.float32) for name in SPEC.head}
        exchange.check_upload(upload, sent | {n: (whole.shapes[n], torch.float32) for n in WEIGHTS}, whole)
        read = site.model.read()
        for name, change in dense_of(upload.tensors).items():
            weight = float(toy.Net().get_parameter(name).norm())  # whose rounding is in the dense change
            assert float((change - read[name]).norm()) <= 1e-6 * weight
            assert float(change.norm()) > 1e-2 * weight
            assert int(torch.linalg.matrix_rank(change.double(), rtol=1e-5)) <= options["rank"] * (1 + (not factored))
        assert task.plan.trainable == {*WEIGHTS, *SPEC.head}


# --- the server ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["uniform", "examples"])
def test_the_step_is_the_mean_of_the_dense_changes_however_they_came(weights: str) -> None:
    algorithm = method(weights=weights)
    sent = [random_factors(0, 2), random_changes(1), random_factors(2, 1), random_factors(3, 2)]
    uploads = [Upload(k, 2 + 5 * k, changes) for k, changes in enumerate(sent)]
    state = replace(started(algorithm), base=base_deltas.extended(BaseDelta(), dense_of(random_changes(9))))
    after = algorithm.aggregate(state, iter(uploads))
    p = np.array([1.0] * 4 if weights == "uniform" else [2.0, 7.0, 12.0, 17.0])
    p /= p.sum()
    step = tensors.subtract(base_deltas.total(after.base), base_deltas.total(state.base))
    for name in WEIGHTS:
        mean = sum(p_k * dense_of(changes)[name] for p_k, changes in zip(p, sent, strict=True))
        torch.testing.assert_close(step[name], mean, rtol=1e-5, atol=1e-5)
    for name in SPEC.head:
        mean = sum(p_k * changes[name] for p_k, changes in zip(p, sent, strict=True))
        torch.testing.assert_close(after.head[name], mean)
    assert after.base.version == state.base.version + 1
    assert dict(after.held) == dict.fromkeys(range(4), state.base.version)


def test_a_weight_is_averaged_over_the_clients_that_trained_it() -> None:
    algorithm = method()
    deep, all_of_them = random_changes(0, WEIGHTS[1:]), random_changes(1)
    after = algorithm.aggregate(started(algorithm), [Upload(0, 2, deep), Upload(1, 9, all_of_them)])
    total = base_deltas.total(after.base)
    torch.testing.assert_close(total[WEIGHTS[0]], all_of_them[WEIGHTS[0]])
    torch.testing.assert_close(total[WEIGHTS[2]], (deep[WEIGHTS[2]] + all_of_them[WEIGHTS[2]]) / 2)
    only_deep = algorithm.aggregate(started(algorithm), [Upload(0, 2, deep)])
    assert WEIGHTS[0] not in base_deltas.total(only_deep.base)


def test_factors_are_stacked_until_the_dense_change_is_smaller() -> None:
    algorithm = method()
    uploads = [Upload(k, 2 + k, random_factors(k, 1)) for k in range(3)]
    (step,) = algorithm.aggregate(started(algorithm), uploads).base.steps
    for module, (out_features, in_features) in SPEC.modules.items():
        factored = base_deltas.a_name(module) in step
        assert factored == (3 * (out_features + in_features) < out_features * in_features)
        if factored:
            assert step[base_deltas.a_name(module)].shape == (3, in_features)
    assert {name.rpartition(".")[2] for name in step} == {"weight", "base_A", "base_B"}


def test_every_round_starts_from_the_servers_base_bit_for_bit_whoever_took_part() -> None:
    """Two of five clients a round, so that most miss some; one fails each time, after it has trained."""
    algorithm = method(gap=2, participation="suffix")
    clients = [ClientProfile(k, 5 + 3 * k, RICH) for k in range(5)]
    model = toy.ToyModel(6, 1)
    starts: list[tuple[int, int, str]] = []

    class Shared(toy.ToyModel):
        """Everybody's data on one net, as the real base is shared."""

        def __init__(self, client_id: int) -> None:
            super().__init__(5 + 3 * client_id, 100 + client_id)
            self.net, self.blocks, self.starts, self.client_id = model.net, model.blocks, model.starts, client_id

        def load(self, task: Task) -> None:
            self.starts = model.starts
            super().load(task)
            model.starts = self.starts
            weights = {name: self.net.get_parameter(name) for name in WEIGHTS}
            starts.append((task.plan.client_id, task.base_delta.version, tensors.digest(weights)))

        def fit(self, trainable: frozenset[str], **options: Any) -> Any:
            metrics = super().fit(trainable, **options)
            if self.client_id == 3:
                raise TrainingError("made to fail")
            return metrics

    engine = InProcess(algorithm, lambda client_id, round: Site(clients[client_id], Shared(client_id)))
    expected = [tensors.digest({name: toy.Net().get_parameter(name) for name in WEIGHTS})]
    for state, _ in rounds.run_rounds(algorithm, engine, clients, lambda d: {}, num_rounds=8, seed=5, cohort_size=2):
        total = base_deltas.total(state.base)
        weights = {name: toy.Net().get_parameter(name).detach() for name in WEIGHTS}
        expected.append(tensors.digest({name: w + total[name] for name, w in weights.items()}))
    assert {client for client, _, _ in starts} == set(range(5))
    assert all(digest == expected[version] for _, version, digest in starts)
    assert len(set(expected)) == 9


def test_a_real_model_is_trained_evaluated_and_put_back() -> None:
    adapted = tiny.build("gpt2")
    algorithm = GaLore(adapted.spec, profile(), rank=3, participation="exclusive")
    weights = {name: p for name, p in adapted.base.named_parameters() if name not in adapted.spec.head}
    before = tensors.digest(weights)
    state = started(algorithm)
    task = Task(algorithm._plan_from(1), state.head)
    settings = TrainingSettings(learning_rate=0.02, batch_size=4, local_epochs=2)
    client = ClientModel(adapted, tiny.examples("gpt2"), settings, learning_rate=0.02, seed=1)
    site = Site(ClientProfile(0, 10, RICH), client)
    after = algorithm.aggregate(state, [algorithm.local_update(task, site)])
    plain = evaluate(adapted, algorithm.deploy(state), tiny.examples("gpt2"), batch_size=4)
    trained = evaluate(adapted, algorithm.deploy(after), tiny.examples("gpt2"), batch_size=4)
    assert trained["loss"] < plain["loss"]
    adapted.deploy(algorithm.deploy(state))
    assert tensors.digest(weights) == before


# --- who trains what ----------------------------------------------------------------------------------------------


def peaks() -> list[int]:
    """Of the suffixes from each block on."""
    return [memory.peak_bytes(profile(), method()._plan_from(block)) for block in range(3)]


def test_suffix_trains_the_deepest_weights_that_fit() -> None:
    algorithm = method(participation="suffix")
    clients = [ClientProfile(k, 5, budget) for k, budget in enumerate((*peaks(), peaks()[2] - 1, peaks()[0] - 1))]
    *plans, out, second = algorithm.plan(started(algorithm), clients, np.random.default_rng(0))
    for first, plan in [*enumerate(plans), (1, second)]:
        assert isinstance(plan, Plan)
        assert plan.trainable == {*WEIGHTS[first:], *SPEC.head}
        assert (plan.ranks, plan.peak_bytes) == ({}, peaks()[first])
    assert isinstance(out, LeftOut)
    assert out.needed_bytes == peaks()[2]


def test_a_deadline_shortens_the_suffix_too() -> None:
    algorithm = method(participation="suffix")
    flops = [memory.seconds(profile(), algorithm._plan_from(block), 1.0, 4) for block in range(3)]
    client = ClientProfile(0, 5, RICH, num_steps=4, flops_per_second=2.0, deadline_s=flops[1] / 2)
    (plan,) = algorithm.plan(started(algorithm), [client], np.random.default_rng(0))
    assert isinstance(plan, Plan)
    assert plan.trainable == {*WEIGHTS[1:], *SPEC.head}
    assert plan.seconds == flops[1] / 2


@pytest.mark.parametrize("participation", ["exclusive", "all"])
def test_without_suffix_a_client_trains_everything_or_nothing(participation: str) -> None:
    algorithm = method(participation=participation)
    clients = [ClientProfile(0, 5, peaks()[0]), ClientProfile(1, 5, peaks()[0] - 1)]

    def plan() -> Sequence[Plan | LeftOut]:
        return algorithm.plan(started(algorithm), clients, np.random.default_rng(0))

    if participation == "all":
        with pytest.raises(PlanError, match=r"client 1 must train everything .* choose participation 'suffix'"):
            plan()
        clients[1] = replace(clients[1], margin=1.25)  # it ran out of memory before: no error of the recipe's
    inside, out = plan()
    assert isinstance(inside, Plan)
    assert isinstance(out, LeftOut)
    assert out.needed_bytes == peaks()[0]


def test_a_rank_above_a_side_is_refused_before_the_run_with_the_largest_allowed() -> None:
    algorithm = method(rank=5)
    refused: list[Callable[[], object]] = [lambda: algorithm.step_kind, lambda: started(algorithm)]
    for ask in refused:
        with pytest.raises(
            PlanError, match=r"at most 4, the smaller side of blocks.2.linear \(4, 6\), got 5; .* fedit"
        ):
            ask()
    assert method(rank=4).step_kind.projection == Projection(4, 200, 0.25)


@pytest.mark.parametrize("bad", [{"rank": 0}, {"gap": 0}, {"scale": 0.0}, {"scale": float("inf")}])
def test_settings_that_break_their_rule_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(PlanError, match=f"{next(iter(bad))} must be"):
        method(**bad)
