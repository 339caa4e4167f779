"""One exchange with the clients: tasks go down, checked uploads come up one at a time, all of it is counted."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch

from fedpilot import base_deltas, lora, tensors
from fedpilot.errors import PlanError, UploadError
from fedpilot.screening import Screen
from fedpilot.types import Engine, Failure, ModelSpec, Plan, StepKind, Task, Upload

logger = logging.getLogger(__name__)

Layout: TypeAlias = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Name -> shape and dtype."""


@dataclass(frozen=True)
class UploadRecord:
    """An accepted upload without its tensors; ``metrics`` are the client's own (loss, steps, scores, ...)."""

    client_id: int
    num_examples: int
    bytes_up: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class WholeWeights:
    """Base weights that a plan may train whole: a client has them already, and what comes up is their change.

    Attributes:
        shapes: Name -> (out, in).
        rank: Largest rank at which a change may come as the factors of a base delta; 0 where it must be dense.
    """

    shapes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    rank: int = 0


def whole_weights(spec: ModelSpec, kind: StepKind | None) -> WholeWeights:
    """The weights of all adapted modules; their changes have a rank where the method's step projects gradients."""
    shapes = {base_deltas.weight_name(module): shape for module, shape in spec.modules.items()}
    return WholeWeights(shapes, kind.projection.rank if kind is not None and kind.projection is not None else 0)


class Clock:
    """Seconds by phase; a phase inside another is taken out of the outer one.

    >>> clock = Clock()
    >>> with clock.phase("outer"), clock.phase("inner"):
    ...     pass
    >>> sorted(clock.seconds)
    ['inner', 'outer']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of the ``with`` body to the phase."""
        start, beside = time.perf_counter(), self._inner
        self._inner = 0.0
        try:
            yield
        finally:
            elapsed = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - self._inner
            self._inner = beside + elapsed


def download_bytes(task: Task) -> int:
    """Bytes that travel down: all tensors but those that the client draws itself, and the base's steps it lacks.

    What is not the model's (``Task.extra``) counts like the rest.
    """
    drawn = frozenset[str]() if task.fresh is None else task.fresh.names
    sent = {name: tensor for name, tensor in task.tensors.items() if name not in drawn}
    return tensors.num_bytes(sent) + tensors.num_bytes(task.extra) + base_deltas.num_bytes(task.base_delta)


def check_task(task: Task, whole: WholeWeights = WholeWeights()) -> None:
    """Refuses a task that contradicts its plan.

    Raises:
        PlanError: A trained tensor is not in the task, or a pair is not of the planned rank; or what is sent beside
            the trained tensors has the name of one.
    """
    plan = task.plan
    if twice := sorted(plan.sends.keys() & plan.trainable):
        raise PlanError(
            f"what client {plan.client_id} sends beside its trained tensors must have names of its own, got "
            f"{_some(twice)}; rename it in plan.sends"
        )
    if absent := sorted(plan.trainable - task.tensors.keys() - whole.shapes.keys()):
        raise PlanError(
            f"task of client {plan.client_id} must hold every tensor that its plan trains, lacks {_some(absent)}; "
            "send it in distribute or leave it out of the plan"
        )
    for module, rank in plan.ranks.items():
        for name, axis in ((lora.a_name(module), 0), (lora.b_name(module), 1)):
            if name in task.tensors and task.tensors[name].shape[axis] != rank:
                raise PlanError(
                    f"{name} for client {plan.client_id} must have the planned rank {rank}, "
                    f"got shape {tuple(task.tensors[name].shape)}; truncate or pad it in distribute"
                )


def check_upload(upload: Upload, sent: Layout, whole: WholeWeights = WholeWeights()) -> None:
    """Refuses an upload that is not what its plan asked for.

    A pair that is trained whole may come back at a smaller rank than it was sent, but not below 1, and alike in A and
    B: HetLoRA's clients prune themselves. The change of a base weight may come as a base delta's factors.

    Args:
        upload: What came back.
        sent: Name -> shape and dtype of each trained tensor as it went down, of a trained base weight's change, or of
            what the plan sends beside them.
        whole: Base weights, and the rank that factors of their changes may have.

    Raises:
        UploadError: Names, shapes or dtypes differ, an entry is not finite, or no example stands behind it.
    """
    if upload.num_examples <= 0:
        raise UploadError(f"num_examples must be positive, got {upload.num_examples}; give the client data")
    sent = _with_factors(upload, sent, whole)
    if upload.tensors.keys() != sent.keys():
        raise UploadError(
            f"upload must hold exactly the {len(sent)} tensors of its plan, "
            f"lacks {_some(sorted(sent.keys() - upload.tensors.keys()))}, "
            f"adds {_some(sorted(upload.tensors.keys() - sent.keys()))}; send what plan.trainable and plan.sends name"
        )
    for name, tensor in upload.tensors.items():
        allowed = _allowed_shape(name, upload, sent)
        if tuple(tensor.shape) != allowed:
            raise UploadError(f"{name} must have shape {allowed}, got {tuple(tensor.shape)}; train at the planned rank")
        if tensor.dtype != sent[name][1]:
            raise UploadError(f"{name} must be {sent[name][1]}, got {tensor.dtype}; send tensors as they came")
        if not bool(torch.isfinite(tensor).all()):
            count = int((~torch.isfinite(tensor)).sum())
            raise UploadError(f"{name} must be finite, got {count} entries that are not; lower the learning rate")


