"""Identities of HetLoRA."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tests import toy

from fedpilot import lora
from fedpilot.algorithms.hetlora import HetLoRA, HetLoRAState, sparsity, tail_norm
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.types import ClientProfile, Plan, Task, Tensors, Upload

SPEC = toy.spec()
MODULES = tuple(SPEC.modules)
PLENTY = 10**9


def hetlora(profile: MemoryProfile, **options: Any) -> HetLoRA:
    return HetLoRA(SPEC, profile, **{"r_min": 1, "r_max": 4, **options})


def task(adapter: Tensors, rank: int) -> Task:
    ranks = dict.fromkeys(MODULES, rank)
    plan = Plan(0, ranks, frozenset(lora.names(MODULES)) | frozenset(SPEC.head))
    return Task(plan, lora.truncate(adapter, ranks))


def upload(adapter: Tensors, client_id: int = 0, num_examples: int = 1) -> Upload:
    rank = adapter[lora.a_name(MODULES[0])].shape[0]
    return Upload(client_id, num_examples, adapter, {"rank": float(rank)})


def test_a_client_gets_the_first_slots(profile: MemoryProfile) -> None:
    algorithm = hetlora(profile)
    state = HetLoRAState(toy.random_adapter(SPEC, 4))
    sent = algorithm.distribute(state, task(state.adapter, 2).plan).tensors
    for module in MODULES:
        assert torch.equal(sent[lora.a_name(module)], state.adapter[lora.a_name(module)][:2])
        assert torch.equal(sent[lora.b_name(module)], state.adapter[lora.b_name(module)][:, :2])


def test_weights_follow_the_norm_of_the_product_over_all_modules(profile: MemoryProfile) -> None:
    one, two = toy.random_adapter(SPEC, 4, 1), toy.random_adapter(SPEC, 4, 2)
    after = hetlora(profile).aggregate(HetLoRAState(toy.random_adapter(SPEC, 4)), [upload(one), upload(two, 1)])
    norms = [
        torch.cat([(a[lora.b_name(m)].double() @ a[lora.a_name(m)].double()).reshape(-1) for m in MODULES])
        .norm()
        .item()
        for a in (one, two)
    ]
    share = norms[0] / sum(norms)
    for name in lora.names(MODULES):
        torch.testing.assert_close(after.adapter[name], share * one[name] + (1 - share) * two[name])


def test_weights_by_module_differ_from_module_to_module(profile: MemoryProfile) -> None:
    one, two = toy.random_adapter(SPEC, 4, 1), toy.random_adapter(SPEC, 4, 2)
    algorithm = hetlora(profile, norm="module")
    after = algorithm.aggregate(HetLoRAState(toy.random_adapter(SPEC, 4)), [upload(one), upload(two, 1)])
    for module in MODULES:
        first, second = sparsity(one, [module]), sparsity(two, [module])
        name = lora.a_name(module)
        expected = (first * one[name] + second * two[name]) / (first + second)
        torch.testing.assert_close(after.adapter[name], expected)


def test_padding_averages_zeros_into_slots_that_few_hold(profile: MemoryProfile) -> None:
    """The paper's choice, made visible: with equal weights a slot held by one of two clients is halved."""
    small, large = toy.random_adapter(SPEC, 2, 1), toy.random_adapter(SPEC, 4, 2)
    algorithm = hetlora(profile, weights="uniform")
    after = algorithm.aggregate(HetLoRAState(toy.random_adapter(SPEC, 4)), [upload(small), upload(large, 1)])
    for module in MODULES:
        name = lora.a_name(module)
        torch.testing.assert_close(after.adapter[name][2:], large[name][2:] / 2)
        torch.testing.assert_close(after.adapter[name][:2], (large[name][:2] + small[name]) / 2)


def test_a_round_of_zero_products_is_a_plain_mean(profile: MemoryProfile) -> None:
    fresh = [lora.init(SPEC, dict.fromkeys(MODULES, 4), np.random.default_rng(k)) for k in range(2)]
    after = hetlora(profile).aggregate(HetLoRAState(fresh[0]), [upload(fresh[0]), upload(fresh[1], 1)])
    name = lora.a_name(MODULES[0])
    torch.testing.assert_close(after.adapter[name], (fresh[0][name] + fresh[1][name]) / 2)


def test_the_tail_norm_is_the_sum_of_products_of_norms() -> None:
    adapter = {"m.lora_A": torch.tensor([[1.0, 0.0, 0.0], [0.0, 3.0, 4.0]]), "m.lora_B": torch.tensor([[7.0, 2.0]])}
    assert float(tail_norm(adapter, 1)) == 10.0
    assert float(tail_norm(adapter, 2)) == 0.0


class Scripted:
    """A model whose training gives a stated adapter; it shows what the algorithm hands it."""

    def __init__(self, after: Tensors) -> None:
        self.after, self.penalty = after, None

    def load(self, task: Task) -> None:
        self.loaded = task

    def fit(self, trainable: frozenset[str], *, penalty: Any = None) -> dict[str, float]:
        self.penalty = penalty
        return {"loss": 1.0, "steps": 1.0}

    def gradients(self, names: frozenset[str], *, num_examples: int) -> Tensors:
        return {}

    def read(self) -> Tensors:
        return self.after


def with_tail(adapter: Tensors, q: int, factor: float) -> Tensors:
    """The adapter with the slots from q on scaled in A."""
    scaled = {name: tensor.clone() for name, tensor in adapter.items()}
    for module in MODULES:
        scaled[lora.a_name(module)][q:] *= factor
    return scaled


