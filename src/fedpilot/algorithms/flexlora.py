"""FlexLoRA: the server averages the products B A, and hands each client the best pair of a rank that fits it.

Bai et al., "Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources", 2024,
arXiv 2402.11505.

Differs from the paper: ranks are the largest that fit a client's memory (the paper gives them by resource class); one
scale for every rank, that is α_k = scale r_k, so that it cancels in the mean and in the pairs.
Differs from the released code: the decomposition is that of the stacked factors, never of the (out, in) product.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedpilot import lora, planning, tensors
from fedpilot.memory import MemoryProfile
from fedpilot.types import ClientProfile, Deployment, LeftOut, ModelSpec, Plan, Site, Task, Tensors, Upload


@dataclass(frozen=True)
class FlexLoRAState:
    """The global adapter: the first r_max singular pairs of the mean product, and what lies beyond them.

    Attributes:
        adapter: A = Vᵀ and B = U Σ, head included.
        truncated_share: Norm of the singular values beyond r_max over the norm of all, over all modules together.
    """

    adapter: Tensors
    truncated_share: float = 0.0


@dataclass(frozen=True)
class FlexLoRA:
    """FlexLoRA.

    Attributes:
        r_min: Smallest rank r_k; a client that cannot train it everywhere is left out.
        r_max: Largest rank, and that of the global adapter.
        weights: ``examples`` weighs clients by n_k as the paper does; ``uniform`` does not.
    """

    spec: ModelSpec
    profile: MemoryProfile
    r_min: int = 2
    r_max: int = 16
    weights: Literal["examples", "uniform"] = "examples"

    def __post_init__(self) -> None:
        planning.check_ranks(self.r_min, self.r_max)

    def init(self, rng: np.random.Generator) -> FlexLoRAState:
        """A fresh adapter at rank r_max; B = 0, so the model starts as the base."""
        return FlexLoRAState(adapter=lora.init(self.spec, dict.fromkeys(self.spec.modules, self.r_max), rng))

    def plan(
        self, state: FlexLoRAState, cohort: Sequence[ClientProfile], rng: np.random.Generator
    ) -> Sequence[Plan | LeftOut]:
        """All modules at the largest rank r_k that fits."""
        ranks = range(self.r_min, self.r_max + 1)
        return [planning.largest_rank(self.profile, self.spec, client, ranks) for client in cohort]

    def distribute(self, state: FlexLoRAState, plan: Plan) -> Task:
        """A_k = V[:r_k]ᵀ, B_k = U[:, :r_k] Σ[:r_k]: the best pair of rank r_k."""
        return Task(plan, lora.truncate(state.adapter, plan.ranks))

    def local_update(self, task: Task, site: Site) -> Upload:
        """Local epochs from the pair as it came."""
        site.model.load(task)
        metrics = site.model.fit(task.plan.trainable)
        return site.upload(task.plan, metrics)

    def aggregate(self, state: FlexLoRAState, uploads: Iterable[Upload]) -> FlexLoRAState:
        """U Σ Vᵀ = Σ p_k B_k A_k; A = Vᵀ and B = U Σ at rank r_max.

        In a first round that leaves B = 0, and in slots beyond the rank of the mean, A stays as it was: see
        `lora.pair_of`.
        """
        products = lora.product_sums(self.spec)
        head, total = tensors.HolderMean(), 0.0
        for upload in uploads:
            weight = upload.weight(self.weights)
            total += weight
            head.add(tensors.only(upload.tensors, frozenset(self.spec.head)), weight)
            for module, product in products.items():
                product.add(upload.tensors[lora.b_name(module)], upload.tensors[lora.a_name(module)], weight)
        adapter = {**state.adapter, **head.result()}
        lost, whole = 0.0, 0.0
        for module, product in products.items():
            u, s, vh = product.svd()
            a, b = lora.a_name(module), lora.b_name(module)
            adapter[a], adapter[b] = lora.pair_of(u, s / total, vh, state.adapter[a])
            lost += float(s[self.r_max :].double().square().sum()) / total**2
            whole += float(s.double().square().sum()) / total**2
        return FlexLoRAState(adapter, truncated_share=math.sqrt(lost / whole) if whole > 0 else 0.0)

    def deploy(self, state: FlexLoRAState) -> Deployment:
        """The global adapter at rank r_max."""
        return Deployment(state.adapter)

    def explain(self, state: FlexLoRAState) -> Mapping[str, float]:
        """What the cut to r_max lost, for the record."""
        return {"truncated_share": state.truncated_share}
