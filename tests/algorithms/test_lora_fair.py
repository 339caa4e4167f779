"""Identities of LoRA-FAIR."""

from typing import Any

import numpy as np
import pytest
import torch
from tests import toy

from fedpilot import lora, tensors
from fedpilot.algorithms.fedit import FedIT, FedITState
from fedpilot.algorithms.lora_fair import LoRAFair, LoRAFairState
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.types import ClientProfile, LeftOut, Plan, Tensors, Upload

SPEC = toy.spec()
RANK = 2
START = toy.random_adapter(SPEC, RANK, 9)


def fair(profile: MemoryProfile, **options: Any) -> LoRAFair:
    return LoRAFair(SPEC, profile, **{"rank": RANK, **options})


def uploads(count: int = 3) -> list[Upload]:
    """Unequal weights; each client has moved from the start by its own way."""
    moves = [tensors.scale(toy.random_adapter(SPEC, RANK, k), 0.5) for k in range(count)]
    return [Upload(k, 1 + 3 * k, tensors.add(START, move)) for k, move in enumerate(moves)]


def exact_mean(sent: list[Upload], module: str) -> torch.Tensor:
    """ΔW = Σ p_k B_k A_k, (out, in), in float64."""
    total = sum(upload.num_examples for upload in sent)
    a, b = lora.a_name(module), lora.b_name(module)
    terms = [u.num_examples / total * (u.tensors[b].double() @ u.tensors[a].double()) for u in sent]
    return torch.stack(terms).sum(dim=0)


def product(adapter: Tensors, module: str) -> torch.Tensor:
    return adapter[lora.b_name(module)].double() @ adapter[lora.a_name(module)].double()


def dense_share(sent: list[Upload], means: Tensors) -> float:
    """||R Π|| / ||R|| over all modules."""
    reached = whole = 0.0
    for module in SPEC.modules:
        a = means[lora.a_name(module)].double()
        residual = exact_mean(sent, module) - product(means, module)
        reached += float((residual @ torch.linalg.pinv(a) @ a).norm()) ** 2
        whole += float(residual.norm()) ** 2
    return (reached / whole) ** 0.5


def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x * y).sum() / x.norm() / y.norm())


def fedit(profile: MemoryProfile, sent: list[Upload], **options: Any) -> Tensors:
    return FedIT(SPEC, profile, rank=RANK, **options).aggregate(FedITState(START), sent).adapter


@pytest.mark.parametrize("weights", ["examples", "uniform"])
def test_no_steps_are_fedit_bit_for_bit(profile: MemoryProfile, weights: Any) -> None:
    after = fair(profile, steps=0, weights=weights).aggregate(LoRAFairState(START), uploads())
    assert tensors.digest(after.adapter) == tensors.digest(fedit(profile, uploads(), weights=weights))


@pytest.mark.parametrize("options", [{}, {"solver": "ridge", "lam": 0.0}, {"lam": 0.0, "lr": 1.0}])
def test_clients_that_agree_need_no_correction(profile: MemoryProfile, options: dict[str, Any]) -> None:
    same = [Upload(k, 1 + 3 * k, uploads()[1].tensors) for k in range(3)]
    after = fair(profile, **options).aggregate(LoRAFairState(START), same)
    for name, tensor in same[0].tensors.items():
        torch.testing.assert_close(after.adapter[name], tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"lr": 100.0}, {"lam": 1.0}, {"steps": 1}])
def test_a_correction_brings_the_product_closer_in_angle(profile: MemoryProfile, options: dict[str, Any]) -> None:
    """Also at a rate at which plain gradient descent would run away."""
    sent = uploads()
    before, after = fedit(profile, sent), fair(profile, **options).aggregate(LoRAFairState(START), sent).adapter
    for module in SPEC.modules:
        ideal = exact_mean(sent, module)
        assert cosine(ideal, product(after, module)) > cosine(ideal, product(before, module))
        assert torch.equal(after[lora.a_name(module)], before[lora.a_name(module)])
    for name in SPEC.head:
        assert torch.equal(after[name], before[name])


def test_many_steps_reach_the_best_angle_that_any_b_can_have(profile: MemoryProfile) -> None:
    """The angle's optimum is the projection of ΔW on the rows of A, of any length."""
    sent = uploads()
    after = fair(profile, lam=0.0, lr=1.0, steps=3000).aggregate(LoRAFairState(START), sent).adapter
    for module in SPEC.modules:
        ideal = exact_mean(sent, module)
        a = after[lora.a_name(module)].double()
        reachable = ideal @ torch.linalg.pinv(a) @ a
        assert cosine(ideal, product(after, module)) == pytest.approx(cosine(ideal, reachable), abs=1e-6)


def test_ridge_without_damping_is_least_squares(profile: MemoryProfile) -> None:
    sent = uploads()
    after = fair(profile, solver="ridge", lam=0.0).aggregate(LoRAFairState(START), sent).adapter
    for module in SPEC.modules:
        a, ideal = after[lora.a_name(module)].double(), exact_mean(sent, module)
        best = torch.linalg.lstsq(a.T, ideal.T).solution.T
        torch.testing.assert_close(after[lora.b_name(module)].double(), best, rtol=1e-4, atol=1e-5)


