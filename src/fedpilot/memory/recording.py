"""Writes down one training step: who was born and who died when, and in which part of the step."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fedpilot.memory.counting import LiveStorages, StepProgram, tensors_in

_aten = torch.ops.aten


class Part(NamedTuple):
    """A part of a step: ``kind`` is pre, forward, head, backward, clip, optimiser or end."""

    kind: str
    micro: int
    block: int = -1


@dataclass
class Storage:
    """Life of one storage in half steps: operator t enters at 2t and its results are counted at 2t + 1."""

    num_bytes: int
    birth: int
    part: Part
    owner: int
    end: int | None = None


@dataclass
class Recording:
    """One step of a program.

    Attributes:
        parts: (num_operators,) the part that each operator belongs to.
        backward: (num_operators,) whether the operator ran within a backward pass.
        storages: All that was alive at some time.
        owners: (num_operators,) in the optimiser's part the index of the tensor that is updated.
        flops: (operator, floating-point operations) of those that have any.
        trained: Bytes of each trained tensor, in the optimiser's order.
        names: Global name of each trained tensor.
        state: Bytes of optimiser state of each trained tensor.
        holds: (micro, block) -> indices of shared storages that the block keeps for its backward pass, see ``shared``.
        outputs: What the last block hands to the head, of each micro-batch.
    """

    parts: list[Part] = field(default_factory=list)
    backward: list[bool] = field(default_factory=list)
    storages: list[Storage] = field(default_factory=list)
    flops: list[tuple[int, int]] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    state: list[int] = field(default_factory=list)
    holds: dict[tuple[int, int], set[int]] = field(default_factory=dict)
    outputs: list[Storage] = field(default_factory=list)

    def shared(self, micro: int) -> list[Storage]:
        """Storages that are made before the first block, outlive its start and end with the backward pass.

        They are masks, positions and embeddings: one storage that the model's frame and any number of blocks hold.
        """
        start = next((2 * t for t, part in enumerate(self.parts) if part == Part("forward", micro, 0)), 0)
        last = max((t for t, part in enumerate(self.parts) if part.micro == micro and part.kind in _PASS), default=0)
        return [
            storage
            for storage in self.storages
            if storage.part == Part("pre", micro) and storage.end is not None and start < storage.end <= 2 * last + 2
        ]


_PASS = ("forward", "head", "backward")


class _EnoughError(Exception):
    """Ends a step of which enough was recorded."""


def record(program: StepProgram, *, warm: bool, passes: int | None = None, second: bool = False) -> Recording:
    """Runs one step and writes it down.

    Args:
        program: What to run.
        warm: Whether the optimiser's state exists, as after a step.
        passes: Forward and backward passes after which to stop; ``None`` for the whole step.
        second: Whether the first pass is of no interest but for what it leaves.
    """
    recorder = _Recorder(program, passes)
    recorder.hold([*program.resident, *program.sums])
    with program.context(), recorder.hooks(), recorder.counting():
        if warm:
            program.make_state()
        recorder.start()
        with (
            torch.autograd.graph.saved_tensors_hooks(recorder.saved, lambda tensor: tensor),
            contextlib.suppress(_EnoughError),
        ):
            (program.past_first if second and program.past_first else program.step)()
    recorder.recording.holds = recorder.holds()
    return recorder.recording


class _Recorder(LiveStorages):  # type: ignore[no-untyped-call]
    """Writes down births, deaths and parts."""

    def __init__(self, program: StepProgram, passes: int | None) -> None:
        super().__init__()
        self._passes = passes
        self._ended = False
        self._blocks = list(program.blocks)
        self._storages: dict[int, Storage] = {}
        self._kept: dict[tuple[int, int], list[Storage]] = {}
        self._params: dict[int, int] = {}
        self._names = {id(tensor): name for name, tensor in program.parameters.items()}
        self._part = Part("pre", 0)
        self._now = 0
        self._owner = -1
        self._backward = False
        self.recording = Recording()

    def start(self) -> None:
        """Begins a new step; what is alive counts as born before it."""
        self._part, self._now, self._owner = Part("pre", 0), -1, -1
        self._kept = {}
        for storage in self._storages.values():
            storage.birth, storage.part = 0, Part("before", 0)
        self.recording = Recording(storages=list(self._storages.values()))

    def holds(self) -> dict[tuple[int, int], set[int]]:
        """Which shared storages each block keeps, by their order of birth."""
        result: dict[tuple[int, int], set[int]] = {}
        for (micro, block), kept in self._kept.items():
            shared = {id(storage): index for index, storage in enumerate(self.recording.shared(micro))}
            result[micro, block] = {shared[id(storage)] for storage in kept if id(storage) in shared}
        return result

    def saved(self, tensor: torch.Tensor) -> torch.Tensor:
        """Pack hook: a block in its forward pass saves the tensor for its backward pass."""
        self._keep(tensor)
        return tensor

    def _keep(self, tensor: torch.Tensor) -> None:
        storage = self._storages.get(tensor.untyped_storage()._cdata)
        if storage is not None and self._part.kind == "forward":
            self._kept.setdefault((self._part.micro, self._part.block), []).append(storage)

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Marks where parts begin."""
        with contextlib.ExitStack() as stack:
            for index, block in enumerate(self._blocks):
                before = block.register_forward_pre_hook(self._enter_block(index), with_kwargs=True)
                after = block.register_forward_hook(self._leave_block(index))
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.callback(register_optimizer_step_pre_hook(self._enter_optimiser).remove)
            stack.callback(register_optimizer_step_post_hook(self._leave_optimiser).remove)
            yield

    def _enter_block(self, index: int) -> Callable[[torch.nn.Module, object, object], None]:
        def enter(module: torch.nn.Module, args: object, kwargs: object) -> None:
            if _in_backward():  # a recomputed block runs its forward pass within its backward pass
                return
            self._leave_backward()
            self._part = Part("forward", self._part.micro, index)
            if getattr(module, "gradient_checkpointing", False) and module.training:
                for tensor in tensors_in([args, kwargs]):  # checkpointing keeps all its inputs
                    self._keep(tensor)

        return enter

    def _leave_block(self, index: int) -> Callable[[torch.nn.Module, object, object], None]:
        def leave(module: torch.nn.Module, args: object, output: object) -> None:
            if _in_backward():
                return
            part = Part("backward", self._part.micro, index)
            for tensor in tensors_in(output):
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: setattr(self, "_part", part))  # type: ignore[no-untyped-call]
                    break
            if index == len(self._blocks) - 1:
                found = (self._storages.get(tensor.untyped_storage()._cdata) for tensor in tensors_in(output))
                self.recording.outputs += [storage for storage in found if storage is not None]
                self._part = Part("head", self._part.micro)

        return leave

    def _leave_backward(self) -> None:
        """After a backward pass comes the next micro-batch, unless the optimiser's hook says otherwise."""
        if self._backward and not _in_backward():
            self._part = Part("pre", self._part.micro + 1)
        self._backward = _in_backward()

    def _enter_optimiser(self, optimiser: Optimizer, args: object, kwargs: object) -> None:
        self._leave_backward()
        parts, clip = self.recording.parts, Part("clip", self._part.micro - 1)
        for index in range(len(parts) - 1, -1, -1):
            if parts[index] != self._part:
                break
            parts[index] = clip
        self._part = Part("optimiser", self._part.micro - 1)
        trained = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
        self._params = {}
        for index, parameter in enumerate(trained):
            state = tensors_in(optimiser.state.get(parameter, {}))
            for tensor in (parameter, parameter.grad, *state):
                self._params[tensor.untyped_storage()._cdata] = index
        self.recording.trained = [p.untyped_storage().nbytes() for p in trained]
        self.recording.names = [self._names.get(id(p), "") for p in trained]

    def _leave_optimiser(self, optimiser: Optimizer, args: object, kwargs: object) -> None:
        trained = [p for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
        self.recording.state = [
            sum(tensor.untyped_storage().nbytes() for tensor in tensors_in(optimiser.state.get(p, {}))) for p in trained
        ]
        self._part = Part("end", self._part.micro)

    def _before(self, args: tuple[object, ...]) -> None:
        self._leave_backward()
        if self._part.micro == self._passes:
            self._ended = True
            raise _EnoughError
        self._now = 2 * len(self.recording.parts)
        if self._part.kind == "optimiser":
            touched = [self._params.get(tensor.untyped_storage()._cdata, -1) for tensor in tensors_in(args)]
            self._owner = max([self._owner, *touched])

    def _after(
        self, func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object], result: object
    ) -> None:
        self.recording.parts.append(self._part)
        self.recording.backward.append(self._backward)
        self.recording.owners.append(self._owner)
        flops = flops_of(func, args, kwargs, result)
        if flops:
            self.recording.flops.append((len(self.recording.parts) - 1, flops))
        self._now = 2 * len(self.recording.parts) - 1

    def _born(self, key: int, num_bytes: int) -> None:
        birth = 2 * len(self.recording.parts) + 1
        storage = Storage(num_bytes, birth, self._part, self._owner)
        self._storages[key] = storage
        self.recording.storages.append(storage)

    def _died(self, key: int) -> None:
        storage = self._storages.pop(key)
        if not self._ended:
            storage.end = self._now + 1


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def flops_of(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object], result: object) -> int:
    """Floating-point operations of one operator, by torch's own formulas."""
    packet = func.overloadpacket
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu:
        query, key, value = (tensor.shape for tensor in list(tensors_in(args))[:3])
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]
    if packet is _aten._scaled_dot_product_flash_attention_for_cpu_backward:
        gradient, query, key, value = (tensor.shape for tensor in list(tensors_in(args))[:4])
        return int(sdpa_backward_flop_count(gradient, query, key, value))  # type: ignore[no-untyped-call]
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=result)) if formula is not None else 0
