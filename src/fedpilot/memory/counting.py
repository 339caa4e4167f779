"""Counts the live bytes of a training step: to the byte, on real tensors or on fake ones that need no memory.

A dispatch mode sees every tensor that an operator returns, counts its storage once and forgets it when the storage
dies.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(frozen=True)
class StepProgram:
    """One training step that can be run and counted.

    Attributes:
        resident: Everything alive before the step: weights and buffers of the loaded blocks, adapters, head, batch.
        blocks: The loaded transformer blocks in order of execution, each called once in a forward pass.
        parameters: Global name -> live tensor of all that the plan holds: pairs in the order of ``ModelSpec.modules``,
            A before B, then the head. The optimiser has its tensors in this order.
        step: One whole optimiser step over all micro-batches; can be called twice.
        batch: The tensors of ``resident`` that are the batch; only reports need it.
        sums: One tensor as large as each trained one that stands through the step beside ``resident``, where gradients
            are kept by example.
        context: What the step must run in; a ``FakeTensorMode`` for fake tensors.
        warm: Leaves what a first step leaves, the optimiser's state, without a pass; ``None`` where only a step can.
        past_first: ``step`` without the first pass, in place of which stands what it leaves; ``None`` as above.
    """

    resident: Sequence[torch.Tensor]
    blocks: Sequence[torch.nn.Module]
    parameters: Mapping[str, torch.Tensor]
    step: Callable[[], None]
    batch: Sequence[torch.Tensor] = ()
    sums: Sequence[torch.Tensor] = ()
    context: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    warm: Callable[[], None] | None = None
    past_first: Callable[[], None] | None = None

    def make_state(self) -> None:
        """Runs what leaves the optimiser's state as a step does: `warm`, or a step."""
        (self.warm or self.step)()


def measure_peak(program: StepProgram, *, shortened: bool = False) -> int:
    """Highest live bytes over two steps; in the second the optimiser's state stands.

    Args:
        program: What to run.
        shortened: Whether making that state may stand for the first step.
    """
    counter = LiveStorages()
    counter.hold([*program.resident, *program.sums])
    with program.context(), counter.counting():
        (program.make_state if shortened else program.step)()
        program.step()
    return counter.peak


_DEVICE = torch.ops.prim.device.default


class LiveStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts live storages, each once, from its first sight until it dies.

    Attributes:
        live: Bytes alive now.
        peak: Highest ``live`` after an operator.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._references: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    def hold(self, tensors: Sequence[torch.Tensor]) -> None:
        """Counts tensors that are alive already."""
        for tensor in tensors:
            self._see(tensor)
        self.peak = max(self.peak, self.live)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else every call is guarded against a compiler that is not there, at a cost

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Counts what runs inside, the states that ``torch.utils.checkpoint`` takes of the generator included."""
        real = torch.random.get_rng_state

        def counted() -> torch.Tensor:
            # The generator allocates past the dispatcher, so that the mode alone would miss it.
            state = real()
            self._see(state)
            return state

        with mock.patch("torch.get_rng_state", counted), mock.patch("torch.random.get_rng_state", counted), self:
            yield

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        if func is _DEVICE and isinstance(args[0], FakeTensor):  # asked more often than operators run
            return args[0].fake_device
        if func.namespace in ("prim", "profiler"):  # questions and marks, not computation
            return func(*args, **(kwargs or {}))
        if func is torch.ops.aten._local_scalar_dense.default and _has_no_value(args[0]):
            return _costlier_answer(next(tensors_in(args)).dtype)
        self._before(args)
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            self._see(tensor)
        self.peak = max(self.peak, self.live)
        self._after(func, args, kwargs or {}, result)
        return result

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self._references or num_bytes == 0:
            return
        self._references[key] = (num_bytes, weakref.ref(storage, lambda _: self._forget(key)))
        self.live += num_bytes
        self._born(key, num_bytes)

    def _forget(self, key: int) -> None:
        num_bytes, _ = self._references.pop(key)
        self.live -= num_bytes
        self._died(key)

    def _before(self, args: tuple[object, ...]) -> None:
        """Called before an operator runs."""

    def _after(
        self, func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: dict[str, object], result: object
    ) -> None:
        """Called after an operator ran and its results are counted."""

    def _born(self, key: int, num_bytes: int) -> None:
        """Called when a storage is first seen."""

    def _died(self, key: int) -> None:
        """Called when a storage is gone."""


def _has_no_value(tensor: object) -> bool:
    return isinstance(tensor, FakeTensor) or (isinstance(tensor, torch.Tensor) and tensor.is_meta)


def _costlier_answer(dtype: torch.dtype) -> float | int | bool:
    """What ``.item()`` says of a fake tensor.

    False makes attention build and keep its mask ("is the mask all ones?"); 1 is finite and divides safely.
    """
    if dtype == torch.bool:
        return False
    return 1.0 if dtype.is_floating_point else 1


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """All tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
