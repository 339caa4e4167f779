"""GaLore's optimiser: AdamW whose moments live in a low-rank projection of the gradient, over whole weights.

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", 2024, arXiv 2403.03507.

Differs from its code: the sum of all projected steps is kept, so that a change made with one projector can be had as
its exact factors; all state is made before the first update, so that every step that renews projectors has the same
peak.
"""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn
from torch.optim.adamw import adamw

from fedpilot.errors import PlanError, TrainingError
from fedpilot.types import Projection

_PLAIN_EPS = 1e-8
"""torch's own for AdamW."""


class GaLoreAdamW(torch.optim.Optimizer):
    """Projected AdamW for matrices and plain AdamW, as torch's own, for other tensors; one tensor at a time.

    With the gradient G of a weight seen as (large, small), Q (rank, small) the first right singular vectors of G at
    every ``gap``-th step, and t counted from 1:

        R = G Qᵀ,  M = β1 M + (1 - β1) R,  V = β2 V + (1 - β2) R²
        W = W - scale · lr · sqrt(1 - β2^t) / (1 - β1^t) · M / (sqrt(V) + ε) · Q

    Moments stay as they are when the projector is renewed, as in GaLore's code.

    Args:
        projected: Matrices, float32.
        plain: Tensors that are not projected.
        projection: Rank, gap and scale.
        learning_rate: Of the projected ones.
        plain_learning_rate: Of the others; ``None`` for the same.
        weight_decay: Decoupled; 0 keeps the change of a matrix low-rank.
        betas: β1 and β2.
        eps: ε of the projected step; the plain one has torch's.

    Raises:
        PlanError: The rank is above the smaller side of a matrix.
    """

    def __init__(
        self,
        projected: Collection[nn.Parameter],
        plain: Collection[nn.Parameter],
        projection: Projection,
        *,
        learning_rate: float,
        plain_learning_rate: float | None = None,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
    ) -> None:
        check_rank(projection.rank, [(parameter.shape[0], parameter.shape[1]) for parameter in projected])
        groups = [{"params": list(group)} for group in (projected, plain) if group]
        super().__init__(groups, {"lr": learning_rate})
        self._projected = {id(parameter) for parameter in projected}
        self._projection, self._learning_rate, self._decay = projection, learning_rate, weight_decay
        self._plain_learning_rate = learning_rate if plain_learning_rate is None else plain_learning_rate
        self._betas, self._eps = betas, eps
        self._steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every tensor that has a gradient.

        Raises:
            TrainingError: A gradient is not finite when projectors are renewed.
        """
        assert closure is None, "a step has its gradients already"
        todo: list[tuple[torch.Tensor, torch.Tensor]] = [
            (parameter, parameter.grad)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        for parameter, _ in todo:
            if parameter not in self.state:
                self.state[parameter] = self._fresh(parameter)
        renew = self._steps % self._projection.gap == 0
        self._steps += 1
        for parameter, gradient in todo:
            if id(parameter) in self._projected:
                self._projected_step(_tall(parameter), _tall(gradient), self.state[parameter], renew)
            else:
                self._plain_step(parameter, gradient, self.state[parameter])

    def factors(self, parameter: nn.Parameter) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(left, right) whose product is all that was added to a matrix; ``None`` after decay or a second projector."""
        state: Mapping[str, torch.Tensor] = self.state.get(parameter, {})
        if "total" not in state or self._steps > self._projection.gap:
            return None
        left, right = state["total"], state["projector"]
        return (left, right) if parameter.shape[0] >= parameter.shape[1] else (right.T, left.T)

    def _fresh(self, parameter: torch.Tensor) -> Mapping[str, torch.Tensor]:
        if id(parameter) not in self._projected:
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            return {"step": torch.zeros(()), **moments}
        rank, small, large = self._projection.rank, min(parameter.shape), max(parameter.shape)
        names = ("exp_avg", "exp_avg_sq") if self._decay else ("exp_avg", "exp_avg_sq", "total")
        return {
            "projector": parameter.new_zeros(rank, small),
            **{name: parameter.new_zeros(large, rank) for name in names},
        }

    def _projected_step(
        self, weight: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, torch.Tensor], renew: bool
    ) -> None:
        projector, mean, square = state["projector"], state["exp_avg"], state["exp_avg_sq"]
        if renew:
            projector.copy_(right_vectors(gradient, self._projection.rank))
        beta1, beta2 = self._betas
        moment = gradient @ projector.T
        mean.mul_(beta1).add_(moment, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(moment, moment, value=1 - beta2)
        torch.sqrt(square, out=moment).add_(self._eps)
        torch.div(mean, moment, out=moment)
        correction = (1 - beta2**self._steps) ** 0.5 / (1 - beta1**self._steps)
        rate = self._projection.scale * self._learning_rate * correction
        weight.addmm_(moment, projector, alpha=-rate)
        if self._decay:
            weight.mul_(1 - self._learning_rate * self._decay)
        else:
            state["total"].add_(moment, alpha=-rate)

    def _plain_step(self, parameter: torch.Tensor, gradient: torch.Tensor, state: Mapping[str, torch.Tensor]) -> None:
        beta1, beta2 = self._betas
        adamw(
            [parameter],
            [gradient],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            fused=False,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=self._plain_learning_rate,
            weight_decay=self._decay,
            eps=_PLAIN_EPS,
            maximize=False,
        )


def check_rank(rank: int, shapes: Collection[tuple[int, int]]) -> None:
    """Refuses a projection that is larger than a matrix.

    Raises:
        PlanError: As said; it names the largest rank that all matrices allow.
    """
    largest = min((min(shape) for shape in shapes), default=rank)
    if not 1 <= rank <= largest:
        raise PlanError(
            f"rank of a projection must lie in 1..{largest}, the smallest side of the trained weights, got {rank}; "
            f"choose at most {largest}, or train low-rank pairs with fedit, hetlora or fed-pilot"
        )


def right_vectors(gradient: torch.Tensor, rank: int) -> torch.Tensor:
    """First right singular vectors, (rank, small), of a gradient (large, small).

    Raises:
        TrainingError: The gradient is not finite.
    """
    try:
        _, _, right = torch.linalg.svd(gradient, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise TrainingError(
            f"gradients must be finite for a projector, got one that is not ({error}); "
            "lower the learning rate or set max_grad_norm"
        ) from error
    vectors: torch.Tensor = right[:rank]
    return vectors


def factors(
    optimiser: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
    """Name -> (left, right) of the matrices whose whole change is that product; none of other optimisers."""
    if not isinstance(optimiser, GaLoreAdamW):
        return {}
    found = {name: optimiser.factors(parameter) for name, parameter in parameters.items()}
    return {name: pair for name, pair in found.items() if pair is not None}


def _tall(matrix: torch.Tensor) -> torch.Tensor:
    """A view of the matrix as (large, small)."""
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