def test_heavy_damping_leaves_the_mean_alone(profile: MemoryProfile) -> None:
    sent = uploads()
    after = fair(profile, solver="ridge", lam=1e12).aggregate(LoRAFairState(START), sent).adapter
    for name, tensor in fedit(profile, sent).items():
        torch.testing.assert_close(after[name], tensor)


def test_the_correctable_share_is_what_lies_in_the_rows_of_the_mean_a(profile: MemoryProfile) -> None:
    sent = uploads()
    algorithm = fair(profile, steps=0)
    after = algorithm.aggregate(LoRAFairState(START), sent)
    assert 0.1 < dense_share(sent, after.adapter) < 0.9
    assert after.correctable_share == pytest.approx(dense_share(sent, after.adapter), rel=1e-5)
    assert algorithm.explain(after) == {"correctable_share": after.correctable_share}


@pytest.mark.parametrize("counts", [(7,), (1, 4, 7), tuple(range(1, 41))])
@pytest.mark.parametrize("move", [0.5, 1e-3])
def test_where_there_is_no_error_none_of_it_is_correctable(
    profile: MemoryProfile, counts: tuple[int, ...], move: float
) -> None:
    """The mean of equal pairs is off by rounding, of which any share is noise; so is the ``ridge`` of it."""
    moved = tensors.add(START, tensors.scale(toy.random_adapter(SPEC, RANK, 1), move))
    same = [Upload(k, count, moved) for k, count in enumerate(counts)]
    after = fair(profile, solver="ridge", lam=0.0).aggregate(LoRAFairState(START), same)
    assert after.correctable_share == 0
    assert tensors.digest(after.adapter) == tensors.digest(fedit(profile, same))


@pytest.mark.parametrize("move", [0.5, 1e-3])
def test_a_small_error_is_no_rounding(profile: MemoryProfile, move: float) -> None:
    moves = [tensors.scale(toy.random_adapter(SPEC, RANK, k), move) for k in range(3)]
    sent = [Upload(k, 1 + 3 * k, tensors.add(START, change)) for k, change in enumerate(moves)]
    after = fair(profile, steps=0).aggregate(LoRAFairState(START), sent)
    assert after.correctable_share == pytest.approx(dense_share(sent, after.adapter), rel=0.05)


def test_a_first_round_without_any_product_has_nothing_to_correct(profile: MemoryProfile) -> None:
    state = fair(profile).init(np.random.default_rng(0))
    after = fair(profile).aggregate(state, [Upload(0, 3, state.adapter), Upload(1, 5, state.adapter)])
    assert after.correctable_share == 0
    assert tensors.is_finite(after.adapter)
    for module in SPEC.modules:
        assert not after.adapter[lora.b_name(module)].any()


def test_only_what_the_round_trained_is_corrected(profile: MemoryProfile) -> None:
    last = list(SPEC.modules)[-1]
    names = (*lora.names([last]), *SPEC.head)
    sent = [Upload(u.client_id, u.num_examples, tensors.select(u.tensors, names)) for u in uploads()]
    after = fair(profile).aggregate(LoRAFairState(START), sent).adapter
    whole = fair(profile).aggregate(LoRAFairState(START), uploads()).adapter
    for name in START:
        assert torch.equal(after[name], START[name]) == (name not in names)
    for name in names:
        torch.testing.assert_close(after[name], whole[name])


def test_participation_is_that_of_fedit(profile: MemoryProfile) -> None:
    clients = [ClientProfile(0, 5, 10**9), ClientProfile(1, 5, 1)]
    state, rng = LoRAFairState(START), np.random.default_rng(0)
    with pytest.raises(PlanError, match="client 1 must train everything with participation 'all'"):
        fair(profile).plan(state, clients, rng)
    plan, out = fair(profile, participation="exclusive").plan(state, clients, rng)
    assert isinstance(plan, Plan)
    assert isinstance(out, LeftOut)
    theirs = FedIT(SPEC, profile, rank=RANK, participation="straggler", budget_bytes=plan.peak_bytes)
    ours = fair(profile, participation="straggler", budget_bytes=plan.peak_bytes)
    assert ours.plan(state, clients, rng) == theirs.plan(FedITState(START), clients, rng)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": (2, 4)}, "choose flexlora, flora or hetlora"),
        ({"lam": -0.1}, "lam and steps must be at least 0"),
        ({"steps": -1}, "lam and steps must be at least 0"),
        ({"lr": 0.0}, "lr positive"),
    ],
)
def test_what_it_cannot_do_is_refused_before_the_run(
    profile: MemoryProfile, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        fair(profile, **options)


def test_equal_ranks_may_be_named(profile: MemoryProfile) -> None:
    assert fair(profile, ranks=(2, 2)).rank == 2
