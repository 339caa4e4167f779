from typing import Any

import pytest
import torch

from fedpilot import corrections, lora
from fedpilot.corrections import Bias

SHAPES = ((9, 14, 3), (6, 25, 3), (4, 11, 3))
"""(out, in, rank); the last has fewer rows than B and P have columns together."""


def case(out_features: int, in_features: int, rank: int, size: float = 1.0) -> tuple[Bias, torch.Tensor, torch.Tensor]:
    """A bias with its ΔW (out, in) and Ā (rank, in), by the dense way; ``size`` scales every B."""
    generator = torch.Generator().manual_seed(out_features)
    draw = {"generator": generator, "dtype": torch.float64}
    pairs = [(torch.randn(out_features, rank, **draw) * size, torch.randn(rank, in_features, **draw)) for _ in range(4)]
    weights = [1.0, 4.0, 2.0, 6.0]
    total = sum(weights)
    b = torch.stack([w * b for w, (b, _) in zip(weights, pairs, strict=True)]).sum(dim=0) / total
    a = torch.stack([w * a for w, (_, a) in zip(weights, pairs, strict=True)]).sum(dim=0) / total
    products = lora.ProductSum(out_features, in_features, dtype=torch.float64)
    for w, (b_k, a_k) in zip(weights, pairs, strict=True):
        products.add(b_k, a_k, w)
    products.add(b, a, -total)
    adapter = {lora.a_name("m"): a, lora.b_name("m"): b}
    ideal = torch.stack([w / total * (b_k @ a_k) for w, (b_k, a_k) in zip(weights, pairs, strict=True)]).sum(dim=0)
    return Bias.of(adapter, "m", products, total), ideal, a


def objective(m: torch.Tensor, bias: Bias, ideal: torch.Tensor, a: torch.Tensor, lam: float) -> torch.Tensor:
    """1 - cos(ΔW, M Ā) + λ ||M - B̄||², dense."""
    return (
        1 - torch.cosine_similarity(ideal.reshape(-1), (m @ a).reshape(-1), dim=0) + lam * (m - bias.b).square().sum()
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_a_bias_is_that_of_the_dense_residual(shape: tuple[int, int, int]) -> None:
    bias, ideal, a = case(*shape)
    residual = ideal - bias.b @ a
    torch.testing.assert_close(bias.reach, residual @ a.T)
    torch.testing.assert_close(bias.gram, a @ a.T)
    assert bias.norm == pytest.approx(float(residual.norm()))


@pytest.mark.parametrize("lam", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("steps", [1, 7, 60])
def test_descent_takes_the_steps_of_dense_gradient_descent(steps: int, lam: float) -> None:
    """The 2r coordinates and the Gram matrices change nothing but the cost; all modules are solved together."""
    cases = [case(*shape) for shape in SHAPES]
    changes = corrections.sgd_cosine([bias for bias, _, _ in cases], lam, steps, 0.05)
    for (bias, ideal, a), change in zip(cases, changes, strict=True):
        m = bias.b.clone()
        for _ in range(steps):
            m.requires_grad_()
            (gradient,) = torch.autograd.grad(objective(m, bias, ideal, a, lam), m)
            m = (m - 0.05 * gradient).detach()
        torch.testing.assert_close(change, m - bias.b, rtol=1e-8, atol=1e-10)
        assert change.abs().max() > 1e-4


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0, 1e3])
def test_descent_never_ends_above_where_it_began(size: float) -> None:
    """The cosine's gradient grows as 1 / ||B A||: at a small B a fixed rate is far too large."""
    bias, ideal, a = case(*SHAPES[0], size=size)
    (change,) = corrections.sgd_cosine([bias], 0.01, 200, 0.5)
    before, after = (float(objective(m, bias, ideal, a, 0.01)) for m in (bias.b, bias.b + change))
    assert torch.isfinite(change).all()
    assert after <= before
    if size < 1:
        assert after < before - 1e-3


def test_ridge_is_the_stationary_point_of_its_objective() -> None:
    for shape in SHAPES:
        bias, ideal, a = case(*shape)
        lam = 0.3
        change = corrections.ridge(bias, lam).requires_grad_()
        damping = lam * bias.gram.trace() / len(bias.gram)
        value = (ideal - (bias.b + change) @ a).square().sum() + damping * change.square().sum()
        (gradient,) = torch.autograd.grad(value, change)
        assert float(gradient.norm()) < 1e-10 * float(value.detach())
        assert float(change.detach().norm()) > 1e-3


def test_ridge_reaches_what_is_correctable_and_no_more() -> None:
    bias, ideal, a = case(*SHAPES[0])
    left = ideal - (bias.b + corrections.ridge(bias, 0.0)) @ a
    share = corrections.correctable_share([bias])
    assert float(left.norm()) == pytest.approx(bias.norm * (1 - share**2) ** 0.5)


def test_an_a_with_equal_rows_is_no_obstacle() -> None:
    bias, _, _ = case(*SHAPES[0])
    a = torch.randn(1, 14, dtype=torch.float64).repeat(3, 1)
    residual = torch.randn(9, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    flat = Bias(bias.b, a @ a.T, residual @ a.T, float(residual.norm()))
    reachable = residual @ torch.linalg.pinv(a) @ a
    torch.testing.assert_close(corrections.ridge(flat, 0.0) @ a, reachable)
    assert corrections.correctable_share([flat]) == pytest.approx(float(reachable.norm() / residual.norm()))


@pytest.mark.parametrize("what", ["b", "both"])
def test_a_zero_product_is_left_alone_by_the_angle(what: str) -> None:
    bias, _, _ = case(*SHAPES[0])
    none = torch.zeros_like(bias.b)
    fields: dict[str, Any] = {"b": none, "gram": bias.gram, "reach": bias.reach, "norm": bias.norm}
    if what == "both":
        fields |= {"reach": none, "norm": 0.0}
    (change,) = corrections.sgd_cosine([Bias(**fields)], 0.01, 5, 0.1)
    assert not change.any()


def test_nothing_to_correct_is_no_error() -> None:
    assert corrections.sgd_cosine([], 0.01, 5, 0.1) == []
    assert corrections.correctable_share([]) == 0
