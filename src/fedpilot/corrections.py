"""Corrections of an averaged B towards the mean of the products B A, from (rank, rank) and (out, rank) matrices alone.

With ΔW = Σ p_k B_k A_k, the averages Ā and B̄, and R = ΔW - B̄ Ā: only the part of R whose rows lie in the rows of Ā can
be reached by adding ΔB to B̄.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from fedpilot import lora
from fedpilot.types import Tensors


@dataclass(frozen=True)
class Bias:
    """What a correction of one module has to know, in float64.

    Attributes:
        b: B̄, (out, r).
        gram: G = Ā Āᵀ, (r, r).
        reach: T = R Āᵀ, (out, r).
        norm: ||R||.
    """

    b: torch.Tensor
    gram: torch.Tensor
    reach: torch.Tensor
    norm: float

    @classmethod
    def of(
        cls, adapter: Tensors, module: str, residual: lora.ProductSum, total: float, *, noise: float = 0.0
    ) -> "Bias":
        """Of a module with the averaged pair and ``total`` times its R, of a norm up to ``noise`` by rounding alone."""
        a, b = adapter[lora.a_name(module)], adapter[lora.b_name(module)].double()
        gram, norm = a.double() @ a.double().T, residual.norm()
        if norm <= noise:
            return cls(b, gram, torch.zeros_like(b), 0.0)
        return cls(b, gram, residual.times(a.T).double() / total, norm / total)


def correctable_share(biases: Iterable[Bias]) -> float:
    """||R Π|| / ||R|| over the modules; ||R Π||² = <T G⁺, T>, since Π = Āᵀ G⁺ Ā. 0 where there is no error."""
    reached, whole = 0.0, 0.0
    for bias in biases:
        reached += float((bias.reach @ torch.linalg.pinv(bias.gram, hermitian=True) * bias.reach).sum())
        whole += bias.norm**2
    return min(math.sqrt(max(reached, 0.0) / whole), 1.0) if whole > 0 else 0.0


def ridge(bias: Bias, lam: float) -> torch.Tensor:
    """ΔB = T (G + λ tr(G) / r I)⁻¹, (out, r), the minimum of ||R - ΔB Ā||² + λ tr(G) / r ||ΔB||²."""
    rank = len(bias.gram)
    damping = lam * bias.gram.trace() / rank * torch.eye(rank, dtype=bias.gram.dtype)
    inverse: torch.Tensor = torch.linalg.pinv(bias.gram + damping, hermitian=True)
    return bias.reach @ inverse


def sgd_cosine(biases: Sequence[Bias], lam: float, steps: int, lr: float) -> list[torch.Tensor]:
    """ΔB (out, r) of each module after gradient descent from zero on 1 - cos(ΔW, M Ā) + λ ||M - B̄||², M = B̄ + ΔB.

    With P = ΔW Āᵀ = B̄ G + T, the cosine is <P, M> / (||ΔW|| sqrt(<M G, M>)). Every iterate lies in the columns of B̄
    and P, so all modules are solved together in 2r coordinates: the steps are the same, and r x r is all they touch.
    """
    if not biases:
        return []
    rank = len(biases[0].gram)
    bases, coordinates = zip(*(_coordinates(bias, rank) for bias in biases), strict=True)
    inside = torch.stack(coordinates)
    b, p = inside[:, :, :rank], inside[:, :, rank:]  # (modules, 2r, r) each
    gram = torch.stack([bias.gram for bias in biases])
    squares = [float(2 * (x.reach * x.b).sum() + (x.b @ x.gram * x.b).sum()) + x.norm**2 for x in biases]
    norm = torch.tensor(squares, dtype=b.dtype).clamp(min=0.0).sqrt().reshape(-1, 1, 1)
    rate = torch.full_like(norm, lr)
    m = b
    value, gradient = _cosine_objective(m, b, p, gram, norm, lam)
    for _ in range(steps):
        trial = m - rate * gradient
        trial_value, trial_gradient = _cosine_objective(trial, b, p, gram, norm, lam)
        lower = trial_value <= value
        m, value = torch.where(lower, trial, m), torch.where(lower, trial_value, value)
        gradient = torch.where(lower, trial_gradient, gradient)
        rate = torch.where(lower, rate, rate / 2)
    return [base @ (after - before)[: base.shape[1]] for base, after, before in zip(bases, m, b, strict=True)]


def _coordinates(bias: Bias, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An orthonormal basis of the columns of B̄ and P, (out, at most 2r), and both in it, (2r, 2r) filled with zeros."""
    basis, factor = torch.linalg.qr(torch.cat([bias.b, bias.b @ bias.gram + bias.reach], dim=1))
    return basis, torch.nn.functional.pad(factor, (0, 0, 0, 2 * rank - len(factor)))


def _cosine_objective(
    m: torch.Tensor, b: torch.Tensor, p: torch.Tensor, gram: torch.Tensor, norm: torch.Tensor, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Value (modules, 1, 1) and gradient of the objective; the cosine with a zero matrix counts as zero."""
    image = m @ gram
    square = (image * m).sum(dim=(1, 2), keepdim=True)
    scale = norm * square.clamp(min=0.0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    cosine = (p * m).sum(dim=(1, 2), keepdim=True) * inverse
    pull = torch.where(scale > 0, cosine / square, torch.zeros_like(square))
    value = 1 - cosine + lam * (m - b).square().sum(dim=(1, 2), keepdim=True)
    return value, -p * inverse + pull * image + 2 * lam * (m - b)