def _with_factors(upload: Upload, sent: Layout, whole: WholeWeights) -> Layout:
    """The layout with factors in place of the changes that the upload has as factors."""
    expected = dict(sent)
    for name in sent.keys() & whole.shapes.keys():
        module = name.rpartition(".")[0]
        a, b = base_deltas.a_name(module), base_deltas.b_name(module)
        if whole.rank and a in upload.tensors and name not in upload.tensors:
            (out_features, in_features), dtype = whole.shapes[name], expected.pop(name)[1]
            rank = max(1, min(upload.tensors[a].shape[0] if upload.tensors[a].dim() else 0, whole.rank))
            expected |= {a: ((rank, in_features), dtype), b: ((out_features, rank), dtype)}
    return expected


def _allowed_shape(name: str, upload: Upload, sent: Layout) -> tuple[int, ...]:
    """The shape as sent, at the smaller rank of A where both factors of the pair are trained."""
    shape = sent[name][0]
    module, _, kind = name.rpartition(".")
    a, b = lora.a_name(module), lora.b_name(module)
    if kind not in ("lora_A", "lora_B") or a not in sent or b not in sent or upload.tensors[a].dim() != 2:
        return shape
    rank = upload.tensors[a].shape[0]
    if not 1 <= rank <= sent[a][0][0]:
        return shape
    return (rank, shape[1]) if kind == "lora_A" else (shape[0], rank)


def _some(names: Sequence[str]) -> str:
    """At most three of the names."""
    listed = ", ".join(names[:3]) or "none"
    return f"{listed} and {len(names) - 3} more" if len(names) > 3 else listed


def second_tasks(tasks: Sequence[Task], messages: Sequence[Upload], plans: Mapping[int, Plan]) -> list[Task]:
    """The tasks of a round's second exchange, marked as such.

    Args:
        tasks: What `Exchanges.mid_round` gave.
        messages: Of the first exchange.
        plans: Client -> its plan of the first exchange.

    Raises:
        PlanError: A task is for a client whose message did not come, or out of order; or it needs more memory than was
            planned.
    """
    came, asked = [message.client_id for message in messages], [task.plan.client_id for task in tasks]
    if asked != [client_id for client_id in came if client_id in asked]:
        raise PlanError(
            f"tasks of the second exchange must be for clients whose message came, in their order {came}, got {asked}; "
            "ask each once"
        )
    for plan in (task.plan for task in tasks):
        before = plans[plan.client_id].peak_bytes
        if before is not None and (plan.peak_bytes is None or plan.peak_bytes > before):
            raise PlanError(
                f"second plan of client {plan.client_id} must need no more than the first, {before} bytes, got "
                f"{plan.peak_bytes}; plan for both exchanges at once"
            )
    return [replace(task, exchange=2) for task in tasks]


def _together(message: UploadRecord, upload: UploadRecord) -> UploadRecord:
    """A client's record over both exchanges: bytes and seconds add up, other metrics are the later ones."""
    seconds = {
        name: message.metrics[name] + upload.metrics[name]
        for name in ("seconds", "round_trip_seconds")
        if name in message.metrics and name in upload.metrics
    }
    metrics = {**message.metrics, **upload.metrics, **seconds}
    return replace(upload, bytes_up=message.bytes_up + upload.bytes_up, metrics=metrics)


