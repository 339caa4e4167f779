"""A run on record: rounds into a run directory, and on from where it stopped.

Order within a round: line, checkpoint, adapters. A stop between them costs nothing: the resumed run takes the newest
checkpoint, cuts the lines after it, writes the adapters again and goes on.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, Protocol, runtime_checkable

from torch.utils.tensorboard import SummaryWriter

from fedpilot.record import Kept, RunDirectory, strict
from fedpilot.rounds import Evaluate, Observer, RoundRecord, generator, run_rounds
from fedpilot.stopping import EarlyStop, Goal
from fedpilot.types import Algorithm, ClientProfile, Deployment, Engine, State


@runtime_checkable
class HoldsKept(Protocol):
    """An engine that holds what its clients keep between rounds; one whose clients are elsewhere does not."""

    def snapshot(self) -> Kept:
        """Client -> name -> tensors."""

    def restore(self, kept: Kept) -> None:
        """Puts a snapshot back."""


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

    Raises:
        RecordError: The directory cannot be resumed or written.
        ConfigError: A goal's metric is not among those of the evaluation.
    """
    state, done = _begin(algorithm, engine, evaluate, directory, observer)
    history = directory.history()
    _save_adapters(directory, algorithm.deploy(state), done, history, best)
    stopped = early_stop is not None and early_stop.due(history)
    if stopped or done >= num_rounds:
        return Outcome(state, done, done < num_rounds)
    settings = {"num_rounds": num_rounds, "first_round": done + 1, "seed": directory.seed}
    rounds = run_rounds(
        algorithm, engine, population, evaluate, **settings, cohort_size=cohort_size, state=state, observer=observer
    )
    with _curves(directory, done) as writer:
        for state, record in rounds:
            done = record.round
            directory.append(record)
            _write_curves(writer, record)
            history.append(dict(record.metrics))
            stopped = early_stop is not None and early_stop.due(history)
            if stopped or done == num_rounds or done % checkpoint_every == 0:
                directory.save_checkpoint(done, state, _kept(engine))
            _save_adapters(directory, algorithm.deploy(state), done, history, best)
            if stopped:
                break
    return Outcome(state, done, done < num_rounds)


def _begin(
    algorithm: Algorithm[State],
    engine: Engine,
    evaluate: Evaluate,
    directory: RunDirectory,
    observer: Observer | None,
) -> tuple[State, int]:
    """State and round to go on from: the newest checkpoint, or a fresh start with round 0 on record."""
    state = algorithm.init(generator(directory.seed, 0))
    found = directory.load_checkpoint(state)
    if found is not None:
        directory.rewind(found.round)
        if isinstance(engine, HoldsKept):
            engine.restore(found.kept)
        return found.state, found.round
    directory.rewind(-1)
    record = RoundRecord(round=0, metrics=dict(evaluate(algorithm.deploy(state))))
    directory.append(record)
    directory.save_checkpoint(0, state, _kept(engine))
    if observer is not None:
        observer.round_done(record)
    return state, 0


def _kept(engine: Engine) -> Kept:
    return engine.snapshot() if isinstance(engine, HoldsKept) else {}


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


@contextmanager
def _curves(directory: RunDirectory, done: int) -> Iterator[SummaryWriter]:
    """TensorBoard's writer; events of rounds after the checkpoint are purged."""
    writer = SummaryWriter(str(directory.path / "tensorboard"), purge_step=done + 1)
    try:
        yield writer
    finally:
        writer.close()


def _write_curves(writer: SummaryWriter, record: RoundRecord) -> None:
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
    for name, value in curves.items():
        writer.add_scalar(name, value, record.round)
    writer.flush()
