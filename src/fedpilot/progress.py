"""What a terminal shows while a run goes on."""

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, cast

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from fedpilot.compare.study import Member
from fedpilot.display import clock, counted, size, why
from fedpilot.exchange import UploadRecord
from fedpilot.rounds import RoundRecord
from fedpilot.types import Failure, LeftOut, Plan


@dataclass
class Watcher:
    """Shows a run: a line for each round, and below them, on a terminal, how far the current one is.

    Attributes:
        console: Where to.
        title: The method.
        num_rounds: The last round.
        names: Client -> its name.
        metric: The metric of the live line.
        said: Who was said to sit out of which method's run; shared by the parts of one run.
    """

    console: Console
    title: str
    num_rounds: int
    names: Sequence[str]
    metric: str
    said: set[tuple[str, int]] = field(default_factory=set)
    _progress: Progress = field(init=False)
    _losses: list[float] = field(init=False, default_factory=list)
    _seconds: list[float] = field(init=False, default_factory=list)
    _bytes: int = field(init=False, default=0)
    _value: str = field(init=False, default="")
    _started: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        text = "{task.fields[title]}  round {task.fields[round]}/{task.fields[last]}"
        rest = "{task.fields[facts]}"
        self._progress = Progress(
            TextColumn(text), BarColumn(24), TextColumn(rest), console=self.console, transient=True,
            disable=not self.console.is_terminal,
        )  # fmt: skip
        self._task = self._progress.add_task(
            "", total=1.0, title=self.title, round=0, last=self.num_rounds, facts="getting ready"
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def round_started(self, round: int, plans: Sequence[Plan], left_out: Sequence[LeftOut]) -> None:
        """Names clients that sit out for the first time."""
        self._losses, self._started = [], time.perf_counter()
        self._progress.update(self._task, round=round, completed=0, total=max(len(plans), 1), facts="planned")
        for client in left_out:
            if (self.title, client.client_id) not in self.said:
                self.said.add((self.title, client.client_id))
                self.console.print(f"  {self.names[client.client_id]} sits out: {why(client)}")

    def client_done(self, round: int, result: UploadRecord | Failure) -> None:
        """Moves the bar; says why a client failed."""
        if isinstance(result, Failure):
            self.console.print(f"  {self.names[result.client_id]} failed: {result.reason}", style="yellow")
        else:
            self._losses.append(result.metrics.get("loss", 0.0))
            self._bytes += result.bytes_up
        self._progress.advance(self._task)
        done, planned = self._progress.tasks[0].completed, self._progress.tasks[0].total
        loss = f"loss {_mean(self._losses):.3f}  " if self._losses else ""
        so_far = f"clients {done:.0f}/{planned:.0f}  {loss}{self._value}up {size(self._bytes)}"
        self._progress.update(self._task, facts=f"{so_far}  left {self._left(done, planned)}")

    def round_done(self, record: RoundRecord) -> None:
        """Prints the round's line."""
        seconds = record.seconds.get("total", 0.0)
        if record.round:
            self._seconds.append(seconds)
        losses = [upload.metrics["loss"] for upload in record.uploads if "loss" in upload.metrics]
        value = record.metrics.get(self.metric)
        if value is not None:
            self._value = f"{self.metric} {value:.4f}  "
        parts = [
            f"{self.title}  round {record.round:>{len(str(self.num_rounds))}}/{self.num_rounds}",
            counted(len(record.uploads), "client") if record.round else "",
            f"{len(record.failures)} failed" if record.failures else "",
            f"loss {_mean(losses):.3f}" if losses else "" if record.round else "before training",
            f"{self.metric} {value:.4f}" if value is not None else "",
            f"epsilon {record.facts['epsilon']:.3g}" if "epsilon" in record.facts else "",
            f"down {size(record.bytes_down)}  up {size(record.bytes_up)}" if record.round else "",
            clock(seconds) if record.round else "",
            f"left {clock(_mean(self._seconds) * (self.num_rounds - record.round))}" if self._seconds else "",
        ]
        self.console.print("  ".join(part for part in parts if part))

    def _left(self, done: float, planned: float | None) -> str:
        elapsed = time.perf_counter() - self._started
        rounds_left = self.num_rounds - self._progress.tasks[0].fields["round"]
        share = done / (planned or 1)
        whole = _mean(self._seconds) if self._seconds else elapsed / max(share, 1e-9)
        return clock(whole * rounds_left + max(whole - elapsed, 0.0))


@dataclass
class Runs:
    """Shows runs in other processes: a line for each evaluation, and on a terminal a row for each run at work.

    Attributes:
        console: Where to.
        metric: The metric of the lines.
        total: Runs to be done.
    """

    console: Console
    metric: str
    total: int
    _lines: dict[str, list[Mapping[str, object]]] = field(init=False, default_factory=dict)
    _rounds: dict[str, int] = field(init=False, default_factory=dict)
    _begun: dict[str, float] = field(init=False, default_factory=dict)
    _ended: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._live = Live(console=self.console, transient=True, auto_refresh=False)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def started(self, member: Member) -> None:
        """A row more."""
        self._lines[member.label] = []
        self._rounds[member.label] = member.recipe.run.rounds
        self._begun[member.label] = time.perf_counter()

    def round_done(self, member: Member, line: Mapping[str, object]) -> None:
        """Prints evaluations; those of before a stop are only counted."""
        known = self._lines[member.label]
        known.append(line)
        resumed = time.perf_counter() - self._begun[member.label] < sum(map(_seconds_of, known))
        if not resumed and self.metric in cast(Mapping[str, object], line["metrics"]):
            self.console.print("  ".join(part for part in (member.label, *self._facts(member.label)) if part))

    def ended(self, member: Member, problem: str | None) -> None:
        """A row less; a problem is said."""
        self._ended += 1
        took = clock(time.perf_counter() - self._begun.pop(member.label))
        done = f"({self._ended} of {self.total} runs)"
        if problem is None:
            self.console.print(f"{member.label}  done in {took} {done}")
        else:
            self.console.print(f"{member.label}  failed after {took} {done}: {problem}", style="red", markup=False)

    def tick(self) -> None:
        """Draws the rows anew."""
        if self.console.is_terminal:
            table = Table.grid(padding=(0, 2))
            for label in self._begun:
                table.add_row(label, *self._facts(label))
            self._live.update(table, refresh=True)

    def _facts(self, label: str) -> tuple[str, str, str]:
        """Round, metric and time left of a run."""
        lines, rounds = self._lines[label], self._rounds[label]
        if not lines:
            return "getting ready", "", ""
        at = cast(int, lines[-1]["round"])
        values = [value for line in lines if (value := cast(Mapping[str, object], line["metrics"]).get(self.metric))]
        value = f"{self.metric} {values[-1]:.4f}" if values else ""
        seconds = [_seconds_of(line) for line in lines if line["round"] != 0]
        left = f"left {clock(_mean(seconds) * (rounds - at))}" if seconds else ""
        return f"round {at:>{len(str(rounds))}}/{rounds}", value, left


def _seconds_of(line: Mapping[str, object]) -> float:
    return cast(Mapping[str, float], line["seconds"]).get("total", 0.0)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def working(console: Console, what: str) -> AbstractContextManager[object]:
    """A spinner, or a plain line where there is no terminal."""
    if console.is_terminal:
        return console.status(what)
    console.print(what)
    return nullcontext()
