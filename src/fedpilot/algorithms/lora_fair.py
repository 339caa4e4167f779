"""LoRA-FAIR: A and B are averaged apart, then B is corrected so that B A comes close to the mean of the products.

Bian et al., "LoRA-FAIR: Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement", 2024,
arXiv 2411.14961.

The paper's text could not be had whole. Established: the objective 1 - cos(ΔW, (B̄ + ΔB) Ā) + λ ||ΔB||, solved by SGD
on the server; only B is corrected; (Ā, B̄ + ΔB) is what clients start from. Reconstructed here: ΔB starts at zero, the
norm is squared, the cosine is that of the whole matrices.

Differs from the paper: a step that would raise the objective is halved instead of taken, because the cosine's gradient
grows as 1 / ||B̄ Ā||; ``participation`` decides what happens where memory does not suffice. ``solver = "ridge"`` is not
the paper's objective: it is the optimum under a squared error, in closed form.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from fedpilot import corrections, lora, planning, tensors
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.types import ClientProfile, Deployment, LeftOut, ModelSpec, Plan, Site, Task, Tensors, Upload

NOISE = 8 * torch.finfo(torch.float32).eps
"""A residual below this share of its terms' size is rounding."""


@dataclass(frozen=True)
class LoRAFairState:
    """The global adapter, and how much of the last round's error a correction of B could reach.

    Attributes:
        adapter: Ā and B̄ + ΔB, head included.
        correctable_share: ||R Π|| / ||R|| over all modules, R = ΔW - B̄ Ā, Π the projector on the rows of Ā.
    """

    adapter: Tensors
    correctable_share: float = 0.0


@dataclass(frozen=True)
class LoRAFair:
    """LoRA-FAIR.

    Attributes:
        rank: Rank r of every pair.
        solver: ``sgd_cosine`` as the paper, or ``ridge``: ΔB = R Āᵀ (Ā Āᵀ + λ I)⁻¹.
        lam: λ; of ``ridge`` in units of the mean eigenvalue of Ā Āᵀ.
        steps: Gradient steps on ΔB; 0 is FedIT.
        lr: Their learning rate.
        participation: As FedIT: ``all``, ``exclusive`` or ``straggler``.
        weights: ``examples`` weighs clients by n_k as the paper does; ``uniform`` does not.
        ranks: Ranks of clients, where a recipe names them; must all be ``rank``.
        budget_bytes: Smallest budget of the population, for ``straggler``.
    """

    spec: ModelSpec
    profile: MemoryProfile
    rank: int = 8
    solver: Literal["sgd_cosine", "ridge"] = "sgd_cosine"
    lam: float = 0.01
    steps: int = 1000
    lr: float = 0.01
    participation: planning.Participation = "all"
    weights: Literal["examples", "uniform"] = "examples"
    ranks: tuple[int, ...] = ()
    budget_bytes: int | None = None

    def __post_init__(self) -> None:
        if set(self.ranks) - {self.rank}:
            raise PlanError(
                f"ranks must all be the rank {self.rank}, got {self.ranks}; leave ranks out, or choose "
                "flexlora, flora or hetlora, which let clients have ranks of their own"
            )
        if self.lam < 0 or self.steps < 0 or self.lr <= 0:
            raise PlanError(
                f"lam and steps must be at least 0 and lr positive, got {self.lam}, {self.steps} and {self.lr}; "
                "0 steps switch the correction off"
            )

    def init(self, rng: np.random.Generator) -> LoRAFairState:
        """A fresh adapter; B = 0, so the model starts as the base."""
        return LoRAFairState(adapter=lora.init(self.spec, dict.fromkeys(self.spec.modules, self.rank), rng))

    def plan(
        self, state: LoRAFairState, cohort: Sequence[ClientProfile], rng: np.random.Generator
    ) -> Sequence[Plan | LeftOut]:
        """The same plan for everybody.

        Raises:
            PlanError: ``participation = "all"`` and a client cannot train everything.
        """
        return planning.alike(self.profile, self.spec, cohort, self.rank, self.participation, self.budget_bytes)

    def distribute(self, state: LoRAFairState, plan: Plan) -> Task:
        """The whole adapter."""
        return Task(plan, state.adapter)

    def local_update(self, task: Task, site: Site) -> Upload:
        """Local epochs from the corrected adapter."""
        site.model.load(task)
        metrics = site.model.fit(task.plan.trainable)
        return site.upload(task.plan, metrics)

    def aggregate(self, state: LoRAFairState, uploads: Iterable[Upload]) -> LoRAFairState:
        """Ā = Σ p_k A_k, B̄ = Σ p_k B_k, and B̄ + ΔB for B̄.

        R = Σ p_k (B_k - B°)(A_k - A°) - (B̄ - B°)(Ā - A°) with A°, B° what the clients started from: it is summed
        while the uploads pass, needs no Ā, and is small, so that float32 keeps its digits.
        """
        mean, total = tensors.HolderMean(), 0.0
        residuals: dict[str, _Residual] = {}
        for upload in uploads:
            weight = upload.weight(self.weights)
            total += weight
            mean.add(upload.tensors, weight)
            _add_products(residuals, upload.tensors, state.adapter, weight)
        means = mean.result()
        _add_products(residuals, means, state.adapter, -total)
        adapter = {**state.adapter, **means}
        biases = {
            module: corrections.Bias.of(adapter, module, residual.sum, total, noise=NOISE * residual.size)
            for module, residual in residuals.items()
        }
        for module, change in self._corrections(biases).items():
            adapter[lora.b_name(module)] = adapter[lora.b_name(module)] + change
        return LoRAFairState(adapter, corrections.correctable_share(biases.values()))

    def deploy(self, state: LoRAFairState) -> Deployment:
        """The global adapter."""
        return Deployment(state.adapter)

    def explain(self, state: LoRAFairState) -> Mapping[str, float]:
        """How much of the error any correction of B could reach, for the record."""
        return {"correctable_share": state.correctable_share}

    def _corrections(self, biases: Mapping[str, corrections.Bias]) -> Tensors:
        """Module -> ΔB (out, r)."""
        if self.solver == "ridge":
            changes = [corrections.ridge(bias, self.lam) for bias in biases.values()]
        else:
            changes = corrections.sgd_cosine(list(biases.values()), self.lam, self.steps, self.lr)
        return {module: change.float() for module, change in zip(biases, changes, strict=True)}


@dataclass
class _Residual:
    """Σ w_k (B_k - B°)(A_k - A°) of a module, one client at a time, and the size of what is rounded in its terms."""

    sum: lora.ProductSum
    size: float = 0.0

    def add(self, module: str, adapter: Tensors, start: Tensors, weight: float) -> None:
        a_name, b_name = lora.a_name(module), lora.b_name(module)
        a, b = adapter[a_name], adapter[b_name]
        a_change, b_change = a - start[a_name], b - start[b_name]
        self.sum.add(b_change, a_change, weight)
        # A mean is rounded at the size of A and B, however little they have moved.
        self.size += abs(weight) * float(b_change.norm() * a.norm() + b.norm() * a_change.norm())


def _add_products(residuals: dict[str, _Residual], adapter: Tensors, start: Tensors, weight: float) -> None:
    """Takes every module in."""
    for module in lora.modules_of(adapter):
        if module not in residuals:
            out_features, in_features = len(adapter[lora.b_name(module)]), adapter[lora.a_name(module)].shape[1]
            residuals[module] = _Residual(lora.ProductSum(out_features, in_features))
        residuals[module].add(module, adapter, start, weight)
