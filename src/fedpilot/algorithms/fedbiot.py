"""FedBiOT: clients train the last blocks on top of an emulator of the rest, which the server keeps aligned.

Wu et al., "FedBiOT: LLM Local Fine-tuning in Federated Learning without Full Model", 2024, arXiv 2406.17706.

The bi-level problem is solved by alternation, as in its code: clients lower L_C in the adapter, then the server lowers
L_S in the emulator. With ``align_steps = 0`` it is offsite tuning with a fixed emulator.

Differs from the paper: a client that cannot train the whole adapter trains the deepest blocks of it that fit; frozen
weights are not sent, since clients hold the base model; a classifier's head is a part of the adapter; padding does not
count in L_S. Differs from its code: the proximal term has a gradient (theirs is computed from detached values), and
is on (A, B): these are the variables that clients train and the server averages apart, so that keeping each close to
the received one also keeps the mean of products close to the product of means, and no (out, in) product is needed; the
server's optimiser is made anew for each alignment, so that state is adapters alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Literal

import numpy as np
import torch

from fedpilot import lora, memory, planning, tensors
from fedpilot.errors import PlanError
from fedpilot.memory import MemoryProfile
from fedpilot.types import (
    AlignsEmulator,
    Averaging,
    ClientProfile,
    Deployment,
    LeftOut,
    ModelSpec,
    Penalty,
    Plan,
    Site,
    Task,
    Tensors,
    Upload,
)


@dataclass(frozen=True)
class FedBiOTState:
    """What the server remembers.

    Attributes:
        adapter: w_A, pairs of the last blocks and the head.
        emulator: Pairs of the kept blocks below.
        alignment: What the last alignment measured; empty before the first.
    """

    adapter: Tensors
    emulator: Tensors
    alignment: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FedBiOT:
    """FedBiOT.

    Attributes:
        rank: Rank r of every pair.
        adapter_blocks: Last blocks that are the adapter.
        beta: β, share of the L blocks below that the emulator leaves out; it keeps round((1 - β) L), at least one.
        eps: ε, weight of the proximal term on the clients.
        lam: λ, weight of the divergence of outputs in the alignment.
        pre_steps: Alignment steps before the first round.
        align_steps: Alignment steps after each aggregation.
        layerwise: Whether every kept block is compared with the block that it is, in the place of the last alone.
        weights: ``examples`` weighs clients by n_k as the code does; ``uniform`` does not.
    """

    spec: ModelSpec
    profile: MemoryProfile
    rank: int = 8
    adapter_blocks: int = 2
    beta: float = 0.5
    eps: float = 0.01
    lam: float = 0.9
    pre_steps: int = 100
    align_steps: int = 10
    layerwise: bool = False
    weights: Literal["examples", "uniform"] = "examples"

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise PlanError(f"beta must lie in [0, 1), got {self.beta}; 0 keeps every block")
        least = {"rank": 1, "adapter_blocks": 1, "eps": 0, "lam": 0, "pre_steps": 0, "align_steps": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise PlanError(f"{name} must be at least {bound}, got {getattr(self, name)}; raise it")

    @property
    def averaging(self) -> Averaging:
        """Of the adapter's A and B apart, over those who trained them."""
        return Averaging(uniform=self.weights == "uniform", same_names=self.adapter_blocks == 1)

    @property
    def uses_public_data(self) -> bool:
        """Unless the emulator is never aligned."""
        return self.pre_steps > 0 or self.align_steps > 0

    def init(self, rng: np.random.Generator) -> FedBiOTState:
        """Fresh pairs in emulator and adapter; B = 0, so whole and shallow model start as the base."""
        fresh = lora.init(self.spec, self._ranks, rng)
        emulator = tensors.only(fresh, self._emulator_names)
        return FedBiOTState({name: fresh[name] for name in fresh if name not in emulator}, emulator)

    def prepare(self, state: FedBiOTState, server: Site) -> FedBiOTState:
        """Pre-alignment, on the untouched adapter."""
        return self._aligned(state, server, self.pre_steps)

    def plan(
        self, state: FedBiOTState, cohort: Sequence[ClientProfile], rng: np.random.Generator
    ) -> Sequence[Plan | LeftOut]:
        """The shallow model for everybody; of the adapter's blocks the deepest that fit are trained."""
        return planning.first_that_fits(self.profile, self._plans, cohort)

    def distribute(self, state: FedBiOTState, plan: Plan) -> Task:
        """Adapter and emulator, which the alignment has changed."""
        return Task(plan, tensors.select({**state.emulator, **state.adapter}, lora.shapes(self.spec, plan.ranks)))

    def local_update(self, task: Task, site: Site) -> Upload:
        """min L_C = CE(x, y) + ε ||w_A - w_A^t||², with the emulator frozen."""
        received = tensors.only(task.tensors, task.plan.trainable)
        site.model.load(task)
        metrics = site.model.fit(task.plan.trainable, penalty=proximal(received, self.eps))
        return site.upload(task.plan, metrics)

    def aggregate(self, state: FedBiOTState, uploads: Iterable[Upload]) -> FedBiOTState:
        """w_A <- Σ p_k w_A,k, A and B apart, over those who trained them."""
        mean = tensors.weighted_mean((upload.tensors, upload.weight(self.weights)) for upload in uploads)
        return replace(state, adapter={**state.adapter, **mean})

    def refine(self, state: FedBiOTState, server: Site) -> FedBiOTState:
        """min L_S in the emulator, with the adapter frozen, before the next broadcast."""
        return self._aligned(state, server, self.align_steps)

    def deploy(self, state: FedBiOTState) -> Deployment:
        """The adapter plugged into the full model, whose other blocks are untouched (AdapFu)."""
        return Deployment(state.adapter)

    def deploy_more(self, state: FedBiOTState) -> Mapping[str, Deployment]:
        """The adapter on top of the emulator, as clients have it (AdapEmu)."""
        return {"emulator": Deployment({**state.emulator, **state.adapter}, blocks=self._blocks)}

    def explain(self, state: FedBiOTState) -> Mapping[str, float]:
        """Hidden-state distance of the emulator on held-out public data, before and after the last alignment."""
        return state.alignment

    def _aligned(self, state: FedBiOTState, server: Site, num_steps: int) -> FedBiOTState:
        if not num_steps:
            return state
        if not isinstance(server.model, AlignsEmulator):
            raise PlanError(f"the server's model must be able to align, got {type(server.model).__name__}")
        plan = Plan(server.profile.client_id, self._ranks, self._emulator_names, blocks=self._blocks)
        server.model.load(self.distribute(state, plan))
        measured = server.model.align(
            plan.trainable, emulated=self._emulated, num_steps=num_steps, lam=self.lam, layerwise=self.layerwise
        )
        emulator = tensors.select(server.model.read(), state.emulator)
        facts = {f"alignment/{name}": value for name, value in measured.items()}
        return replace(state, emulator=emulator, alignment=facts)

    @cached_property
    def _plans(self) -> list[Plan]:
        """From the whole adapter down to its last block; the cheapest comes last, to say what a client lacks."""
        sizes = sorted(self.profile.micro, reverse=True)
        plans = [self._plan(count, size) for count in range(self.adapter_blocks, 0, -1) for size in sizes]
        return [*plans, min(plans, key=lambda plan: memory.peak_bytes(self.profile, plan))]

    def _plan(self, count: int, micro_batch: int) -> Plan:
        """The last ``count`` blocks trained."""
        trained = lora.blocks_modules(self.spec, range(self.spec.num_blocks - count, self.spec.num_blocks))
        micro = None if micro_batch == max(self.profile.micro) else micro_batch
        names = planning.trainable(self.spec, trained)
        return Plan(-1, self._ranks, names, blocks=self._blocks, micro_batch=micro)

    @cached_property
    def _emulated(self) -> int:
        """L, blocks that the emulator stands for."""
        below = self.spec.num_blocks - self.adapter_blocks
        if below < 1:
            raise PlanError(
                f"adapter_blocks must be below the model's {self.spec.num_blocks} blocks, got {self.adapter_blocks}; "
                "leave at least one to emulate"
            )
        if bare := set(range(self.spec.num_blocks)) - set(self.spec.block_of.values()):
            raise PlanError(
                f"every block must hold an adapted module in FedBiOT, got none in block {min(bare)}; add target modules"
            )
        return below

    @cached_property
    def _blocks(self) -> tuple[int, ...]:
        """The shallow model: kept blocks, then the adapter."""
        return (*kept_blocks(self._emulated, self.beta), *range(self._emulated, self.spec.num_blocks))

    @cached_property
    def _ranks(self) -> Mapping[str, int]:
        return dict.fromkeys(lora.blocks_modules(self.spec, self._blocks), self.rank)

    @cached_property
    def _emulator_names(self) -> frozenset[str]:
        return frozenset(lora.names(lora.blocks_modules(self.spec, kept_blocks(self._emulated, self.beta))))


def kept_blocks(num_blocks: int, beta: float) -> tuple[int, ...]:
    """Blocks ⌊i (L-1) / (n-1)⌋, i = 0 .. n-1, with n = round((1 - β) L): the first, the last, and even gaps between.

    >>> kept_blocks(30, 0.5)
    (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 29)
    """
    count = max(1, round((1 - beta) * num_blocks))
    return tuple(i * (num_blocks - 1) // max(count - 1, 1) for i in range(count))


def proximal(received: Tensors, eps: float) -> Penalty:
    """ε ||w - w_t||² over the received tensors, which go to the live ones' device once and not each step."""

    @cache
    def on(device: torch.device) -> Tensors:
        return {name: tensor.to(device) for name, tensor in received.items()}

    def penalty(live: Tensors) -> torch.Tensor:
        start = on(next(iter(live.values())).device)
        return eps * torch.stack([(live[name] - start[name]).square().sum() for name in start]).sum()

    return penalty
