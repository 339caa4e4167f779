"""Bytes and seconds of a plan, and where they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedpilot.memory.assembly import Assembly, BlockBytes, check, moments
from fedpilot.memory.attached import whole_trace
from fedpilot.memory.probing import ProgramFor
from fedpilot.memory.profile import MemoryProfile
from fedpilot.types import Plan


def peak_bytes(profile: MemoryProfile, plan: Plan) -> int:
    """Highest live bytes of the plan's local update, scoring included.

    Raises:
        PlanError: The plan names a block, module, tensor, micro-batch or mixture that was not traced.
    """
    if profile.plans or plan.attachment is not None:
        return whole_trace(profile, plan).peak + profile.overhead_bytes
    check(profile, plan)
    training = max(moment.peak for moment in moments(profile, plan)) if plan.trainable else 0
    return max(training, _scoring_bytes(profile, plan)) + profile.overhead_bytes


def seconds(profile: MemoryProfile, plan: Plan, flops_per_second: float, num_steps: int, num_scored: int = 0) -> float:
    """Seconds of a local update at a measured speed, from the operations counted in the traces.

    Args:
        profile: Costs.
        plan: What is trained, and what is scored beforehand.
        flops_per_second: Measured speed.
        num_steps: Optimiser steps.
        num_scored: Examples that the plan's scored tensors are measured on.
    """
    operations = num_steps * _flops(profile, plan)
    if plan.scored and num_scored:
        size = plan.micro_batch or profile.batch
        operations += math.ceil(num_scored / size) * size * _flops(profile, _scoring(profile, plan)) // profile.batch
    return operations / flops_per_second


@dataclass(frozen=True)
class Breakdown:
    """Where the bytes of a plan's highest moment are; the fields from ``weights`` to ``overhead`` add up to ``peak``.

    Attributes:
        weights: Frozen weights and buffers of the loaded blocks and of what lies around them.
        head: Trained head.
        batch: Inputs and labels.
        adapters: All pairs held.
        optimiser: Optimiser state.
        gradients: Gradients that are complete at the highest moment.
        activations: All else: what is saved for the backward pass, logits, and scratch.
        overhead: Measured on a device by ``calibrate``.
        peak: Highest live bytes of a training step.
        moment: The part of the step in which it is reached, such as ``backward of block 3``.
        head_peak: Highest bytes of head and loss above what stands, with everything saved before it.
        blocks: Each loaded block.
    """

    weights: int
    head: int
    batch: int
    adapters: int
    optimiser: int
    gradients: int
    activations: int
    overhead: int
    peak: int
    moment: str
    head_peak: int
    blocks: tuple[BlockBytes, ...]


def breakdown(profile: MemoryProfile, plan: Plan) -> Breakdown:
    """Where a plan's bytes are at the highest moment of a training step.

    Raises:
        PlanError: As `peak_bytes`.
    """
    parts = Assembly(profile, plan)
    walk = list(moments(profile, plan))
    top = max(walk, key=lambda moment: moment.peak)
    standing = parts.standing_without_gradients
    known = {
        "weights": profile.base_bytes + sum(profile.block_bytes[block] for block in parts.blocks),
        "head": sum(profile.head.values()),
        "batch": profile.batch_bytes,
        "adapters": sum(parts.adapter_bytes(block) for block in parts.blocks),
        "optimiser": parts.optimiser_bytes,
        "gradients": parts.gradients_at(top),
    }
    return Breakdown(
        **known,
        activations=top.peak - sum(known.values()),
        overhead=profile.overhead_bytes,
        peak=top.peak + profile.overhead_bytes,
        moment=f"{top.part} of block {top.block}" if top.block is not None else top.part,
        head_peak=max(moment.peak for moment in walk if moment.part == "head") - standing,
        blocks=tuple(parts.block_line(block, walk) for block in parts.blocks),
    )


def calibrate(
    program_for: ProgramFor, profile: MemoryProfile, device: torch.device, plans: Sequence[Plan]
) -> MemoryProfile:
    """Measures on a CUDA device what the traces cannot know: context, workspaces, blocks of 512 bytes, fragments.

    Args:
        program_for: Builds the step of a plan on the device.
        profile: The traced model.
        device: A CUDA device that nothing else uses meanwhile.
        plans: A few plans of the kind that will run, a small and a large one at least.

    Returns:
        The profile with the largest excess over its prediction as ``overhead_bytes``.
    """
    bare = profile.with_overhead(0)
    excess = [_device_bytes(program_for, bare, device, plan) - peak_bytes(bare, plan) for plan in plans]
    return profile.with_overhead(max([0, *excess]))


def _device_bytes(program_for: ProgramFor, profile: MemoryProfile, device: torch.device, plan: Plan) -> int:
    """Bytes that a plan's step takes of the device: what the allocator reserved at its highest, and the context."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    program = program_for(plan, plan.micro_batch or profile.batch)
    with program.context():
        program.step()
        program.step()
    torch.cuda.synchronize(device)
    free, total = torch.cuda.mem_get_info(device)
    context = total - free - torch.cuda.memory_reserved(device)
    return torch.cuda.max_memory_reserved(device) + max(context, 0)


def _scoring_bytes(profile: MemoryProfile, plan: Plan) -> int:
    """An upper bound of the pass that scores: forward and backward over the scored tensors, as in training.

    A pass in evaluation mode keeps no dropout masks, so it needs less. Sums of gradients over several batches, or the
    copies that are handed out, stand beside the gradients of one.
    """
    if not plan.scored:
        return 0
    scoring = _scoring(profile, plan)
    parts = Assembly(profile, scoring)
    passes = ("pre", "forward", "head", "backward")
    highest = max(moment.peak for moment in moments(profile, scoring) if moment.part in passes)
    return highest - parts.optimiser_bytes + sum(parts.trained_sizes)


def _scoring(profile: MemoryProfile, plan: Plan) -> Plan:
    """A plan that trains what this one scores."""
    head = frozenset(profile.head) if profile.head_trained else frozenset()
    return replace(plan, trainable=plan.scored | head, scored=frozenset())


def _flops(profile: MemoryProfile, plan: Plan) -> int:
    """Floating-point operations of one optimiser step."""
    if profile.plans or plan.attachment is not None:
        return whole_trace(profile, plan).flops
    parts = Assembly(profile, plan)
    once = int(parts.trace.pre.flops[0] + parts.head.flops[0])
    for block in parts.blocks:
        state, ranks = parts.states[block], parts.ranks[block]
        once += int((state.forward.flops + state.backward.flops) @ ranks)
    return once * (profile.batch // parts.micro_batch)
