"""Fed-piLot: each client trains the blocks that are worth most under its memory budget.

Zhang et al., "Fed-piLot: Optimizing LoRA Assignment for Efficient Federated Foundation Model Fine-Tuning", 2024,
arXiv 2410.10200v1; v2 is titled "Fed-pilot: Optimizing LoRA Allocation for Efficient Federated Fine-Tuning with
Heterogeneous Clients".

The paper's text could not be had whole. Established: a knapsack per client under its memory; the value of a layer is a
Local-Global Information-Gain score from gradient norms over a small local data set, affordable to the client and
mixed with a global score; v1 aggregates by STAgg with Dynamic Weight Adjustment, v2 by ComAgg. Reconstructed here: the
mix of scores, the comparison of clients that can afford unlike depths, and the formulas of both aggregations.

Differs from the paper: costs are the true, non-additive ones and the optimum is exact (``solver = "additive"`` is the
paper's knapsack); the server solves it, with the scores that clients sent in an earlier round; a client that was in no
round that measured is planned by the global score alone; what is deployed may be a mean over rounds
(``temporal_mean``).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from fedpilot import lora, planning, tensors
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.types import Averaging, ClientProfile, Deployment, LeftOut, ModelSpec, Plan, Site, Task, Tensors, Upload

Scores = Mapping[int, float]


@dataclass(frozen=True)
class FedPilotState:
    """What the server remembers.

    Attributes:
        round: Rounds done.
        adapter: θ, head included.
        mean: θ̄, its mean over rounds; empty where none is asked for.
        velocity: V, the smoothed update of STAgg; empty before the first.
        coverage: c, running share of examples whose clients trained a block, for ComAgg.
        local_scores: Client -> block -> Γ', over the blocks that the client can afford to score.
        global_scores: Block -> Γ̄, running over refreshes.
    """

    round: int
    adapter: Tensors
    mean: Tensors = field(default_factory=dict)
    velocity: Tensors = field(default_factory=dict)
    coverage: Scores = field(default_factory=dict)
    local_scores: Mapping[int, Scores] = field(default_factory=dict)
    global_scores: Scores = field(default_factory=dict)


@dataclass(frozen=True)
class FedPilot:
    """Fed-piLot.

    Attributes:
        rank: Rank of the global adapter.
        ranks: Ranks that a trained block may take; empty means ``rank`` alone. A block of value v is worth
            ``v * (r / rank) ** rank_exponent`` at rank r (ours).
        solver: How blocks are chosen: ``exact``; ``additive``, the paper's knapsack over stand-alone costs; or a
            baseline that ignores the values: ``suffix``, ``straggler`` (the suffix that the smallest budget allows),
            ``random``, ``all``, ``all-checkpointed``.
        checkpointing: Whether the exact solver may also recompute blocks.
        max_time: Longest training that the solver may choose, measuring not included (ours). A number, at least 1, is a
            multiple of what training every block plainly takes on the same client: at 1 a client with little memory
            recomputes only for as long as the ones with much memory train anyhow. ``round`` is what the round takes
            without recomputing: clients recompute in the time in which they would wait for the slowest. ``None`` for no
            bound.
        lam: λ, weight of the local score; 1 is local only, 0 global only.
        ig_examples: Size of a client's IG set.
        refresh_every: E, rounds between two measurements of the scores.
        warmup_rounds: Rounds at the start in which all blocks count alike: B = 0 hides the gradient of A at first.
        score_ema: Weight of the newest measurement in the global score.
        aggregation: ``stagg`` (v1), ``comagg`` (v2), or ``layerwise``: the plain mean over holders.
        w_min: w_min of STAgg: weight of this round's mean in a block that hardly anybody trained.
        gamma: γ of ComAgg.
        s_max: Largest factor of ComAgg.
        coverage_ema: Weight of the past in ComAgg's coverage.
        temporal_mean: η of the mean over rounds that is deployed (ours); clients go on from the newest adapter all the
            same. ``None`` deploys the newest.
        weights: ``examples`` weighs clients by n_k; ``uniform`` does not.
        budget_bytes: Smallest budget of the population, for ``straggler``.
    """

    spec: ModelSpec
    profile: MemoryProfile
    rank: int = 8
    ranks: tuple[int, ...] = ()
    rank_exponent: float = 0.5
    solver: Literal[planning.Solver, "straggler"] = "exact"
    checkpointing: bool = False
    max_time: float | Literal["round"] | None = None
    lam: float = 0.5
    ig_examples: int = 64
    refresh_every: int = 10
    warmup_rounds: int = 1
    score_ema: float = 0.5
    aggregation: Literal["stagg", "comagg", "layerwise"] = "stagg"
    w_min: float = 0.5
    gamma: float = 0.5
    s_max: float = 2.0
    coverage_ema: float = 0.9
    temporal_mean: float | None = None
    weights: Literal["examples", "uniform"] = "examples"
    budget_bytes: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.max_time, float) and not self.max_time >= 1:
            raise PlanError(f"max_time must be at least 1, got {self.max_time}; leave it out for no bound")
        if self.temporal_mean is not None and not 0 <= self.temporal_mean < math.inf:
            raise PlanError(
                f"temporal_mean must be 0 or more, got {self.temporal_mean}; 'none' deploys the newest round"
            )

    @property
    def averaging(self) -> Averaging | None:
        """Of the blocks over their holders, where that is all; the knapsack's values come from what clients measure."""
        if self.aggregation != "layerwise":
            return None
        return Averaging(
            self.weights == "uniform",
            same_shapes=len(self.ranks) <= 1,
            same_names=False,
            tensors_only=self.solver not in ("exact", "additive"),
        )

    def init(self, rng: np.random.Generator) -> FedPilotState:
        """A fresh adapter and no scores."""
        return FedPilotState(round=0, adapter=lora.init(self.spec, dict.fromkeys(self.spec.modules, self.rank), rng))

    def plan(
        self, state: FedPilotState, cohort: Sequence[ClientProfile], rng: np.random.Generator
    ) -> Sequence[Plan | LeftOut]:
        """max Σ_j m_j Γ''_j under memory(m) <= K_i, for each client."""
        allocate = planning.BlockAllocation(
            self.spec,
            self.profile,
            self.rank,
            self.ranks or (self.rank,),
            self.rank_exponent,
            "suffix" if self.solver == "straggler" else self.solver,
            self.checkpointing,
        )
        if self.solver == "straggler":
            cohort = [replace(client, memory_bytes=self._smallest(client)) for client in cohort]
        values = [self.combined_scores(state, client.client_id) for client in cohort]
        plans = allocate(self._in_time(cohort, replace(allocate, checkpointing=False), values, rng), values, rng)
        if any(client.flops_per_second is None for client in cohort):  # their times were compared, not known
            plans = [replace(plan, seconds=None) if isinstance(plan, Plan) else plan for plan in plans]
        if self._measures(state):
            return planning.scoring(self.profile, self.spec, plans, cohort, self.ig_examples)
        return plans

    def _smallest(self, client: ClientProfile) -> int:
        """The smallest budget of all, or the client's own where it turned out to have less."""
        if self.budget_bytes is None:
            raise PlanError("budget_bytes must be the population's smallest budget for solver 'straggler'")
        return min(client.memory_bytes, self.budget_bytes)

    def _in_time(
        self,
        cohort: Sequence[ClientProfile],
        plainly: planning.BlockAllocation,
        values: Sequence[Scores],
        rng: np.random.Generator,
    ) -> Sequence[ClientProfile]:
        """The clients with the deadlines that ``max_time`` means for them."""
        if self.max_time is None:
            return cohort
        timed = [replace(client, flops_per_second=client.flops_per_second or 1.0) for client in cohort]
        if self.max_time == "round":
            taken = [plan.seconds or 0.0 for plan in plainly(timed, values, rng) if isinstance(plan, Plan)]
            return [planning.within(client, max(taken)) for client in timed] if taken else cohort
        everything = planning.train_all(self.spec, -1, self.rank)
        plain = [planning.priced(self.profile, everything, client).seconds or 0.0 for client in timed]
        return [planning.within(c, self.max_time * took) for c, took in zip(timed, plain, strict=True)]

    def distribute(self, state: FedPilotState, plan: Plan) -> Task:
        """The whole adapter; blocks that train at a lower rank get its first rows."""
        return Task(plan, lora.truncate(state.adapter, plan.ranks))

    def local_update(self, task: Task, site: Site) -> Upload:
        """Γ_j = ||gradient of block j's pairs over the IG set||, where the plan asks for it; then local epochs."""
        site.model.load(task)
        scores: dict[str, float] = {}
        if task.plan.scored:
            gradients = site.model.gradients(task.plan.scored, num_examples=self.ig_examples)
            for block in sorted({self.spec.block_of[module] for module in lora.modules_of(gradients)}):
                names = lora.names(lora.blocks_modules(self.spec, [block]))
                scores[f"score/{block}"] = tensors.norm(tensors.select(gradients, names))
        metrics = site.model.fit(task.plan.trainable)
        return site.upload(task.plan, {**metrics, **scores})

    def aggregate(self, state: FedPilotState, uploads: Iterable[Upload]) -> FedPilotState:
        """Mean over holders, then STAgg, ComAgg or nothing; the mean over rounds; new scores where they came."""
        mean, total = lora.SlotMean(state.adapter), 0.0
        measured: dict[int, tuple[int, Scores]] = {}
        for upload in uploads:
            weight = upload.weight(self.weights)
            mean.add(upload.tensors, weight)
            total += weight
            if scores := _scores(upload):
                measured[upload.client_id] = (upload.num_examples, scores)
        held = mean.result()
        rho = self._rho(mean.weights, total)
        state = self._with_scores(state, measured)
        state = {"stagg": self._stagg, "comagg": self._comagg, "layerwise": self._layerwise}[self.aggregation](
            state, held, rho
        )
        return self._averaged(replace(state, round=state.round + 1))

    def deploy(self, state: FedPilotState) -> Deployment:
        """θ̄ where there is a mean over rounds, otherwise θ."""
        return Deployment(state.mean or state.adapter)

    def deploy_more(self, state: FedPilotState) -> Mapping[str, Deployment]:
        """The newest round's θ beside θ̄: what the same run gives without the mean over rounds."""
        return {"newest": Deployment(state.adapter)} if state.mean else {}

    def goes_on_from(self, state: FedPilotState) -> Tensors:
        """θ."""
        return state.adapter

    def explain(self, state: FedPilotState) -> Mapping[str, float]:
        """Γ̄_j by block, for the record."""
        return {f"score/{block}": score for block, score in sorted(state.global_scores.items())}

    # --- values -----------------------------------------------------------------------------------------------------

    def combined_scores(self, state: FedPilotState, client_id: int) -> Scores:
        """Γ''_j = λ S Γ̂_j + (1 - λ) Γ̄̂_j where the client could afford to score block j, Γ̄̂_j elsewhere.

        Γ̂ sums to 1 over the blocks that the client scored, Γ̄̂ over all; S, the sum of Γ̄̂ over the scored ones, makes
        them comparable: no block gains or loses by being affordable, and Γ'' sums to 1. Before the first measurement
        all blocks are worth the same; a block that nobody could score is worth the mean.
        """
        known = state.global_scores
        if not known:
            return dict.fromkeys(range(self.spec.num_blocks), 1 / self.spec.num_blocks)
        unknown = sum(known.values()) / len(known)
        overall = _normalised({j: known.get(j, unknown) for j in range(self.spec.num_blocks)})
        local = _normalised(state.local_scores.get(client_id, {}))
        share = sum(overall[j] for j in local)
        return {j: self.lam * share * local[j] + (1 - self.lam) * g if j in local else g for j, g in overall.items()}

    def _measures(self, state: FedPilotState) -> bool:
        """Whether scores are measured in the coming round: every E rounds, and never for a solver that ignores them."""
        since_warmup = state.round - self.warmup_rounds
        return self.solver in ("exact", "additive") and since_warmup >= 0 and since_warmup % self.refresh_every == 0

    def _with_scores(self, state: FedPilotState, measured: Mapping[int, tuple[int, Scores]]) -> FedPilotState:
        """Γ̄_j over the clients that measured block j, each divided by its mean over the blocks that all measured.

        Those blocks are others in every round, so the newest scores are brought to the units of the running ones.
        """
        if not measured:
            return state
        common = frozenset.intersection(*(frozenset(scores) for _, scores in measured.values()))
        sums: dict[int, float] = {}
        counts: dict[int, float] = {}
        for num_examples, scores in measured.values():
            unit = sum(scores[j] for j in common) / len(common)
            for j, score in scores.items():
                sums[j] = sums.get(j, 0.0) + num_examples * (score / unit if unit > 0 else 1.0)
                counts[j] = counts.get(j, 0.0) + num_examples
        known, newest = state.global_scores, {j: sums[j] / counts[j] for j in sums}
        again = known.keys() & newest.keys()
        before, now = sum(known[j] for j in again), sum(newest[j] for j in again)
        units = before / now if before > 0 and now > 0 else 1.0
        running = {
            j: self.score_ema * units * value + (1 - self.score_ema) * known.get(j, units * value)
            for j, value in newest.items()
        }
        local = {client_id: scores for client_id, (_, scores) in measured.items()}
        return replace(state, global_scores={**known, **running}, local_scores={**state.local_scores, **local})

    # --- aggregation ------------------------------------------------------------------------------------------------

    def _rho(self, weights: Mapping[str, float], total: float) -> Scores:
        """ρ_j: share of this round's examples whose clients trained block j."""
        rho = dict.fromkeys(range(self.spec.num_blocks), 0.0)
        for module in self.spec.modules:
            weight = max(weights.get(lora.a_name(module), 0.0), weights.get(lora.b_name(module), 0.0))
            block = self.spec.block_of[module]
            rho[block] = max(rho[block], weight / total)
        return rho

    def _layerwise(self, state: FedPilotState, held: Tensors, rho: Scores) -> FedPilotState:
        """θ_j = mean over the clients that trained block j."""
        return replace(state, adapter={**state.adapter, **held})

    def _stagg(self, state: FedPilotState, held: Tensors, rho: Scores) -> FedPilotState:
        """V_j = w_j D_j + (1 - w_j) V_j, θ_j += V_j, w_j = w_min + (1 - w_min) ρ_j; blocks nobody trained rest.

        Written as an interpolation so that full coverage (w = 1) gives the plain mean to the last bit.
        """
        adapter, velocity = dict(state.adapter), dict(state.velocity)
        for name, mean in held.items():
            old = state.adapter[name]
            w = self.w_min + (1 - self.w_min) * rho.get(self._block(name), 1.0)
            carried = old + velocity[name] if name in velocity else old
            adapter[name] = torch.lerp(carried, mean, w)
            velocity[name] = adapter[name] - old
        return replace(state, adapter=adapter, velocity=velocity)

    def _comagg(self, state: FedPilotState, held: Tensors, rho: Scores) -> FedPilotState:
        """θ_j += s_j D_j, s_j = clip((max_k c_k / c_j)^γ, 1, s_max), c_j a running mean of ρ_j."""
        past = self.coverage_ema
        coverage = {j: past * state.coverage.get(j, share) + (1 - past) * share for j, share in rho.items()}
        most = max(coverage.values())
        adapter = dict(state.adapter)
        for name, mean in held.items():
            c = coverage.get(self._block(name), most)
            s = min(max((most / max(c, 1e-8)) ** self.gamma, 1.0), self.s_max)
            adapter[name] = torch.lerp(state.adapter[name], mean, s)
        return replace(state, adapter=adapter, coverage=coverage)

    def _averaged(self, state: FedPilotState) -> FedPilotState:
        """θ̄_t = (1 - β_t) θ̄_{t-1} + β_t θ_t, β_t = (η + 1) / (t + η).

        Round t weighs about t^η, so that the mean is t / (η + 2) rounds old, however many there are; at η = 0 all weigh
        the same. Polynomial-decay averaging: Shamir and Zhang, "Stochastic Gradient Descent for Non-smooth
        Optimization", ICML 2013.
        """
        if self.temporal_mean is None:
            return state
        newest = (self.temporal_mean + 1) / (state.round + self.temporal_mean)
        mean = {name: torch.lerp(state.mean.get(name, now), now, newest) for name, now in state.adapter.items()}
        return replace(state, mean=mean)

    def _block(self, name: str) -> int:
        """Block of a pair's tensor; -1 for the head, which every client trains."""
        return self.spec.block_of.get(name.rpartition(".")[0], -1)


def _scores(upload: Upload) -> Scores:
    """The scores among an upload's metrics."""
    prefix = "score/"
    return {int(key.removeprefix(prefix)): v for key, v in upload.metrics.items() if key.startswith(prefix)}


def _normalised(scores: Scores) -> Scores:
    """Scores divided by their sum; all alike where every one is zero."""
    total = sum(scores.values())
    return {j: score / total if total > 0 else 1 / len(scores) for j, score in scores.items()}