class RoundResults(Iterator[Upload]):
    """The accepted uploads of one exchange, one after the other.

    Sends tasks as the engine asks for them, counts bytes, keeps failures, turns an upload that is not as planned into
    a failure, and holds no tensors itself but one upload that was looked at ahead.

    Args:
        engine: Carries the tasks.
        round: From 1.
        plans: One for each client, in the order of the sums.
        distribute: Plan -> task; called when the engine asks for the task.
        tell: Called with each result without its tensors.
        clock: Gets the phases ``distribute`` and ``clients``.
        whole: Base weights that plans may train.
        screen: Judges uploads by their size; what it refuses is a failure too.
        public: Metrics of uploads that are recorded; ``None`` for all.
        earlier: The round's first exchange, where this is its second: its bytes and failures count here too.
    """

    def __init__(
        self,
        engine: Engine,
        round: int,
        plans: Sequence[Plan],
        distribute: Callable[[Plan], Task],
        tell: Callable[[UploadRecord | Failure], None],
        clock: Clock,
        whole: WholeWeights = WholeWeights(),
        screen: Screen | None = None,
        public: frozenset[str] | None = None,
        earlier: "RoundResults | None" = None,
    ) -> None:
        self.bytes_down: int = earlier.bytes_down if earlier else 0
        self.bytes_up: int = earlier.bytes_up if earlier else 0
        self.bytes_base: int = earlier.bytes_base if earlier else 0
        self.records: list[UploadRecord] = []
        self.failures: list[Failure] = list(earlier.failures) if earlier else []
        self.arrived: list[tuple[int, Mapping[str, float]]] = []
        self._messages = {record.client_id: record for record in earlier.records} if earlier else {}
        self.facts: dict[str, float] = {}
        self._round, self._distribute, self._tell, self._clock = round, distribute, tell, clock
        self._whole, self._screen, self._public = whole, screen, public
        self._plans = {plan.client_id: plan for plan in plans}
        self._awaited: dict[int, Layout] = {}
        self._ahead: Upload | None = None
        with clock.phase("clients"):
            self._results = engine.exchange(round, map(self._send, plans))  # map keeps no task: one at a time

    def any(self) -> bool:
        """Whether an upload is left; runs clients until one delivers."""
        if self._ahead is None:
            self._ahead = next(self, None)
        return self._ahead is not None

    def __next__(self) -> Upload:
        if self._ahead is not None:
            upload, self._ahead = self._ahead, None
            return upload
        while True:
            with self._clock.phase("clients"):
                result = next(self._results, None)
            if result is None:
                self._close()
                raise StopIteration
            accepted = self._accept(result)
            del result  # a refused upload must not outlive the next client's training
            if accepted is not None:
                return accepted

    def _send(self, plan: Plan) -> Task:
        with self._clock.phase("distribute"):
            task = self._distribute(plan)
            check_task(task, self._whole)
        self.bytes_down += download_bytes(task)
        self.bytes_base += base_deltas.num_bytes(task.base_delta)
        trained = {name: self._layout(name, task) for name in sorted(plan.trainable)}
        beside = {name: (tuple(shape), torch.float32) for name, shape in plan.sends.items()}
        self._awaited[plan.client_id] = trained | beside
        return task

    def _layout(self, name: str, task: Task) -> tuple[tuple[int, ...], torch.dtype]:
        """Of a trained tensor as it goes down, or of a base weight's change as it comes up."""
        if name not in task.tensors:
            return self._whole.shapes[name], torch.float32
        return tuple(task.tensors[name].shape), task.tensors[name].dtype

    def _accept(self, result: Upload | Failure) -> Upload | None:
        """The upload when it is good; otherwise a failure is noted."""
        sent = self._awaited.pop(result.client_id, None)
        if isinstance(result, Failure):
            self._fail(result)
            return None
        self.arrived.append((result.client_id, result.metrics))  # before it is judged: it was seen in any case
        bytes_up = tensors.num_bytes(result.tensors)
        self.bytes_up += bytes_up
        try:
            if sent is None:
                raise UploadError("upload must answer a task, got one that nobody asked for; send it once")
            check_upload(result, sent, self._whole)
            result = self._screened(result)
        except UploadError as error:
            self._fail(Failure(result.client_id, str(error)))
            return None
        metrics = {
            name: value for name, value in result.metrics.items() if self._public is None or name in self._public
        }
        record = UploadRecord(result.client_id, result.num_examples, bytes_up, metrics)
        if message := self._messages.get(result.client_id):
            record = _together(message, record)
        self.records.append(record)
        self._tell(record)
        return result

    def _screened(self, upload: Upload) -> Upload:
        """The upload as the screen lets it through, held against the task that its client had."""
        if self._screen is None:
            return upload
        with self._clock.phase("screen"):
            return self._screen.passed(upload, self._distribute(self._plans[upload.client_id]).tensors)

    def _fail(self, failure: Failure) -> None:
        logger.warning("round %d: client %d failed: %s", self._round, failure.client_id, failure.reason)
        self.failures.append(failure)
        self._tell(failure)

    def _close(self) -> None:
        """Whoever was asked and never answered has failed."""
        for client_id in list(self._awaited):
            del self._awaited[client_id]
            self._fail(Failure(client_id, "no result came back"))


class Ahead(Iterator[Upload]):
    """Uploads of which the next one can be looked at; holds no other."""

    def __init__(self, uploads: Iterator[Upload]) -> None:
        self._uploads = uploads
        self._ahead: Upload | None = None

    def any(self) -> bool:
        """Whether an upload is left."""
        if self._ahead is None:
            self._ahead = next(self._uploads, None)
        return self._ahead is not None

    def __next__(self) -> Upload:
        if self._ahead is not None:
            upload, self._ahead = self._ahead, None
            return upload
        return next(self._uploads)
