"""FedAF: clients send condensed items instead of parameters; the server trains on all of them, so nothing is averaged.

Wang et al., "An Aggregation-Free Federated Learning for Tackling Data Heterogeneity", 2024, arXiv 2404.18962.

The paper's text and an official code could not be had. Established: w_k = γ w + (1 - γ) w̃; class-mean logits V_k,c go
up and their mean over the clients that have the class comes back within the round; items are condensed by distribution
matching with a sliced Wasserstein distance to V_c; soft labels R_k,c on the original data; the server trains with the
cross-entropy of the pooled items and a symmetric divergence from R_c. Reconstructed here: all values of the fields.

Differs from the paper: w is an adapter and a head on a frozen base, of which w̃ is a fresh draw (B = 0, the first head);
items may be hidden states, which texts need; they start from averages of at least two examples, never from one; a class
with fewer than ``min_examples`` counts as absent; Adam moves the items, in units of their spread; the pool may hold the
items of earlier rounds too (``rounds_kept``).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Literal, cast

import numpy as np
import torch

from fedpilot import lora, planning, tensors
from fedpilot.errors import ClientError, PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.types import (
    ClientProfile,
    Condensation,
    Condenses,
    Deployment,
    LeftOut,
    Matching,
    ModelSpec,
    Plan,
    Site,
    StepKind,
    Task,
    Tensors,
    Upload,
)

RESAMPLED = "resampled"  # what a client keeps between the two exchanges of a round: w_k


@dataclass(frozen=True)
class FedAFState:
    """What the server remembers.

    Attributes:
        adapter: w: pairs of the blocks from ``depth`` on, and the head.
        pools: Of the newest rounds, the last one at the end: ``items``, ``labels`` and ``soft_labels`` (R_c, a row of
            zeros for a class that nobody has).
        facts: What the server's last training came to.
    """

    adapter: Tensors
    pools: tuple[Tensors, ...] = ()
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FedAF:
    """FedAF.

    Attributes:
        rank: Rank r of every pair.
        gamma: γ; 1 leaves the received model as it is.
        space: Where items live: ``hidden``, states that enter block ``depth``; or ``pixels``.
        depth: Blocks below it have no pairs; 0 is what the embeddings give.
        length: Positions of a synthetic text.
        ipc: IPC, items per class.
        iterations: Condensation steps.
        lr: Of a step, in units of the items' standard deviation.
        lam_loc: λ_loc, weight of the peers' knowledge.
        lam_glob: λ_glob, weight of the divergence on the server.
        tau: τ of soft labels.
        projections: Directions of the sliced Wasserstein distance.
        start: What items start from: the ``average`` of ``mix`` local examples with ``jitter`` on it, or ``noise``.
        mix: Examples of an average, at most.
        jitter: Noise on the average, in units of its standard deviation.
        min_examples: Fewest examples of a class that counts as present.
        server_steps: Optimiser steps on the pool in a round.
        rounds_kept: Rounds whose items the pool holds.
    """

    spec: ModelSpec
    profile: MemoryProfile
    rank: int = 8
    gamma: float = 0.9
    space: Literal["hidden", "pixels"] = "hidden"
    depth: int = 0
    length: int = 16
    ipc: int = 10
    iterations: int = 100
    lr: float = 0.05
    lam_loc: float = 0.8
    lam_glob: float = 0.8
    tau: float = 2.0
    projections: int = 64
    start: Literal["average", "noise"] = "average"
    mix: int = 8
    jitter: float = 0.1
    min_examples: int = 2
    server_steps: int = 100
    rounds_kept: int = 1

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise PlanError("; ".join(problems))

    @property
    def condensation(self) -> Condensation:
        """What a client needs to know of the options."""
        return Condensation(**{option.name: getattr(self, option.name) for option in fields(Condensation)})

    @property
    def step_kind(self) -> StepKind:
        """Nothing is trained on clients."""
        return StepKind(condensation=self.condensation)

    def init(self, rng: np.random.Generator) -> FedAFState:
        """A fresh adapter; B = 0, so the model starts as the base."""
        ranks = planning.frozen_from(self.spec, 0, self.rank, self.depth).ranks
        return FedAFState(adapter=lora.init(self.spec, ranks, rng))

    def plan(
        self, state: FedAFState, cohort: Sequence[ClientProfile], rng: np.random.Generator
    ) -> Sequence[Plan | LeftOut]:
        """Everything frozen, in the largest pieces that fit; who fits in none is left out."""
        whole = planning.frozen_from(self.spec, -1, self.rank, self.depth)
        whole = replace(whole, sends={"logits": (self._classes, self._classes), "present": (self._classes,)})
        sizes = [None if size == self.profile.batch else size for size in self.profile.sizes]
        clients = [replace(client, num_steps=self.iterations) for client in cohort]
        return planning.first_that_fits(self.profile, [replace(whole, micro_batch=size) for size in sizes], clients)

    def distribute(self, state: FedAFState, plan: Plan) -> Task:
        """w, for the first exchange."""
        return Task(plan, state.adapter)

    def local_update(self, task: Task, site: Site) -> Upload:
        """First w_k and V_k,c; in the second exchange S_k with labels, and R_k,c."""
        model, profile = cast(Condenses, site.model), site.profile
        if task.exchange == 1:
            resampled = self._resample(task.tensors, task.plan, model.seed)
            model.load(replace(task, tensors=resampled))
            site.kept[RESAMPLED] = resampled
            return Upload(profile.client_id, profile.num_examples, model.class_means(self.condensation))
        if RESAMPLED not in site.kept:
            raise ClientError("a client must have the model of the round's first exchange, got none; it joins again")
        model.load(replace(task, tensors=site.kept.pop(RESAMPLED)))
        made = model.condense(self.condensation, task.extra["peers"])
        sent = {"items": made.items, "labels": made.labels, "soft_labels": made.soft_labels}
        return Upload(profile.client_id, profile.num_examples, sent, made.metrics)

    def mid_round(self, state: FedAFState, plans: Mapping[int, Plan], messages: Sequence[Upload]) -> Sequence[Task]:
        """V_c = mean of V_k,c over the clients that have class c; each gets those of its own classes."""
        has = {message.client_id: message.tensors["present"] > 0.5 for message in messages}
        counts = torch.stack([*has.values()]).sum(dim=0)
        total = torch.stack([has[m.client_id][:, None] * m.tensors["logits"] for m in messages]).sum(dim=0)
        mean = total / counts.clamp(min=1)[:, None]
        shape, tasks = self.profile.item_shape, []
        for client, present in has.items():
            if classes := int(present.sum()):
                count = classes * self.ipc
                sends = {"items": (count, *shape), "labels": (count,), "soft_labels": (classes, self._classes)}
                tasks.append(Task(replace(plans[client], sends=sends), {}, extra={"peers": mean[present]}))
        return tasks

    def aggregate(self, state: FedAFState, uploads: Iterable[Upload]) -> FedAFState:
        """The pool is what came; R_c = mean of R_k,c over the clients that sent the class."""
        pool: dict[str, list[torch.Tensor]] = {"items": [], "labels": []}
        soft = tensors.HolderMean()
        for upload in uploads:
            labels, rows = upload.tensors["labels"], upload.tensors["soft_labels"]
            if not _are_classes(labels, len(rows), self._classes):  # a broken client's, which must stop nobody
                continue
            for name, parts in pool.items():
                parts.append(upload.tensors[name])
            for label, row in zip(sorted(set(labels.tolist())), rows, strict=True):
                if bool((row >= 0).all()) and abs(float(row.sum()) - 1) < 1e-3:
                    soft.add({str(int(label)): row}, 1.0)
        if not pool["items"]:
            return state
        means, nobody = soft.result(), torch.zeros(self._classes)
        r = torch.stack([means.get(str(label), nobody) for label in range(self._classes)])
        newest = {**{name: torch.cat(parts) for name, parts in pool.items()}, "soft_labels": r}
        return replace(state, pools=(*state.pools, newest)[-self.rounds_kept :])

    def prepare(self, state: FedAFState, server: Site) -> FedAFState:
        """Nothing: there is no pool yet."""
        return state

    def refine(self, state: FedAFState, server: Site) -> FedAFState:
        """Trains w on the pool: cross-entropy of the items, λ_glob ½ Σ_c [KL(R_c || T_c) + KL(T_c || R_c)]."""
        if not state.pools:
            return state
        items, labels = (torch.cat([pool[name] for pool in state.pools]) for name in ("items", "labels"))
        soft = state.pools[0]["soft_labels"]
        for pool in state.pools[1:]:  # of each class the newest that there is
            known = pool["soft_labels"].sum(dim=1, keepdim=True) > 0
            soft = torch.where(known, pool["soft_labels"], soft)
        model = cast(Condenses, server.model)
        plan = planning.frozen_from(self.spec, -1, self.rank, self.depth)
        plan = replace(plan, trainable=frozenset(state.adapter))
        model.load(Task(plan, state.adapter))
        matching = Matching(self.server_steps, self.lam_glob, self.tau)
        metrics = model.fit_items(plan.trainable, items, labels.long(), soft, self.condensation, matching)
        facts = {"pool": float(len(items)), "pool_loss": metrics["loss"], "pool_matching": metrics["matching"]}
        return replace(state, adapter=tensors.select(model.read(), state.adapter), facts=facts)

    def deploy(self, state: FedAFState) -> Deployment:
        """The global adapter."""
        return Deployment(state.adapter)

    def explain(self, state: FedAFState) -> Mapping[str, float]:
        """How large the pool is, and how well w fits it."""
        return state.facts

    @property
    def _classes(self) -> int:
        """Outputs of the head, whose last tensor has one entry or row for each."""
        return int(list(self.spec.head.values())[-1].shape[0])

    def _resample(self, w: Tensors, plan: Plan, seed: int) -> dict[str, torch.Tensor]:
        """w_k = γ w + (1 - γ) w̃, with w̃ the client's own draw of an adapter that has not been trained."""
        fresh = lora.init(self.spec, plan.ranks, np.random.default_rng(seed))
        return {name: self.gamma * w[name] + (1 - self.gamma) * fresh[name] for name in w}


