"""The outer loop: the one file that orders the steps of a round.

Randomness has no state: the generator of a step is made of the seed, the round and the step's number, so a resumed
run draws what the uninterrupted one would have drawn.
"""

import difflib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch

from fedpilot import lora, tensors
from fedpilot.errors import ConfigError, PlanError, UploadError
from fedpilot.types import (
    Algorithm,
    ClientProfile,
    Deployment,
    Engine,
    Failure,
    LeftOut,
    ModelSpec,
    Plan,
    State,
    State_contra,
    Task,
    Upload,
)

logger = logging.getLogger(__name__)

Evaluate: TypeAlias = Callable[[Deployment], Mapping[str, float]]
Layout: TypeAlias = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

SAMPLING, PLANNING = 0, 1  # numbers of a round's random steps


def generator(seed: int, *step: int) -> np.random.Generator:
    """The generator of one step: ``(seed, 0)`` for the first state, ``(seed, round, SAMPLING)`` and so on after."""
    return np.random.default_rng([seed, *step])


# --- what is recorded ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanRecord:
    """A plan in short: blocks instead of modules.

    Attributes:
        client_id: The client.
        budget_bytes: Its memory.
        trained: Blocks with at least one trained tensor, ascending.
        ranks: Block -> rank of its pairs; module -> rank where the block's modules differ.
        blocks: Blocks loaded; ``None`` means all.
        checkpointed: Blocks recomputed in the backward pass.
        micro_batch: Examples per forward pass; ``None`` means the whole batch.
        values: Block -> the value that the allocation maximised.
        peak_bytes: Predicted peak.
        seconds: Predicted seconds.
    """

    client_id: int
    budget_bytes: int
    trained: tuple[int, ...]
    ranks: Mapping[int, int | Mapping[str, int]]
    blocks: tuple[int, ...] | None = None
    checkpointed: tuple[int, ...] = ()
    micro_batch: int | None = None
    values: Mapping[int, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class UploadRecord:
    """An accepted upload without its tensors; ``metrics`` are the client's own (loss, steps, scores, ...)."""

    client_id: int
    num_examples: int
    bytes_up: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RoundRecord:
    """A round without its tensors; round 0 is the evaluation before any training.

    Attributes:
        round: From 1.
        plans: One for each client that was asked.
        left_out: Sampled clients for which nothing fits.
        uploads: What came back and was accepted.
        failures: Clients that were asked and did not deliver, or delivered something else.
        aggregated: Whether the state changed: false when nobody delivered.
        bytes_down: Sent to clients, tensors only.
        bytes_up: Received from clients, tensors only, refused uploads included.
        metrics: Of the evaluation.
        facts: What the algorithm says of its new state; see `Explains`.
        seconds: Phase -> seconds; phases do not overlap, ``total`` is the whole round.
    """

    round: int
    plans: tuple[PlanRecord, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    uploads: tuple[UploadRecord, ...] = ()
    failures: tuple[Failure, ...] = ()
    aggregated: bool = False
    bytes_down: int = 0
    bytes_up: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Explains(Protocol[State_contra]):
    """An algorithm with numbers of its own to record each round (Fed-piLot's global scores)."""

    def explain(self, state: State_contra) -> Mapping[str, float]:
        """Name -> number, read off the state after aggregation."""


class Observer(Protocol):
    """Watches a run, for a live display; changes nothing."""

    def round_started(self, round: int, plans: Sequence[Plan], left_out: Sequence[LeftOut]) -> None:
        """The round is planned; nothing is sent yet."""

    def client_done(self, round: int, result: UploadRecord | Failure) -> None:
        """A client's result is in; ``result.metrics["loss"]`` is its mean training loss."""

    def round_done(self, record: RoundRecord) -> None:
        """The round is evaluated."""


class Unwatched:
    """The observer that looks away."""

    def round_started(self, round: int, plans: Sequence[Plan], left_out: Sequence[LeftOut]) -> None:
        """Nothing."""

    def client_done(self, round: int, result: UploadRecord | Failure) -> None:
        """Nothing."""

    def round_done(self, record: RoundRecord) -> None:
        """Nothing."""


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


def plan_record(plan: Plan, client: ClientProfile, spec: ModelSpec) -> PlanRecord:
    """The plan in short."""
    by_block: dict[int, dict[str, int]] = {}
    for module, rank in plan.ranks.items():
        by_block.setdefault(spec.block_of[module], {})[module] = int(rank)
    trained_modules = {name.rpartition(".")[0] for name in plan.trainable}
    return PlanRecord(
        client_id=plan.client_id,
        budget_bytes=int(client.memory_bytes),
        trained=tuple(sorted({spec.block_of[module] for module in trained_modules if module in spec.block_of})),
        ranks={
            block: next(iter(ranks.values())) if len(set(ranks.values())) == 1 else ranks
            for block, ranks in sorted(by_block.items())
        },
        blocks=plan.blocks,
        checkpointed=tuple(sorted(plan.checkpointed)),
        micro_batch=plan.micro_batch,
        values={block: float(value) for block, value in plan.values.items()},
        peak_bytes=plan.peak_bytes,
        seconds=plan.seconds,
    )


# --- when to stop, and which round was best -----------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A metric of the evaluation and the direction that is better.

    >>> Goal("accuracy").best([{"accuracy": 0.5}, {"accuracy": 0.75}, {"accuracy": 0.75}])
    1
    """

    metric: str
    higher_is_better: bool = True

    def value(self, metrics: Mapping[str, float]) -> float:
        """The metric.

        Raises:
            ConfigError: The evaluation does not give it.
        """
        if self.metric in metrics:
            return metrics[self.metric]
        near = difflib.get_close_matches(self.metric, list(metrics), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of these"
        raise ConfigError([f"metric must be one of {', '.join(sorted(metrics))}, got {self.metric!r}; {hint}"])

    def best(self, history: Sequence[Mapping[str, float]], min_delta: float = 0.0) -> int | None:
        """Index of the best entry; a later one must be better by more than ``min_delta``. NaN is never better."""
        sign = 1.0 if self.higher_is_better else -1.0
        best: int | None = None
        highest = -math.inf
        for index, metrics in enumerate(history):
            value = sign * self.value(metrics)
            if math.isfinite(value) and (best is None or value - highest > min_delta):
                best, highest = index, value
        return best


@dataclass(frozen=True)
class EarlyStop:
    """Stops after ``patience`` rounds without a gain of more than ``min_delta``.

    Everything follows from the recorded metrics, so a resumed run stops where the uninterrupted one would have.
    """

    goal: Goal
    patience: int
    min_delta: float = 0.0

    def due(self, history: Sequence[Mapping[str, float]]) -> bool:
        """Whether the last of these rounds, in order, is the last."""
        best = self.goal.best(history, self.min_delta)
        return len(history) - 1 - (-1 if best is None else best) >= self.patience


# --- one exchange -------------------------------------------------------------------------------------------------


def check_task(task: Task) -> None:
    """Refuses a task that contradicts its plan.

    Raises:
        PlanError: A trained tensor is not in the task, or a pair is not of the planned rank.
    """
    plan = task.plan
    if absent := sorted(plan.trainable - task.tensors.keys()):
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


def check_upload(upload: Upload, sent: Layout) -> None:
    """Refuses an upload that is not what its plan asked for.

    A pair that is trained whole may come back at a smaller rank than it was sent, but not below 1, and alike in A and
    B: HetLoRA's clients prune themselves.

    Args:
        upload: What came back.
        sent: Name -> shape and dtype of each trained tensor as it went down.

    Raises:
        UploadError: Names, shapes or dtypes differ, an entry is not finite, or no example stands behind it.
    """
    if upload.num_examples <= 0:
        raise UploadError(f"num_examples must be positive, got {upload.num_examples}; give the client data")
    if upload.tensors.keys() != sent.keys():
        raise UploadError(
            f"upload must hold exactly the {len(sent)} tensors of its plan, "
            f"lacks {_some(sorted(sent.keys() - upload.tensors.keys()))}, "
            f"adds {_some(sorted(upload.tensors.keys() - sent.keys()))}; send what plan.trainable names"
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


class RoundResults(Iterator[Upload]):
    """The accepted uploads of one exchange, one after the other.

    Sends tasks as the engine asks for them, counts bytes, keeps failures, turns an upload that is not as planned into
    a failure, and holds no tensors itself but one upload that was looked at ahead.
    """

    def __init__(
        self,
        engine: Engine,
        round: int,
        plans: Sequence[Plan],
        distribute: Callable[[Plan], Task],
        observer: Observer,
        clock: Clock,
    ) -> None:
        self.bytes_down = 0
        self.bytes_up = 0
        self.records: list[UploadRecord] = []
        self.failures: list[Failure] = []
        self._round, self._distribute, self._observer, self._clock = round, distribute, observer, clock
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
            if accepted is not None:
                return accepted

    def _send(self, plan: Plan) -> Task:
        with self._clock.phase("distribute"):
            task = self._distribute(plan)
            check_task(task)
        self.bytes_down += tensors.num_bytes(task.tensors) + tensors.num_bytes(task.base_delta)
        trained = {name: task.tensors[name] for name in sorted(plan.trainable)}
        self._awaited[plan.client_id] = {name: (tuple(t.shape), t.dtype) for name, t in trained.items()}
        return task

    def _accept(self, result: Upload | Failure) -> Upload | None:
        """The upload when it is good; otherwise a failure is noted."""
        sent = self._awaited.pop(result.client_id, None)
        if isinstance(result, Failure):
            self._fail(result)
            return None
        bytes_up = tensors.num_bytes(result.tensors)
        self.bytes_up += bytes_up
        try:
            if sent is None:
                raise UploadError("upload must answer a task, got one that nobody asked for; send it once")
            check_upload(result, sent)
        except UploadError as error:
            self._fail(Failure(result.client_id, str(error)))
            return None
        record = UploadRecord(result.client_id, result.num_examples, bytes_up, dict(result.metrics))
        self.records.append(record)
        self._observer.client_done(self._round, record)
        return result

    def _fail(self, failure: Failure) -> None:
        logger.warning("round %d: client %d failed: %s", self._round, failure.client_id, failure.reason)
        self.failures.append(failure)
        self._observer.client_done(self._round, failure)

    def _close(self) -> None:
        """Whoever was asked and never answered has failed."""
        for client_id in list(self._awaited):
            del self._awaited[client_id]
            self._fail(Failure(client_id, "no result came back"))


# --- the loop -----------------------------------------------------------------------------------------------------


def run_rounds(
    algorithm: Algorithm[State],
    engine: Engine,
    population: Sequence[ClientProfile],
    evaluate: Evaluate,
    *,
    num_rounds: int,
    seed: int,
    cohort_size: int | None = None,
    first_round: int = 1,
    state: State | None = None,
    observer: Observer | None = None,
) -> Iterator[tuple[State, RoundRecord]]:
    """Yields the state and the record after each round.

    Args:
        algorithm: The method.
        engine: Carries tasks to clients.
        population: All clients, ids distinct.
        evaluate: Metrics of a deployment.
        num_rounds: The last round.
        seed: Of everything that the server draws.
        cohort_size: Clients sampled each round; ``None`` for all.
        first_round: Where a resumed run goes on.
        state: State after round ``first_round - 1``; ``None`` for the algorithm's first.
        observer: Watches.

    Raises:
        ConfigError: The population or the cohort size cannot be used.
        PlanError: A plan exceeds its client's budget, or contradicts its task.
    """
    _check_population(population, cohort_size)
    if state is None:
        state = algorithm.init(generator(seed, 0))
    watched = observer or Unwatched()
    for round in range(first_round, num_rounds + 1):
        cohort = sample(population, cohort_size, generator(seed, round, SAMPLING))
        state, record = run_round(algorithm, engine, cohort, evaluate, state, round=round, seed=seed, observer=watched)
        logger.info("round %d/%d: %s", round, num_rounds, summary(record))
        yield state, record


def run_round(
    algorithm: Algorithm[State],
    engine: Engine,
    cohort: Sequence[ClientProfile],
    evaluate: Evaluate,
    state: State,
    *,
    round: int,
    seed: int,
    observer: Observer,
) -> tuple[State, RoundRecord]:
    """One round: plan, distribute, local update, upload, aggregate, evaluate, record."""
    clock, start = Clock(), time.perf_counter()
    with clock.phase("plan"):
        entries = algorithm.plan(state, cohort, generator(seed, round, PLANNING))
        check_plans(entries, cohort)
    plans = [entry for entry in entries if isinstance(entry, Plan)]
    left_out = tuple(entry for entry in entries if isinstance(entry, LeftOut))
    observer.round_started(round, plans, left_out)

    results = RoundResults(engine, round, plans, partial(algorithm.distribute, state), observer, clock)
    aggregated = results.any()
    if aggregated:  # a round in which nobody delivers leaves the state as it is
        with clock.phase("aggregate"):
            state = algorithm.aggregate(state, results)
            _check_read(results, algorithm)

    with clock.phase("evaluate"):
        metrics = dict(evaluate(algorithm.deploy(state)))
    profiles = {client.client_id: client for client in cohort}
    record = RoundRecord(
        round=round,
        plans=tuple(plan_record(plan, profiles[plan.client_id], algorithm.spec) for plan in plans),
        left_out=left_out,
        uploads=tuple(results.records),
        failures=tuple(results.failures),
        aggregated=aggregated,
        bytes_down=results.bytes_down,
        bytes_up=results.bytes_up,
        metrics=metrics,
        facts=dict(algorithm.explain(state)) if isinstance(algorithm, Explains) else {},
        seconds={**clock.seconds, "total": time.perf_counter() - start},
    )
    observer.round_done(record)
    return state, record


def sample(
    population: Sequence[ClientProfile], cohort_size: int | None, rng: np.random.Generator
) -> Sequence[ClientProfile]:
    """The round's clients, without replacement, in the population's order."""
    if cohort_size is None or cohort_size == len(population):
        return population
    return [population[index] for index in sorted(rng.choice(len(population), cohort_size, replace=False))]


def check_plans(entries: Sequence[Plan | LeftOut], cohort: Sequence[ClientProfile]) -> None:
    """Refuses plans that are not the cohort's or do not fit; nothing that does not fit is sent.

    Raises:
        PlanError: As said.
    """
    asked, planned = [client.client_id for client in cohort], [entry.client_id for entry in entries]
    if asked != planned:
        raise PlanError(f"plans must be the cohort's, in its order {asked}, got {planned}; plan each client once")
    for entry, client in zip(entries, cohort, strict=True):
        if isinstance(entry, Plan) and entry.peak_bytes is not None and entry.peak_bytes > client.memory_bytes:
            raise PlanError(
                f"plan of client {client.client_id} must fit its budget of {client.memory_bytes} bytes, "
                f"got a predicted peak of {entry.peak_bytes} bytes; train less or leave the client out"
            )


def summary(record: RoundRecord) -> str:
    """The round in a line, for logs."""
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in record.metrics.items() if "/" not in name)
    return (
        f"{len(record.uploads)} uploads, {len(record.failures)} failures, {len(record.left_out)} left out, "
        f"{record.bytes_down} bytes down, {record.bytes_up} up, {record.seconds['total']:.1f} s; {metrics}"
    )


def _check_population(population: Sequence[ClientProfile], cohort_size: int | None) -> None:
    ids = [client.client_id for client in population]
    problems = []
    if not ids or len(set(ids)) != len(ids):
        problems.append(f"population must be clients with distinct ids, got {ids}; number them apart")
    if cohort_size is not None and not 1 <= cohort_size <= max(len(ids), 1):
        problems.append(f"cohort_size must lie in 1..{len(ids)}, got {cohort_size}; leave it out for all clients")
    if problems:
        raise ConfigError(problems)


def _check_read(results: RoundResults, algorithm: object) -> None:
    if results.any():
        raise PlanError(
            f"{type(algorithm).__name__}.aggregate must read every upload, got to {len(results.records)} and stopped; "
            "loop to the end"
        )
