"""A run on record: rounds into a run directory, and on from where it stopped.

Order within a round: line, checkpoint, adapters. A stop between them costs nothing: the resumed run takes the newest
checkpoint, cuts the lines after it, writes the adapters again and goes on.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, cast, runtime_checkable

from fedpilot import margins, trackers
from fedpilot.record import Kept, RunDirectory, strict
from fedpilot.rounds import (
    Evaluate,
    Explains,
    Observer,
    RoundRecord,
    ServerSite,
    check_clients,
    check_server,
    first_state,
    generator,
    measured,
    run_rounds,
)
from fedpilot.safeguards import NONE, Safeguards
from fedpilot.screening import recalled
from fedpilot.stopping import Cadence, EarlyStop, Goal, Halted
from fedpilot.trackers import Place, TrackerName
from fedpilot.types import Algorithm, ClientProfile, Deployment, Engine, RefinesOnServer, State

EVERY_ROUND = Cadence()


@runtime_checkable
class HoldsKept(Protocol):
    """An engine that holds what its clients keep between rounds; one whose clients are elsewhere does not."""

    def snapshot(self) -> Kept:
        """Client -> name -> tensors."""

    def restore(self, kept: Kept) -> None:
        """Puts a snapshot back."""


@runtime_checkable
class KeepsOutside(Protocol):
    """An engine that may hold what its clients keep outside checkpoints, and has to agree with them."""

    def rewind(self, round: int) -> None:
        """Forgets what clients kept after the round, where that is held outside checkpoints."""

    def committed(self, round: int) -> None:
        """A checkpoint of the round is on the disk."""


@dataclass(frozen=True)
class Outcome(Generic[State]):
    """How a run ended: the last state, its round, and whether that was before the planned last one."""

    state: State
    round: int
    stopped_early: bool


def train(
    algorithm: Algorithm[State],
    engine: Engine,
    population: Sequence[ClientProfile],
    evaluate: Evaluate,
    directory: RunDirectory,
    *,
    num_rounds: int,
    cohort_size: int | None = None,
    best: Goal | None = None,
    early_stop: EarlyStop | None = None,
    checkpoint_every: int = 1,
    observer: Observer | None = None,
    cadence: Cadence = EVERY_ROUND,
    measure_aggregation: bool = False,
    safeguards: Safeguards = NONE,
    server: ServerSite | None = None,
    tracked_by: Sequence[TrackerName] = ("tensorboard",),
    halt: Callable[[], bool] = lambda: False,
) -> Outcome[State]:
    """Runs the rounds that the directory does not hold yet, and records them.

    A fresh directory starts with round 0, the evaluation before any training; a directory with rounds goes on after its
    newest checkpoint, to the bit as if it had never stopped.

    Args:
        algorithm: The method.
        engine: Carries tasks; one that is `HoldsKept` has its clients' tensors in the checkpoints.
        population: All clients.
        evaluate: Metrics of a deployment.
        directory: Made with `RunDirectory.create` or `RunDirectory.open`; its manifest has the seed.
        num_rounds: The last round.
        cohort_size: Clients sampled each round; ``None`` for all.
        best: What ``adapters/best`` is best at; ``None`` for no such adapter.
        early_stop: When to end before ``num_rounds``.
        checkpoint_every: Rounds between checkpoints; the last round always has one.
        observer: Watches.
        cadence: Which rounds are evaluated.
        measure_aggregation: Whether to record each round's ``aggregation_error``.
        safeguards: Screening, a robust rule, privacy of clients, whose budget may end the run early.
        server: The server's site in a round, for methods that train there.
        tracked_by: Where the curves go besides the record.
        halt: Whether to end after the round, although the run is not over.

    Raises:
        Halted: The run was asked to end; all rounds so far can be gone on from.
        RecordError: The directory cannot be resumed or written.
        ConfigError: A goal's metric is not among those of the evaluation.
        PlanError: A safeguard cannot serve the method, or allows no round; or the method lacks a server's site, or
            cannot serve a client of the population, sampled or not.
    """
    safeguards.check(algorithm)
    check_server(algorithm, server)
    planned, num_rounds = num_rounds, safeguards.last_round(num_rounds, population, cohort_size)
    state, done = _begin(algorithm, engine, population, evaluate, directory, observer, server)
    history = directory.history()
    _save_adapters(directory, algorithm.deploy(state), done, history, best)
    stopped = early_stop is not None and early_stop.due(history)
    if stopped or done >= num_rounds:
        return Outcome(state, done, done < planned)
    rounds = run_rounds(
        algorithm,
        engine,
        population,
        evaluate,
        num_rounds=num_rounds,
        first_round=done + 1,
        seed=directory.seed,
        cohort_size=cohort_size,
        state=state,
        observer=observer,
        evaluated=lambda round: cadence.due(round, num_rounds),
        measure_aggregation=measure_aggregation,
        safeguards=safeguards,
        norms=recalled(directory.lines()) if safeguards.screening.on else (),
        known=margins.recalled(directory.lines()),
        server=server,
    )
    with trackers.opened(tracked_by, _place(directory, done)) as write:
        if done == 0:
            write(0, {f"evaluation/{name}": value for name, value in history[0].items()})
        for state, record in rounds:
            done = record.round
            directory.append(record)
            write(done, _curves(record))
            history.append(dict(record.metrics))
            stopped = early_stop is not None and early_stop.due(history)
            halted = not stopped and done < num_rounds and halt()
            if stopped or halted or done == num_rounds or done % checkpoint_every == 0:
                _save_checkpoint(directory, done, state, engine)
            _save_adapters(directory, algorithm.deploy(state), done, history, best)
            if stopped:
                break
            if halted:
                raise Halted
    return Outcome(state, done, done < planned)


def _begin(
    algorithm: Algorithm[State],
    engine: Engine,
    population: Sequence[ClientProfile],
    evaluate: Evaluate,
    directory: RunDirectory,
    observer: Observer | None,
    server: ServerSite | None,
) -> tuple[State, int]:
    """State and round to go on from: the newest checkpoint, or a fresh start with round 0 on record."""
    state = algorithm.init(generator(directory.seed, 0))
    found = directory.load_checkpoint(state)
    if found is not None:
        directory.rewind(found.round)
        if isinstance(engine, HoldsKept):
            engine.restore(found.kept)
        if isinstance(engine, KeepsOutside):
            engine.rewind(found.round)
        return found.state, found.round
    directory.rewind(-1)
    record = RoundRecord(round=0)
    if isinstance(algorithm, RefinesOnServer):  # round 0 then has what the preparation took and came to
        start = time.perf_counter()
        state = first_state(algorithm, directory.seed, server)
        facts = algorithm.explain(state) if isinstance(algorithm, Explains) else {}
        took = time.perf_counter() - start
        record = replace(record, facts=dict(facts), seconds={"refine": took, "total": took})
    check_clients(algorithm, state, population, directory.seed)
    record = replace(record, metrics=measured(algorithm, state, evaluate))
    directory.append(record)
    if isinstance(engine, KeepsOutside):
        engine.rewind(0)
    _save_checkpoint(directory, 0, state, engine)
    if observer is not None:
        observer.round_done(record)
    return state, 0


def _save_checkpoint(directory: RunDirectory, round: int, state: object, engine: Engine) -> None:
    directory.save_checkpoint(round, state, engine.snapshot() if isinstance(engine, HoldsKept) else {})
    if isinstance(engine, KeepsOutside):
        engine.committed(round)


def _save_adapters(
    directory: RunDirectory,
    deployment: Deployment,
    round: int,
    history: Sequence[Mapping[str, float]],
    best: Goal | None,
) -> None:
    facts: dict[str, object] = {"round": round, "metrics": strict(history[-1])}
    directory.save_adapter("last", deployment, facts)
    if best is not None and best.best(history) == len(history) - 1:
        directory.save_adapter("best", deployment, facts)


def _place(directory: RunDirectory, done: int) -> Place:
    known = directory.manifest
    return Place(directory.path, str(known["run_id"]), cast(Mapping[str, object], known["config"]), done)


def _curves(record: RoundRecord) -> dict[str, float]:
    """Name -> value of the round's curves."""
    examples = sum(upload.num_examples for upload in record.uploads if "loss" in upload.metrics)
    losses = [upload.num_examples * upload.metrics["loss"] for upload in record.uploads if "loss" in upload.metrics]
    curves = {f"evaluation/{name}": value for name, value in record.metrics.items()}
    curves |= {f"algorithm/{name}": value for name, value in record.facts.items()}
    curves |= {f"seconds/{name}": value for name, value in record.seconds.items()}
    curves |= {"bytes/down": record.bytes_down, "bytes/up": record.bytes_up}
    curves |= {"clients/uploads": len(record.uploads), "clients/failures": len(record.failures)}
    curves |= {"clients/left_out": len(record.left_out)}
    if examples:
        curves["training/loss"] = sum(losses) / examples
    return curves
