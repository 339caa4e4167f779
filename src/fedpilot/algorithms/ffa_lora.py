"""FFA-LoRA: A stays at one random draw that all clients share; they train B alone, whose mean is then exact.

Sun et al., "Improving LoRA in Privacy-preserving Federated Learning", 2024, arXiv 2403.12313.

Differs from the paper: ``participation`` decides what happens where memory does not suffice; with ``"ranks"``, which is
ours, a client trains the first r_k columns of B over the first r_k rows of A; the head is trained and averaged, and
in a private run clipped together with B; noise for a target epsilon is solved for each client by itself, as if it took
part in every round.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from fedpilot import lora, planning, privacy
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.privacy import Budget, Spent
from fedpilot.types import (
    Arrived,
    Averaging,
    ClientProfile,
    Deployment,
    Fresh,
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
class FFALoRAState:
    """What the server remembers.

    Attributes:
        seed: Of the draw of A0.
        adapter: A0, B and the head.
        spent: Client -> the steps of DP-SGD that it has released; empty in a run that is not private.
    """

    seed: int
    adapter: Tensors
    spent: Mapping[int, Spent] = field(default_factory=dict)


@dataclass(frozen=True)
class FFALoRA:
    """FFA-LoRA.

    Attributes:
        rank: Rank r of A0.
        participation: ``all`` asks everybody to train B at r and refuses to run where that does not fit; ``exclusive``
            leaves out whom it does not fit; ``straggler`` trains B of the deepest blocks that fit ``budget_bytes``;
            ``ranks`` gives everybody the largest of ``ranks`` that fits.
        ranks: Ranks to choose from; empty means 1 to r.
        weights: ``examples`` weighs clients by n_k as the paper does; ``uniform`` does not.
        noise_multiplier: σ of DP-SGD; noise of deviation σ C. ``None``, without ``epsilon``, for a run that is not
            private.
        epsilon: ε that no client's whole run may exceed, instead of ``noise_multiplier``.
        delta: δ; below one over any client's examples.
        clip: C, norm that each example's gradient of B and the head together is clipped to.
        num_rounds: Rounds of the run, for ``epsilon``.
        batch_size: Examples of a step, for ``epsilon``; ``None`` for those of the memory profile, which a client that
            runs elsewhere has not.
        budget_bytes: Smallest budget of the population, for ``straggler``.
    """

    spec: ModelSpec
    profile: MemoryProfile
    rank: int = 8
    participation: Literal[planning.Participation, "ranks"] = "all"
    ranks: tuple[int, ...] = ()
    weights: Literal["examples", "uniform"] = "examples"
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    clip: float = 2.0
    num_rounds: int | None = None
    batch_size: int | None = None
    budget_bytes: int | None = None

    def __post_init__(self) -> None:
        problems = list(self.budget.problems())
        if self.ranks and (self.participation != "ranks" or not 1 <= min(self.ranks) <= max(self.ranks) <= self.rank):
            rule = f"ranks must lie in 1..{self.rank} and go with participation 'ranks'"
            problems.append(f"{rule}, got {list(self.ranks)}; change them, or leave them out")
        if problems:
            raise PlanError("; ".join(problems))

    @property
    def step_kind(self) -> StepKind:
        """B alone; in a private run clipped by example."""
        return StepKind(("B",), self.budget.private)

    @property
    def averaging(self) -> Averaging:
        """Of B; a run with DP-SGD also counts the steps that clients say they made."""
        alike, private = self.participation != "ranks", self.budget.private is not None
        return Averaging(self.weights == "uniform", same_shapes=alike, tensors_only=not private)

    @property
    def budget(self) -> Budget:
        """What the run may cost a client; without noise and epsilon it is not private."""
        return Budget(self.noise_multiplier, self.epsilon, self.delta, self.clip, self.num_rounds)

    def init(self, rng: np.random.Generator) -> FFALoRAState:
        """A0 random, B = 0."""
        seed = int(rng.integers(2**63))
        ranks = dict.fromkeys(self.spec.modules, self.rank)
        return FFALoRAState(seed, lora.init(self.spec, ranks, np.random.default_rng(seed)))

    def plan(
        self, state: FFALoRAState, cohort: Sequence[ClientProfile], rng: np.random.Generator
    ) -> Sequence[Plan | LeftOut]:
        """B of every module, at r or at the largest rank that fits; nothing for a client whose epsilon is spent.

        Raises:
            PlanError: ``participation = "all"`` and a client cannot train B; ``"straggler"`` without a budget; or delta
                says nothing of a client.
        """
        blocks: Sequence[int] = range(self.spec.num_blocks)
        if self.participation == "straggler":
            blocks = planning.straggler_blocks(self.profile, self.spec, self.rank, self.budget_bytes, "B")
        return [
            self.budget.refusal(client, state.spent.get(client.client_id), self._batch) or self._plan(client, blocks)
            for client in cohort
        ]

    def distribute(self, state: FFALoRAState, plan: Plan) -> Task:
        """B and the head; the client draws A0 from its seed."""
        drawn = Fresh(state.seed, self.rank, frozenset(map(lora.a_name, plan.ranks)))
        return Task(plan, lora.truncate(state.adapter, plan.ranks), fresh=drawn)

    def local_update(self, task: Task, site: Site) -> Upload:
        """Local epochs on B_k from B, the client's own noise on each step; its loss then stays with the client."""
        site.model.load(task)
        private = self.budget.of_client(site.profile, self._batch)
        metrics = dict(site.model.fit(task.plan.trainable, kind=StepKind(("B",), private)))
        if private is not None:
            metrics = {key: value for key, value in metrics.items() if key not in ("loss", "examples")}
            metrics["noise_multiplier"] = private.noise_multiplier
        return site.upload(task.plan, metrics)

    def aggregate(self, state: FFALoRAState, uploads: Iterable[Upload]) -> FFALoRAState:
        """B̄ = Σ p_k B_k, column by column over the clients that hold it: B̄ A0 = Σ p_k B_k A0."""
        mean = lora.SlotMean(state.adapter)
        for upload in uploads:
            mean.add(upload.tensors, upload.weight(self.weights))
        return replace(state, adapter={**state.adapter, **mean.result()})

    def charged(self, state: FFALoRAState, arrived: Arrived) -> FFALoRAState:
        """What each upload has cost its client, whether or not it counted: the server saw it."""
        if self.budget.private is None:
            return state
        spent = dict(state.spent)
        for client_id, said in arrived:
            spent[client_id] = privacy.plus(spent.get(client_id), privacy.released(said))
        return replace(state, spent=spent)

    def deploy(self, state: FFALoRAState) -> Deployment:
        """The global adapter."""
        return Deployment(state.adapter)

    def explain(self, state: FFALoRAState) -> Mapping[str, float]:
        """The largest epsilon that a client has spent so far."""
        return {} if self.budget.private is None else {"epsilon": self.budget.largest(state.spent)}

    @property
    def _batch(self) -> int:
        return self.profile.batch if self.batch_size is None else self.batch_size

    def _plan(self, client: ClientProfile, blocks: Sequence[int]) -> Plan | LeftOut:
        if self.participation == "ranks":
            ranks = self.ranks or range(1, self.rank + 1)
            return planning.largest_rank(self.profile, self.spec, client, ranks, factors="B")
        wanted = planning.train_blocks(self.spec, client.client_id, self.rank, blocks, "B")
        entries = [planning.fit_or_leave_out(self.profile, wanted, client)]
        if self.participation == "all":
            planning.required(entries, [client], f"B at rank {self.rank}", "'exclusive', 'straggler' or 'ranks'")
        return entries[0]
