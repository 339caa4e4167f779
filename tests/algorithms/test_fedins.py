"""What FedIns' paper says of itself: one set is plain scale-and-shift, only chosen sets move, sets average by index."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny, toy
from torch.nn import functional as F

from fedpilot import attachments, memory, tensors
from fedpilot.algorithms.fedins import FedIns, FedInsState
from fedpilot.attachments import KEYS
from fedpilot.client import ClientModel
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.model import AdaptedModel
from fedpilot.training import TrainingSettings
from fedpilot.types import ClientProfile, LeftOut, Plan, Site, StepKind, Task, Tensors, Upload

SPEC = toy.spec()
RATE = 0.05
SGD = TrainingSettings(learning_rate=RATE, optimiser="sgd", batch_size=8, max_grad_norm=None)


def fedins(spec: Any = SPEC, profile: MemoryProfile | None = None, **options: Any) -> FedIns:
    return FedIns(spec, profile, **{"size": 4, "top_k": 2, **options})  # type: ignore[arg-type]


def traced(method: FedIns) -> MemoryProfile:
    kind: StepKind = method.step_kind
    assert kind.attachment is not None
    return memory.trace_attached(
        lambda plan, size: toy.program(plan, size, kind=kind), SPEC, kind.attachment, batch=8, micro_batches=(8, 4)
    )


def pool_of(model: AdaptedModel, method: FedIns, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    start = method.init(np.random.default_rng(seed)).pool
    return {name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for name, tensor in start.items()}


def site(model: AdaptedModel, family: str, count: int, client_id: int = 0, settings: TrainingSettings = SGD) -> Site:
    rows = tiny.examples(family, count, seed=client_id)
    client = ClientModel(model, rows, settings, learning_rate=settings.learning_rate, seed=1)
    return Site(ClientProfile(client_id, count, 2**40), client)


def one_step(model: AdaptedModel, family: str, method: FedIns, pool: Tensors) -> tuple[Tensors, Tensors]:
    """The pool before and after one step on a batch of eight, and who was chosen, by `chosen`."""
    plan = attachments.suffix_plan(model.spec, 0, method.attachment, 0)
    upload = method.local_update(Task(plan, pool), site(model, family, 8))
    return pool, upload.tensors


def chosen_sets(model: AdaptedModel, family: str, method: FedIns, pool: Tensors) -> torch.Tensor:
    """(8, N) whether an example is run with a set, by a plain reading of the paper."""
    batch = next(tiny.examples(family, 8).batches(8))
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    model.load(tiny.task(model, {}, []))
    model.base.eval()
    with torch.no_grad():
        backbone: Any = model.base.base_model
        query = backbone(**inputs).last_hidden_state[:, 0]
    cosines = F.cosine_similarity(query[:, None], pool[KEYS][None], dim=2)
    result = torch.zeros_like(cosines, dtype=torch.bool)
    for row, values in enumerate(cosines):
        result[row, sorted(range(len(values)), key=lambda i: -float(values[i]))[: method.top_k]] = True
    return result


# --- one set is plain scale-and-shift -----------------------------------------------------------------------------


class PlainSSF:
    """Scale and shift after each adapted module, and one head, by plain hooks and plain gradient descent."""

    def __init__(self, family: str, pool: Tensors) -> None:
        self.model = tiny.build(family, dropout=0.0)
        self.model.load(tiny.task(self.model, {}, []))
        self.base: Any = self.model.base
        self.values = {
            name: tensor[0].clone().requires_grad_(True)
            for name, tensor in pool.items()
            if not name.startswith("pool.")
        }
        for module in self.model.spec.modules:
            self.base.get_submodule(module).register_forward_hook(self._after(module))
        self.base.get_submodule("classifier").register_forward_hook(self._classify)

    def _after(self, module: str) -> Any:
        def hook(owner: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            return self.values[f"{module}.pool_gamma"] * output + self.values[f"{module}.pool_beta"]

        return hook

    def _classify(self, owner: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return F.linear(args[0], self.values["classifier.pool_weight"], self.values["classifier.pool_bias"])

    def descend(self, batch: Mapping[str, torch.Tensor], factor: float) -> None:
        self.base.eval()
        logits = self.base(**{n: t for n, t in batch.items() if n != "labels"}).logits
        loss = factor * F.cross_entropy(logits, batch["labels"])
        gradients = torch.autograd.grad(loss, list(self.values.values()))
        with torch.no_grad():
            for value, gradient in zip(self.values.values(), gradients, strict=True):
                value -= RATE * gradient


def test_one_set_is_plain_scale_and_shift_with_federated_averaging() -> None:
    """N = k = 1: (1 - λ) CE moves γ, β and head as plain SSF moves them; the server's mean is FedAvg's."""
    model = tiny.build("dinov2", dropout=0.0)
    method = fedins(model.spec, size=1, top_k=1, lam=0.25, weights="examples")
    state = FedInsState(pool_of(model, method))
    plan = attachments.suffix_plan(model.spec, 0, method.attachment, 0)
    uploads, expected = [], []
    for client_id, count in ((0, 8), (1, 5)):
        own = replace(plan, client_id=client_id)
        uploads.append(method.local_update(Task(own, state.pool), site(model, "dinov2", count, client_id)))
        plain = PlainSSF("dinov2", state.pool)
        plain.descend(next(tiny.examples("dinov2", count, seed=client_id).batches(8)), 1 - method.lam)
        expected.append(plain.values)
    new = method.aggregate(state, uploads).pool
    for name in expected[0]:
        mean = (8 * expected[0][name] + 5 * expected[1][name]) / 13
        torch.testing.assert_close(new[name][0], mean.detach(), rtol=1e-4, atol=1e-6)
        assert not torch.equal(new[name], state.pool[name])


def test_one_lora_is_the_plain_lora_of_the_same_numbers() -> None:
    model = tiny.build("dinov2", dropout=0.0)
    method = fedins(model.spec, size=1, top_k=1, pool="lora", rank=3)
    pool = pool_of(model, method)
    model.deploy(method.deploy(FedInsState(pool)))
    found = tiny.logits(model, tiny.batch("dinov2"))
    pairs = {
        name.replace(".pool_A", ".lora_A").replace(".pool_B", ".lora_B").replace(".pool_", "."): tensor[0]
        for name, tensor in pool.items()
        if name != KEYS
    }
    plan = Plan(0, dict.fromkeys(model.spec.modules, 3), frozenset())
    model.load(Task(plan, pairs))
    torch.testing.assert_close(found, tiny.logits(model, tiny.batch("dinov2")), rtol=1e-4, atol=1e-5)


# --- one step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["ssf", "lora"])
def test_only_chosen_sets_keys_and_heads_change_in_a_step(pool: Any) -> None:
    model = tiny.build("dinov2", dropout=0.0)
    method = fedins(model.spec, size=12, pool=pool, rank=2)
    before = pool_of(model, method)
    used = chosen_sets(model, "dinov2", method, before).any(dim=0)
    assert 0 < int(used.sum()) < 12
    _, after = one_step(model, "dinov2", method, before)
    for name, tensor in after.items():
        moved = (tensor != before[name]).flatten(1).any(dim=1)
        assert torch.equal(moved, used), name


def test_the_keys_gradient_is_that_of_the_cosines_of_the_chosen_alone() -> None:
    model = tiny.build("dinov2", dropout=0.0)
    method = fedins(model.spec, size=12, lam=0.3)
    before = pool_of(model, method)
    chosen = chosen_sets(model, "dinov2", method, before)
    keys = before[KEYS].clone().requires_grad_(True)
    inputs = next(tiny.examples("dinov2", 8).batches(8))
    with torch.no_grad():
        backbone: Any = model.base.base_model
        query = backbone(pixel_values=inputs["pixel_values"]).last_hidden_state[:, 0]
    cosines = F.cosine_similarity(query[:, None], keys[None], dim=2)
    (gradient,) = torch.autograd.grad(0.3 * (1 - (cosines * chosen).sum(dim=1)).mean(), [keys])
    _, after = one_step(model, "dinov2", method, before)
    torch.testing.assert_close(after[KEYS], before[KEYS] - RATE * gradient, rtol=1e-4, atol=1e-6)


def test_the_mean_of_cosines_is_their_sum_over_k() -> None:
    model = tiny.build("dinov2", dropout=0.0)
    moves = []
    for similarity in ("sum", "mean"):
        method = fedins(model.spec, size=12, similarity=similarity)
        before, after = one_step(model, "dinov2", method, pool_of(model, method))
        moves.append(after[KEYS] - before[KEYS])
    torch.testing.assert_close(moves[0], 2 * moves[1], rtol=1e-3, atol=1e-7)


def test_without_weight_on_the_keys_they_stay_and_the_rest_learns() -> None:
    model = tiny.build("dinov2", dropout=0.0)
    method = fedins(model.spec, lam=0.0)
    before, after = one_step(model, "dinov2", method, pool_of(model, method))
    assert torch.equal(after[KEYS], before[KEYS])
    assert not torch.equal(after["classifier.pool_bias"], before["classifier.pool_bias"])


def test_the_head_of_an_example_is_the_mean_of_its_chosen_heads() -> None:
    model = tiny.build("dinov2", dropout=0.0)
    method = fedins(model.spec, size=12, top_k=3)
    pool = {
        name: torch.ones_like(t) if name.endswith("gamma") else torch.zeros_like(t) if name.endswith("beta") else t
        for name, t in pool_of(model, method).items()
    }
    chosen = chosen_sets(model, "dinov2", method, pool)
    batch = next(tiny.examples("dinov2", 8).batches(8))
    base: Any = model.base
    with torch.no_grad():
        hidden = base.base_model(pixel_values=batch["pixel_values"]).last_hidden_state
        features = torch.cat([hidden[:, 0], hidden[:, 1:].mean(dim=1)], dim=1)  # as DINOv2's classifier has it
    model.deploy(method.deploy(FedInsState(pool)))
    found = tiny.logits(model, batch)
    for row in range(8):
        weight = pool["classifier.pool_weight"][chosen[row]].mean(dim=0)
        bias = pool["classifier.pool_bias"][chosen[row]].mean(dim=0)
        torch.testing.assert_close(found[row], weight @ features[row] + bias, rtol=1e-4, atol=1e-5)


# --- server and plans ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["uniform", "examples"])
def test_sets_are_averaged_by_index_over_those_who_trained_the_block(weights: Any) -> None:
    method = fedins(weights=weights)
    state = method.init(np.random.default_rng(0))
    high = attachments.trainable(SPEC, method.attachment, [1, 2])
    generator = torch.Generator().manual_seed(5)
    moved = [{n: t + torch.randn(t.shape, generator=generator) for n, t in state.pool.items()} for _ in range(2)]
    uploads = [Upload(0, 3, moved[0], {}), Upload(1, 9, tensors.only(moved[1], high), {})]
    new = method.aggregate(state, uploads).pool
    shares = (0.5, 0.5) if weights == "uniform" else (0.25, 0.75)
    for name in state.pool:
        expected = shares[0] * moved[0][name] + shares[1] * moved[1][name] if name in high else moved[0][name]
        torch.testing.assert_close(new[name], expected)


def test_a_budget_decides_how_deep_sets_are_trained_and_everybody_gets_all_of_them() -> None:
    method = fedins()
    profile = traced(method)
    peaks = [memory.peak_bytes(profile, plan) for plan in memory.candidates(SPEC, method.attachment, 8, 8, False)]
    small = min(whole.peak for whole in profile.plans.values())
    method = fedins(profile=profile)
    state = method.init(np.random.default_rng(0))
    cohort = [ClientProfile(0, 5, peaks[0]), ClientProfile(1, 5, peaks[1]), ClientProfile(2, 5, small - 1)]
    plans = method.plan(state, cohort, np.random.default_rng(0))
    assert isinstance(plans[0], Plan)
    assert isinstance(plans[1], Plan)
    assert plans[0].trainable == state.pool.keys() > plans[1].trainable >= {KEYS, "head.pool_weight"}
    assert all(plan.peak_bytes <= client.memory_bytes for plan, client in zip(plans[:2], cohort, strict=False))
    assert isinstance(plans[2], LeftOut)
    assert method.distribute(state, plans[1]).tensors.keys() == state.pool.keys()


def test_all_or_nothing_refuses_to_run_where_somebody_can_train_less() -> None:
    profile = traced(fedins())
    method = fedins(profile=profile, participation="all")
    state = method.init(np.random.default_rng(0))
    ample, least = ClientProfile(0, 5, 10**9), ClientProfile(7, 5, min(w.peak for w in profile.plans.values()))
    assert all(isinstance(plan, Plan) for plan in method.plan(state, [ample], np.random.default_rng(0)))
    message = r"client 7 must train every block with participation 'all', but needs .* MiB .* choose .* 'suffix'"
    with pytest.raises(PlanError, match=message):
        method.plan(state, [ample, least], np.random.default_rng(0))
    _, out = method.plan(state, [ample, replace(least, margin=1.25)], np.random.default_rng(0))
    assert isinstance(out, LeftOut)


def test_robust_rules_and_privacy_know_when_everybody_sends_the_same() -> None:
    assert fedins(participation="all").averaging.same_names
    assert not fedins().averaging.same_names
    assert fedins().averaging.uniform
    assert not fedins(weights="examples").averaging.uniform


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"size": 3, "top_k": 4}, r"top_k must lie in 1\.\.size, got 4 with size 3"),
        ({"lam": 1.5}, r"key_weight must be in \[0, 1\), got 1\.5"),
    ],
)
def test_a_pool_that_cannot_be_is_refused_before_there_is_a_model(options: dict[str, Any], problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        FedIns(spec=None, profile=None, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("pool", ["ssf", "lora"])
def test_a_language_model_is_refused(pool: Any) -> None:
    method = fedins(tiny.shared("llama").spec, pool=pool)
    with pytest.raises(PlanError, match="fedins must have a classifier, got a model without a head"):
        method.init(np.random.default_rng(0))
