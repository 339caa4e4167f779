"""Identities of FlexLoRA."""

from typing import Any

import numpy as np
import pytest
import torch
from tests import toy

from fedpilot import lora, tensors
from fedpilot.algorithms.flexlora import FlexLoRA, FlexLoRAState
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.types import ClientProfile, ModelSpec, Plan, Tensors, Upload

SPEC = toy.spec()
WIDE = ModelSpec(
    modules={"m.tall": (40, 23), "m.wide": (17, 31)}, block_of={"m.tall": 0, "m.wide": 0}, num_blocks=1, scale=2.0
)
PLENTY = 10**9


def flexlora(profile: MemoryProfile, spec: ModelSpec = WIDE, **options: Any) -> FlexLoRA:
    return FlexLoRA(spec, profile, **{"r_min": 1, "r_max": 12, **options})


def uploads(ranks: tuple[int, ...], spec: ModelSpec = WIDE) -> list[Upload]:
    """Clients of unlike ranks and weights."""
    return [Upload(k, 3 + 4 * k, toy.random_adapter(spec, rank, k)) for k, rank in enumerate(ranks)]


def exact_mean(sent: list[Upload], module: str) -> torch.Tensor:
    """Σ p_k B_k A_k, (out, in), in float64."""
    total = sum(upload.num_examples for upload in sent)
    a, b = lora.a_name(module), lora.b_name(module)
    terms = [u.num_examples / total * (u.tensors[b].double() @ u.tensors[a].double()) for u in sent]
    return torch.stack(terms).sum(dim=0)


def product(adapter: Tensors, module: str) -> torch.Tensor:
    return adapter[lora.b_name(module)].double() @ adapter[lora.a_name(module)].double()


def distance(adapter: Tensors, module: str, ideal: torch.Tensor) -> float:
    """Of the module's product from the ideal, relative."""
    return float((product(adapter, module) - ideal).norm() / ideal.norm())


def start(rank: int, spec: ModelSpec = WIDE) -> FlexLoRAState:
    return FlexLoRAState(lora.init(spec, dict.fromkeys(spec.modules, rank), np.random.default_rng(0)))


@pytest.mark.parametrize("ranks", [(2, 5, 3), (1, 1), (4, 4, 4), (8, 12, 10, 3)])
def test_a_global_rank_above_that_of_the_mean_gives_the_mean_exactly(
    profile: MemoryProfile, ranks: tuple[int, ...]
) -> None:
    """The last case has more stacked ranks than either matrix has rows or columns."""
    sent = uploads(ranks)
    after = flexlora(profile, r_max=33).aggregate(start(33), sent)
    for module in WIDE.modules:
        assert distance(after.adapter, module, exact_mean(sent, module)) < 1e-5
    assert after.truncated_share < 1e-5


def test_what_is_cut_is_the_tail_of_the_singular_values(profile: MemoryProfile) -> None:
    sent = uploads((2, 5, 3))
    after = flexlora(profile, r_max=4).aggregate(start(4), sent)
    lost = whole = 0.0
    for module in WIDE.modules:
        ideal = exact_mean(sent, module)
        values = torch.linalg.svdvals(ideal)
        tail = float(values[4:].norm())
        assert tail > 0.1 * float(values.norm())
        assert float((product(after.adapter, module) - ideal).norm()) == pytest.approx(tail, rel=1e-5)
        lost, whole = lost + tail**2, whole + float(values.norm()) ** 2
    assert after.truncated_share == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert flexlora(profile, r_max=4).explain(after) == {"truncated_share": after.truncated_share}