def _are_classes(labels: torch.Tensor, count: int, num_classes: int) -> bool:
    """Whether the labels name so many classes of the model."""
    among = bool(((labels == labels.round()) & (labels >= 0) & (labels < num_classes)).all())
    return among and len(set(labels.tolist())) == count


_AT_LEAST: Mapping[str, int] = {
    **dict.fromkeys(("rank", "length", "ipc", "iterations", "projections", "server_steps", "rounds_kept"), 1),
    **dict.fromkeys(("mix", "min_examples"), 2),
    **dict.fromkeys(("depth", "lam_loc", "lam_glob", "jitter"), 0),
}


def _problems(options: FedAF) -> Iterable[str]:
    for name, least in _AT_LEAST.items():
        if not getattr(options, name) >= least:
            yield f"{name} must be at least {least}, got {getattr(options, name)}; raise it"
    for name in ("lr", "tau"):
        if not 0 < getattr(options, name) < float("inf"):
            yield f"{name} must be positive and finite, got {getattr(options, name)}; raise it"
    if not 0 <= options.gamma <= 1:
        yield f"gamma must lie in 0..1, got {options.gamma}; 1 switches resampling off"
    if options.space == "pixels" and options.depth:
        yield f"depth must be 0 where space is 'pixels', got {options.depth}; leave it out"
