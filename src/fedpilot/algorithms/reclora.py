"""RecLoRA: a shared bank of LoRAs, mixed for each example by a gate that reads its user's vector, which never travels.

Zhu et al., "Lifelong Personalized Low-Rank Adaptation of Large Language Models for Recommendation", 2024, arXiv
2408.03533.

Differs from the paper: the paper is centralised; that clients are users or groups of users, that bank and gate are
averaged, and who trains what under a memory budget, is ours. The mix is the paper's sum of products by default; its
released code mixes the factors apart, ``mix = "factor"``. Training goes on for all epochs and the softmax is never
skipped, which the released code does otherwise.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedpilot import attachments, planning, tensors
from fedpilot.attachments import AdapterBank
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
class RecLoRAState:
    """The global bank, its gates and the head."""

    bank: Tensors


@dataclass(frozen=True)
class RecLoRA:
    """RecLoRA.

    Attributes:
        N: LoRAs in each module's bank.
        rank: Rank r of each.
        mix: ``product``: ΔW_u = Σ_i w_i B_i A_i; ``factor``: ΔW_u = (Σ_i w_i B_i)(Σ_i w_i A_i).
        gate: ``user`` mixes by the user's vector; ``none`` gives every LoRA 1 / N: no personalisation.
        tau: τ, temperature of the gate's softmax.
        hidden: Width of the gate's layer.
        dropout: In the gate.
        participation: ``all`` asks everybody to train everything and refuses to run where that does not fit;
            ``exclusive`` leaves out whom it does not fit; ``suffix`` trains the deepest blocks that fit each client.
        weights: ``examples`` weighs clients by n_k; ``uniform`` does not.
        user_width: d_h, entries of a user's vector; ``None`` or 0 where examples have none.
    """

    spec: ModelSpec
    profile: MemoryProfile
    N: int = 8
    rank: int = 8
    mix: Literal["product", "factor"] = "product"
    gate: Literal["user", "none"] = "user"
    tau: float = 1.0
    hidden: int = 60
    dropout: float = 0.1
    participation: Literal["all", "exclusive", "suffix"] = "all"
    weights: Literal["examples", "uniform"] = "examples"
    user_width: int | None = None

    def __post_init__(self) -> None:
        self.bank  # noqa: B018 - checks the hyper-parameters

    @property
    def bank(self) -> AdapterBank:
        """What is hooked onto the base model."""
        width = (self.user_width or 0) if self.gate == "user" else 0
        return AdapterBank(self.N, self.rank, width, self.mix, self.tau, self.hidden, self.dropout)

    @property
    def needs_user_vectors(self) -> bool:
        """Whether examples must come with their user's vector."""
        return self.gate == "user"

    @property
    def step_kind(self) -> StepKind:
        """The bank and its gates in place of pairs."""
        return StepKind(attachment=self.bank)

    @property
    def averaging(self) -> Averaging:
        """Of bank and gates, tensor by tensor; with ``suffix`` over those who trained it.

        User vectors come of a click model that has learnt from all clients.
        """
        alike = self.participation != "suffix"
        return Averaging(self.weights == "uniform", same_names=alike, learnt_before=self.needs_user_vectors)

    def init(self, rng: np.random.Generator) -> RecLoRAState:
        """Every A_i random by itself, every B_i zero, so the model starts as the base."""
        return RecLoRAState(attachments.init(self.spec, self.bank, rng))

    def plan(
        self, state: RecLoRAState, cohort: Sequence[ClientProfile], rng: np.random.Generator
    ) -> Sequence[Plan | LeftOut]:
        """Bank and gate of all blocks, or of the deepest that fit.

        Raises:
            PlanError: ``participation = "all"`` and a client cannot train everything.
        """
        return planning.largest_suffixes(self.profile, cohort, self.spec, self.bank, participation=self.participation)

    def distribute(self, state: RecLoRAState, plan: Plan) -> Task:
        """The whole bank and its gates."""
        return Task(plan, state.bank)

    def local_update(self, task: Task, site: Site) -> Upload:
        """Local epochs from the global bank; h_u is fixed and stays in the client's examples."""
        site.model.load(task)
        metrics = site.model.fit(task.plan.trainable, kind=self.step_kind)
        return site.upload(task.plan, metrics)

    def aggregate(self, state: RecLoRAState, uploads: Iterable[Upload]) -> RecLoRAState:
        """Ā_i = Σ p_k A_{k,i} and B̄_i = Σ p_k B_{k,i} for each member i, and the same of the gates."""
        mean = tensors.weighted_mean((upload.tensors, upload.weight(self.weights)) for upload in uploads)
        return RecLoRAState({**state.bank, **mean})

    def deploy(self, state: RecLoRAState) -> Deployment:
        """The global bank: each example is answered by its own user's mix."""
        return Deployment(state.bank, attachment=self.bank)

    def personal(self, deployment: Deployment, side: Tensors) -> Deployment:
        """The plain LoRA that the bank is for the mean of a client's user vectors; without any, the even mix."""
        vectors = side.get(attachments.USER_VECTOR)
        user = None if vectors is None else vectors.float().mean(dim=0)
        pairs = attachments.mixed_adapter(self.bank, self.spec, deployment.tensors, user)
        return Deployment(pairs, deployment.base_delta)