def test_every_client_gets_the_best_pair_of_its_rank_and_singular_values_are_in_b(profile: MemoryProfile) -> None:
    sent = uploads((5, 6))
    algorithm = flexlora(profile)
    after = algorithm.aggregate(start(12), sent)
    for rank in (1, 3, 7):
        task = algorithm.distribute(after, Plan(0, dict.fromkeys(WIDE.modules, rank), frozenset()))
        for module in WIDE.modules:
            ideal = exact_mean(sent, module)
            values = torch.linalg.svdvals(ideal)
            error = float((product(task.tensors, module) - ideal).norm())
            assert error == pytest.approx(float(values[rank:].norm()), rel=1e-4)
            a, b = task.tensors[lora.a_name(module)], task.tensors[lora.b_name(module)]
            torch.testing.assert_close(a @ a.T, torch.eye(rank), rtol=0, atol=1e-5)
            torch.testing.assert_close(b.norm(dim=0).double(), values[:rank], rtol=1e-4, atol=1e-4)


def test_a_single_client_of_the_global_rank_keeps_its_product(profile: MemoryProfile) -> None:
    sent = uploads((6,))
    after = flexlora(profile, r_max=6).aggregate(start(6), sent)
    for module in WIDE.modules:
        assert distance(after.adapter, module, product(sent[0].tensors, module)) < 1e-5
    assert after.truncated_share == 0


def test_uniform_weights_ignore_examples(profile: MemoryProfile) -> None:
    sent = uploads((3, 5))
    alike = [Upload(u.client_id, 1, u.tensors) for u in sent]
    uniform = flexlora(profile, weights="uniform").aggregate(start(12), sent)
    for module in WIDE.modules:
        assert distance(uniform.adapter, module, exact_mean(alike, module)) < 1e-5


def test_the_head_is_the_weighted_mean(profile: MemoryProfile) -> None:
    sent = uploads((2, 3), SPEC)
    after = flexlora(profile, SPEC, r_max=3).aggregate(start(3, SPEC), sent)
    ideal = tensors.weighted_mean((tensors.select(u.tensors, SPEC.head), u.num_examples) for u in sent)
    for name in SPEC.head:
        assert torch.equal(after.adapter[name], ideal[name])


def test_clients_that_learnt_nothing_in_the_first_round_leave_the_start_as_it_is(profile: MemoryProfile) -> None:
    algorithm = flexlora(profile)
    state = start(12)
    sent = [Upload(k, 1 + k, lora.truncate(state.adapter, dict.fromkeys(WIDE.modules, 3 + k))) for k in range(2)]
    after = algorithm.aggregate(state, sent)
    assert tensors.digest(after.adapter) == tensors.digest(state.adapter)
    assert after.truncated_share == 0


def test_a_slot_beyond_the_rank_of_the_mean_can_still_be_trained(profile: MemoryProfile) -> None:
    """Zero in both factors would have no gradient for ever."""
    state = start(12)
    after = flexlora(profile).aggregate(state, uploads((2, 3)))
    for module in WIDE.modules:
        a, b = after.adapter[lora.a_name(module)], after.adapter[lora.b_name(module)]
        assert not b[:, 5:].any()
        assert torch.equal(a[5:], state.adapter[lora.a_name(module)][5:])


def test_the_rank_is_the_largest_that_fits(profile: MemoryProfile) -> None:
    peaks = []
    state = start(3, SPEC)
    for rank in (1, 2, 3):
        fixed = flexlora(profile, SPEC, r_min=rank, r_max=rank)
        (plan,) = fixed.plan(state, [ClientProfile(0, 5, PLENTY)], np.random.default_rng(0))
        assert isinstance(plan, Plan)
        assert plan.peak_bytes is not None
        peaks.append(plan.peak_bytes)
    assert peaks == sorted(set(peaks))
    clients = [ClientProfile(k, 5, peak) for k, peak in enumerate(peaks)]
    plans = flexlora(profile, SPEC, r_max=3).plan(state, clients, np.random.default_rng(0))
    assert [set(plan.ranks.values()) for plan in plans if isinstance(plan, Plan)] == [{1}, {2}, {3}]


@pytest.mark.parametrize("options", [{"r_min": 0}, {"r_min": 5, "r_max": 4}])
def test_impossible_ranks_are_refused(profile: MemoryProfile, options: dict[str, int]) -> None:
    with pytest.raises(PlanError, match="r_min must lie in"):
        flexlora(profile, **options)
