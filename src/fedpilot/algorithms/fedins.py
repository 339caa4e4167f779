"""FedIns: a pool of adapters with a key each; every example is run with the mean of the k whose keys are nearest to it.

Feng et al., "Towards Instance-adaptive Inference for Federated Learning", 2023, arXiv 2308.06051.

Differs from the paper: adapters stand at the outputs of the adapted modules (``model.target_modules``), which are
linear layers, and not at norms and patches; a batch may hold more than one example; under a memory budget a client
trains the sets of the deepest blocks that fit, and holds the others frozen at their global values; weights that the
classifier has below its last layer are trained and averaged once, not N times; a pool of LoRAs, a query from lower
blocks and a choice that spreads are ours.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedpilot import attachments, planning, tensors
from fedpilot.attachments import InstancePool
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.types import (
    Averaging,
    ClientProfile,
    Deployment,
    LeftOut,
    ModelSpec,
    Plan,
    Site,
    StepKind,
    Task,
    Tensors,
    Upload,
)


@dataclass(frozen=True)
class FedInsState:
    """The global pool: sets, keys, heads, and what is left of the model's own head."""

    pool: Tensors


@dataclass(frozen=True)
class FedIns:
    """FedIns.

    Attributes:
        size: N, sets in the pool.
        top_k: k, sets that an example is run with.
        pool: ``ssf`` of scales γ and shifts β, as the paper's; ``lora`` of low-rank pairs.
        rank: r of each pair of a pool of LoRAs.
        query: Of the frozen model's hidden states what is held against the keys κ: ``cls`` the first position's, as
            the paper's; ``mean`` their mean.
        query_blocks: After how many blocks the query is taken; 0, as the paper's, after all.
        choice: Of keys in training: ``nearest``, as the paper's; ``spread`` holds a cosine against the key's mean over
            the batch, so that no key stays unused because it began far from all queries.
        lam: λ; the loss is (1 - λ) CE + λ (1 - Σ cos(q, κ)).
        similarity: ``sum`` over the k chosen keys, as the paper's code; ``mean`` of them.
        weights: ``uniform`` as the paper's code; ``examples`` weighs clients by n_k.
        participation: ``suffix`` lets everybody train the deepest blocks that fit; ``all`` asks everybody to train
            everything and refuses to run where that does not fit.
        checkpointing: Whether blocks may be recomputed.
    """

    spec: ModelSpec
    profile: MemoryProfile
    size: int = 25
    top_k: int = 3
    pool: Literal["ssf", "lora"] = "ssf"
    rank: int = 8
    query: Literal["cls", "mean"] = "cls"
    query_blocks: int = 0
    choice: Literal["nearest", "spread"] = "nearest"
    lam: float = 0.1
    similarity: Literal["sum", "mean"] = "sum"
    weights: Literal["uniform", "examples"] = "uniform"
    participation: Literal["suffix", "all"] = "suffix"
    checkpointing: bool = False

    def __post_init__(self) -> None:
        self.attachment  # noqa: B018 - checks the hyper-parameters

    @property
    def attachment(self) -> InstancePool:
        """The pool."""
        return InstancePool(
            size=self.size,
            top_k=self.top_k,
            pool=self.pool,
            rank=self.rank,
            query=self.query,
            query_blocks=self.query_blocks,
            choice=self.choice,
            key_weight=self.lam,
            similarity=self.similarity,
        )

    @property
    def step_kind(self) -> StepKind:
        """The pool instead of pairs; the query is a second forward pass."""
        return StepKind(attachment=self.attachment)

    @property
    def averaging(self) -> Averaging:
        """Set by set, over the clients that trained it."""
        return Averaging(uniform=self.weights == "uniform", same_names=self.participation == "all")

    def init(self, rng: np.random.Generator) -> FedInsState:
        """γ ~ N(1, 0.02), β ~ N(0, 0.02), κ ~ N(0, 0.02); all clients share this draw, so that index i means one set.

        Raises:
            PlanError: The model is no classifier, or has fewer blocks than the query asks for.
        """
        if self.query_blocks > self.spec.num_blocks:
            raise PlanError(
                f"query_blocks must be at most {self.spec.num_blocks}, the model's blocks, got {self.query_blocks}; "
                "0 stands for all of them"
            )
        if not self.spec.head:
            raise PlanError(
                "fedins must have a classifier, got a model without a head: a language model's query would see the "
                "words that it is to predict; choose another method for model.task = 'causal-lm'"
            )
        return FedInsState(attachments.init(self.spec, self.attachment, rng))

    def plan(
        self, state: FedInsState, cohort: Sequence[ClientProfile], rng: np.random.Generator
    ) -> Sequence[Plan | LeftOut]:
        """The deepest blocks that fit; keys and heads always.

        Raises:
            PlanError: ``participation = "all"`` and a client cannot train everything.
        """
        return planning.largest_suffixes(
            self.profile, cohort, self.spec, self.attachment, self.checkpointing, self.participation
        )

    def distribute(self, state: FedInsState, plan: Plan) -> Task:
        """The whole pool."""
        return Task(plan, state.pool)

    def local_update(self, task: Task, site: Site) -> Upload:
        """Local epochs on the chosen sets of each example and on the keys."""
        site.model.load(task)
        metrics = site.model.fit(task.plan.trainable, kind=self.step_kind)
        return site.upload(task.plan, metrics)

    def aggregate(self, state: FedInsState, uploads: Iterable[Upload]) -> FedInsState:
        """Index by index: γ̄_i = Σ p_k γ_k,i over the clients that trained the block, and so on."""
        mean = tensors.weighted_mean((upload.tensors, upload.weight(self.weights)) for upload in uploads)
        return FedInsState({**state.pool, **mean})

    def deploy(self, state: FedInsState) -> Deployment:
        """The global pool, mixed for each example as in training."""
        return Deployment(state.pool, attachment=self.attachment)