@pytest.mark.parametrize(("factor", "rank"), [(0.5, 3), (1.0, 4), (2.0, 4)])
def test_only_a_tail_that_shrank_is_pruned(profile: MemoryProfile, factor: float, rank: int) -> None:
    adapter = toy.random_adapter(SPEC, 4)
    site = toy.site(ClientProfile(0, 5, PLENTY))
    site.model = Scripted(with_tail(adapter, 3, factor))
    result = hetlora(profile, gamma=0.99).local_update(task(adapter, 4), site)
    assert result.metrics["rank"] == rank
    assert {t.shape[0] for name, t in result.tensors.items() if name.endswith("lora_A")} == {rank}


def test_ranks_never_sink_below_r_min_and_gamma_one_never_prunes(profile: MemoryProfile) -> None:
    adapter = toy.random_adapter(SPEC, 4)
    site = toy.site(ClientProfile(0, 5, PLENTY))
    site.model = Scripted(with_tail(adapter, 0, 0.5))
    assert hetlora(profile, gamma=0.01, r_min=2).local_update(task(adapter, 4), site).metrics["rank"] == 2
    assert hetlora(profile, gamma=1.0).local_update(task(adapter, 4), site).metrics["rank"] == 4


def test_the_penalty_is_lambda_times_the_tail_and_has_a_gradient(profile: MemoryProfile) -> None:
    adapter = toy.random_adapter(SPEC, 4)
    site = toy.site(ClientProfile(0, 5, PLENTY))
    site.model = scripted = Scripted(adapter)
    hetlora(profile, gamma=0.5, lam=0.25).local_update(task(adapter, 4), site)
    assert scripted.penalty is not None
    live = {name: tensor.clone().requires_grad_() for name, tensor in adapter.items()}
    value = scripted.penalty(live)
    assert value.item() == pytest.approx(0.25 * float(tail_norm(adapter, 2)))
    value.backward()
    gradient = live[lora.a_name(MODULES[0])].grad
    assert gradient is not None
    assert gradient[2:].all()
    assert not gradient[:2].any()


def test_a_pruned_rank_is_remembered_and_never_exceeded(profile: MemoryProfile) -> None:
    algorithm = hetlora(profile)
    state = algorithm.aggregate(HetLoRAState(toy.random_adapter(SPEC, 4)), [upload(toy.random_adapter(SPEC, 3), 5)])
    assert state.ranks == {5: 3}
    clients = [ClientProfile(5, 5, PLENTY), ClientProfile(6, 5, PLENTY)]
    plans = algorithm.plan(state, clients, np.random.default_rng(0))
    assert [set(plan.ranks.values()) for plan in plans if isinstance(plan, Plan)] == [{3}, {4}]


def test_the_rank_is_the_largest_that_fits(profile: MemoryProfile) -> None:
    algorithm = hetlora(profile)
    state = HetLoRAState(toy.random_adapter(SPEC, 4))
    client = ClientProfile(0, 5, PLENTY)
    peaks = []
    for rank in (1, 2, 3, 4):
        limited = hetlora(profile, r_min=rank, r_max=rank)
        (plan,) = limited.plan(replace(state), [client], np.random.default_rng(0))
        assert isinstance(plan, Plan)
        assert plan.peak_bytes is not None
        peaks.append(plan.peak_bytes)
    assert peaks == sorted(set(peaks))
    for rank, peak in zip((1, 2, 3), peaks, strict=False):
        (plan,) = algorithm.plan(state, [replace(client, memory_bytes=peaks[rank] - 1)], np.random.default_rng(0))
        assert isinstance(plan, Plan)
        assert set(plan.ranks.values()) == {rank}
        assert plan.peak_bytes == peak


def test_slots_that_a_poor_round_lacks_are_there_for_the_next_rich_one(profile: MemoryProfile) -> None:
    algorithm = hetlora(profile, gamma=1.0)
    state = HetLoRAState(toy.random_adapter(SPEC, 4))
    poor = algorithm.aggregate(state, [upload(toy.random_adapter(SPEC, 2, 7), client_id=1)])
    sent = algorithm.distribute(poor, task(poor.adapter, 4).plan).tensors
    for module in MODULES:
        assert sent[lora.a_name(module)][2:].any(dim=1).all()
        assert torch.equal(sent[lora.a_name(module)][2:], state.adapter[lora.a_name(module)][2:])


@pytest.mark.parametrize("said", [None, float("nan"), 0.0, 9.0])
def test_a_rank_is_what_came_and_not_what_a_client_says(profile: MemoryProfile, said: float | None) -> None:
    algorithm = hetlora(profile, r_min=2)
    metrics = {} if said is None else {"rank": said}
    state = HetLoRAState(toy.random_adapter(SPEC, 4))
    for rank, remembered in ((3, 3), (1, 2)):
        lie = replace(upload(toy.random_adapter(SPEC, rank), client_id=5), metrics=metrics)
        after = algorithm.aggregate(state, [lie])
        assert after.ranks == {5: remembered}
        (plan,) = algorithm.plan(after, [ClientProfile(5, 5, PLENTY)], np.random.default_rng(0))
        assert isinstance(plan, Plan)
        assert set(plan.ranks.values()) == {remembered}


@pytest.mark.parametrize("options", [{"r_min": 0}, {"r_min": 5}, {"gamma": 0.0}, {"gamma": 1.5}])
def test_impossible_settings_are_refused(profile: MemoryProfile, options: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="must lie in"):
        hetlora(profile, **options)
