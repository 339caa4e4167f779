"""What a run left on disk, added up: of any length and any number of clients, read once, line by line."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from fedpilot.compare.figures import Mean, Point, forms, mean_of, score
from fedpilot.errors import RecordError
from fedpilot.record import RunDirectory
from fedpilot.report import people
from fedpilot.stopping import Goal

Entry: TypeAlias = Mapping[str, Any]
"""A mapping of a line of metrics.jsonl; older records lack the newer keys."""

MIXED = -1
"""In place of a rank where a block's modules differ."""


@dataclass(frozen=True)
class Client:
    """A client; what the run directory does not say is ``None``."""

    name: str
    tier: str
    budget_bytes: int | None = None
    num_examples: int | None = None
    counts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Round:
    """A round in numbers.

    Attributes:
        round: From 0, the evaluation before any training.
        metrics: Of the evaluation; empty where there was none.
        train_loss: Mean over the uploads, weighted by examples.
        bytes_down: Sent to clients.
        bytes_up: Received.
        bytes_base: Of ``bytes_down``: changes of the frozen base; ``None`` in a record that does not say.
        predicted_s: Of the slowest client; ``None`` where a speed is not known.
        trained_s: Measured, of the slowest client.
        wall_s: That the round took here.
        facts: What the algorithm says of its state.
        asked: Clients that were sent a task.
        left_out: Sampled clients for which nothing fitted.
        delivered: Uploads that were accepted.
    """

    round: int
    metrics: Mapping[str, float]
    train_loss: float | None
    bytes_down: int
    bytes_up: int
    bytes_base: int | None
    predicted_s: float | None
    trained_s: float
    wall_s: float
    facts: Mapping[str, float]
    asked: int
    left_out: int
    delivered: int


@dataclass
class Missed:
    """One reason for which clients sat out or failed: client -> times."""

    clients: dict[int, int] = field(default_factory=dict)
    needed_bytes: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Tally:
    """Who did what, over all rounds; arrays are by client, or (clients, blocks).

    Attributes:
        trained: Rounds in which the client was asked to train the block.
        value_sum: Of the values that the allocation gave the block.
        value_count: How many there were.
        value_last: The last of them; NaN where there was none.
        rank_last: Rank in the last plan that trained the block; `MIXED` where modules differ; 0 where there was none.
        asked: Rounds in which the client was sent a task.
        left_out: Rounds in which nothing fitted.
        delivered: Uploads that were accepted.
        predicted: Largest predicted peak in bytes; 0 where none is known.
        measured: Largest measured peak in bytes; 0 where none is known.
        bytes_up: Received from the client.
        block_rounds: (blocks,) rounds in which anybody trained it.
        block_last: (blocks,) the last round in which anybody trained it; 0 for never.
        block_gap: (blocks,) most rounds in a row in which nobody trained it.
    """

    trained: NDArray[np.int64]
    value_sum: NDArray[np.float64]
    value_count: NDArray[np.int64]
    value_last: NDArray[np.float64]
    rank_last: NDArray[np.int64]
    asked: NDArray[np.int64]
    left_out: NDArray[np.int64]
    delivered: NDArray[np.int64]
    predicted: NDArray[np.int64]
    measured: NDArray[np.int64]
    bytes_up: NDArray[np.int64]
    block_rounds: NDArray[np.int64]
    block_last: NDArray[np.int64]
    block_gap: NDArray[np.int64]

    @classmethod
    def empty(cls, num_clients: int, num_blocks: int) -> "Tally":
        """Nothing has happened yet."""
        both = (num_clients, num_blocks)
        whole = [np.zeros(num_clients, np.int64) for _ in range(6)]
        by_block = [np.zeros(num_blocks, np.int64) for _ in range(3)]
        return cls(
            np.zeros(both, np.int64),
            np.zeros(both),
            np.zeros(both, np.int64),
            np.full(both, np.nan),
            np.zeros(both, np.int64),
            *whole,
            *by_block,
        )

    @property
    def mean_value(self) -> NDArray[np.float64]:
        """(clients, blocks) mean of the values; NaN where there was none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(self.value_count > 0, self.value_sum / self.value_count, np.nan)


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        path: Its directory.
        manifest: What it was made of.
        goal: The metric that decides.
        clients: All clients that are known.
        class_names: Columns of the clients' counts.
        rounds: From 0.
        tally: Over all rounds.
        left_out: Reason -> who.
        failures: Reason -> who.
        test: The metrics on the test set after the last round, where it was kept for that.
        recipe: Text of the recipe; empty where it is not there.
    """

    path: Path
    manifest: Entry
    goal: Goal
    clients: tuple[Client, ...]
    class_names: tuple[str, ...]
    rounds: tuple[Round, ...]
    tally: Tally
    left_out: Mapping[str, Missed]
    failures: Mapping[str, Missed]
    test: Mapping[str, float] | None
    recipe: str

    @property
    def config(self) -> Entry:
        """The resolved configuration."""
        found = self.manifest.get("config")
        return found if isinstance(found, dict) else {}

    @property
    def seed(self) -> int:
        """Of the run."""
        return int(self.manifest.get("seed", 0))

    @property
    def method(self) -> str:
        """Name of the method with its participation, which makes a baseline what it is."""
        settings = self.section("algorithm")
        participation = settings.get("participation")
        name = str(settings.get("name", self.path.name))
        return name if participation is None else f"{name} ({participation})"

    @property
    def asked_rounds(self) -> int:
        """Rounds that the recipe asks for."""
        return int(self.section("run").get("rounds") or self.last_round)

    @property
    def last_round(self) -> int:
        """The last recorded one."""
        return self.rounds[-1].round if self.rounds else 0

    @property
    def num_blocks(self) -> int:
        """Of the model."""
        return int(self.tally.trained.shape[1])

    @property
    def evaluated(self) -> list[Round]:
        """Rounds with the metric."""
        return [line for line in self.rounds if self.goal.metric in line.metrics]

    def value(self, line: Round) -> float:
        """The metric of an evaluated round."""
        return line.metrics[self.goal.metric]

    def section(self, name: str) -> Entry:
        """A section of the configuration; empty where it is not there."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    def score(self, at: int | None = None) -> float | None:
        """Mean of the metric over the last evaluations up to a round; ``None`` before the first."""
        end = self.last_round if at is None else at
        points = tuple(Point(line.round, 0, None, self.value(line)) for line in self.evaluated if line.round <= end)
        if not points:
            return None
        last = max(int(self.section("evaluation").get("last") or 1), 1)
        value = score(points, end, last)
        return points[-1].value if math.isnan(value) else value

    def total_bytes(self) -> tuple[int, int]:
        """Down and up, over all rounds."""
        return sum(line.bytes_down for line in self.rounds), sum(line.bytes_up for line in self.rounds)


@dataclass(frozen=True)
class Group:
    """A method with its seeds; a run alone is a group of one."""

    label: str
    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """Of the smallest seed."""
        return self.runs[0]

    def over_seeds(self, values: Iterable[float | None]) -> Mean | None:
        """Mean and spread; ``None`` where no seed knows it."""
        return mean_of(list(values))

    @property
    def forms(self) -> Mapping[str, "Group"]:
        """What else the runs deploy, by name: the same runs, each with that form's metric as the one that decides."""
        metric = self.first.goal.metric
        names = forms((line.metrics for run in self.runs for line in run.rounds), metric)
        goals = {name: replace(self.first.goal, metric=f"{name}_{metric}") for name in names}
        return {
            name: Group(f"{self.label}, {name}", tuple(replace(run, goal=goal) for run in self.runs))
            for name, goal in goals.items()
        }


def find(paths: Sequence[Path]) -> list[Group]:
    """The runs in directories: of a run with its baseline, or of a comparison (``<method>/seed-<s>``).

    Raises:
        RecordError: A directory has neither.
    """
    groups: list[Group] = []
    for path in paths:
        if (path / "manifest.json").exists():
            found = [[path]] + ([[path / "baseline"]] if (path / "baseline" / "manifest.json").exists() else [])
        else:
            members: dict[Path, list[Path]] = {}
            for file in path.glob("*/seed-*/manifest.json"):
                members.setdefault(file.parent.parent, []).append(file.parent)
            found = [sorted(members[method], key=_seed_of) for method in sorted(members)]
        if not found:
            advice = "name a run directory, or the folder of a comparison"
            raise RecordError(f"{path} must hold a run or a comparison, got no manifest.json in it; {advice}")
        here = []
        for folders in found:
            runs = tuple(read(folder) for folder in folders)
            label = folders[0].parent.name if folders[0].name.startswith("seed-") else runs[0].method
            here.append(Group(label if len(paths) == 1 else f"{path.name}: {label}", runs))
        groups += here if (path / "manifest.json").exists() else sorted(here, key=_worst_last)
    return groups


def _worst_last(group: Group) -> float:
    mean = group.over_seeds(run.score() for run in group.runs)
    if mean is None or math.isnan(mean.mean):
        return math.inf
    return -mean.mean if group.first.goal.higher_is_better else mean.mean


def _seed_of(path: Path) -> tuple[int, str]:
    number = path.name.removeprefix("seed-")
    return (int(number) if number.isdigit() else 0, path.name)


def read(path: Path) -> Run:
    """A run, finished or not.

    Raises:
        RecordError: There is none, or it is damaged.
    """
    directory = RunDirectory.open(path)
    manifest = directory.manifest
    config = manifest.get("config")
    sections: Entry = config if isinstance(config, dict) else {}
    metric = str((sections.get("evaluation") or {}).get("metric", "accuracy"))
    clients, class_names = _clients(path, manifest, sections)
    reader = _Reader(clients, cast(int, manifest.get("num_blocks", 0)))
    for line in directory.each_line():
        reader.take(line)
    recipe = path / "recipe.toml"
    return Run(
        path=path,
        manifest=manifest,
        goal=Goal(metric, higher_is_better=not metric.startswith(("loss", "perplexity"))),
        clients=tuple(reader.clients),
        class_names=class_names,
        rounds=tuple(reader.rounds),
        tally=reader.tally,
        left_out=reader.left_out,
        failures=reader.failures,
        test=_test(path),
        recipe=recipe.read_text(errors="replace") if recipe.exists() else "",
    )


def _json(file: Path) -> Entry:
    """The file's mapping; empty where there is none.

    Raises:
        RecordError: It is damaged.
    """
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise RecordError(f"{file} must be JSON, got {error}; restore it from a copy") from error
    return found if isinstance(found, dict) else {}


def comparison_of(path: Path) -> Entry:
    """What the run and its baseline came to; empty where there was none.

    Raises:
        RecordError: The file is damaged.
    """
    return _json(path / "comparison.json") if (path / "manifest.json").exists() else {}


def _test(path: Path) -> Mapping[str, float] | None:
    found = _json(path / "test.json").get("metrics")
    return _numbers(found) if isinstance(found, dict) else None


def _numbers(found: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else float(value) for name, value in found.items()}


def _clients(path: Path, manifest: Entry, sections: Entry) -> tuple[list[Client], tuple[str, ...]]:
    """From `people`'s file, here or beside a baseline; otherwise what the manifest knows."""
    found = _json(path / people.FILE) or (_json(path.parent / people.FILE) if path.name == "baseline" else {})
    if found:
        clients = [
            Client(
                name=str(client["name"]),
                tier=str(client["tier"]),
                budget_bytes=int(client["memory_bytes"]),
                num_examples=int(client["num_examples"]),
                counts=None if client["counts"] is None else tuple(client["counts"]),
            )
            for client in found["clients"]
        ]
        return clients, tuple(found["class_names"])
    if "tiers" not in manifest and path.name == "baseline":
        manifest = _json(path.parent / "manifest.json")
    budgets = (sections.get("clients") or {}).get("memory") or []
    names = (sections.get("clients") or {}).get("tiers") or [f"tier {k}" for k in range(1, len(budgets) + 1)]
    budget_of = dict(zip(names, budgets, strict=False))
    tiers = [str(tier) for tier in manifest.get("tiers", ())]
    return [Client(f"client {k}", tier, budget_of.get(tier)) for k, tier in enumerate(tiers)], ()


class _Reader:
    """Adds lines up; clients and blocks that nobody announced are made as they come."""

    def __init__(self, clients: Sequence[Client], num_blocks: int) -> None:
        self.clients = list(clients)
        self.rounds: list[Round] = []
        self.left_out: dict[str, Missed] = {}
        self.failures: dict[str, Missed] = {}
        self.tally = Tally.empty(len(self.clients), num_blocks)

    def take(self, line: Entry) -> None:
        plans, uploads = line.get("plans") or (), line.get("uploads") or ()
        missed, failed = line.get("left_out") or (), line.get("failures") or ()
        self._make_room(plans, [*plans, *uploads, *missed, *failed])
        tally, number = self.tally, int(line["round"])
        busy: set[int] = set()
        for plan in plans:
            busy |= self._plan(plan)
        for upload in uploads:
            client, metrics = upload["client_id"], upload.get("metrics") or {}
            tally.delivered[client] += 1
            tally.bytes_up[client] += int(upload.get("bytes_up") or 0)
            tally.measured[client] = max(int(tally.measured[client]), int(metrics.get("peak_bytes") or 0))
        for entry in missed:
            tally.left_out[entry["client_id"]] += 1
            self._miss(self.left_out, entry)
        for entry in failed:
            self._miss(self.failures, entry)
        if number:
            self._cover(number, sorted(busy))
        self.rounds.append(_round(line, number, plans, uploads, len(missed)))

    def _plan(self, plan: Entry) -> set[int]:
        tally, client, trained = self.tally, plan["client_id"], list(plan["trained"])
        tally.asked[client] += 1
        tally.trained[client, trained] += 1
        tally.predicted[client] = max(int(tally.predicted[client]), int(plan.get("peak_bytes") or 0))
        if self.clients[client].budget_bytes is None:
            known = self.clients[client]
            self.clients[client] = Client(known.name, known.tier, int(plan["budget_bytes"]))
        values = {block: value for block, value in (plan.get("values") or {}).items() if value is not None}
        if values:  # by arrays: a long record has millions of values
            known_blocks, numbers = [int(block) for block in values], np.array(list(values.values()), np.float64)
            tally.value_sum[client, known_blocks] += numbers
            tally.value_count[client, known_blocks] += 1
            tally.value_last[client, known_blocks] = numbers
        if trained:
            ranks = plan.get("ranks") or {}
            found = (ranks.get(str(block), 0) for block in trained)
            tally.rank_last[client, trained] = [rank if isinstance(rank, int) else MIXED for rank in found]
        return set(trained)

    def _miss(self, where: dict[str, Missed], entry: Entry) -> None:
        missed = where.setdefault(str(entry["reason"]), Missed())
        client = entry["client_id"]
        missed.clients[client] = missed.clients.get(client, 0) + 1
        if entry.get("needed_bytes") is not None:
            missed.needed_bytes[client] = int(entry["needed_bytes"])

    def _cover(self, number: int, busy: Sequence[int]) -> None:
        tally = self.tally
        tally.block_rounds[busy] += 1
        tally.block_last[busy] = number
        np.maximum(tally.block_gap, number - tally.block_last, out=tally.block_gap)

    def _make_room(self, plans: Sequence[Entry], entries: Sequence[Entry]) -> None:
        """Only for records without a population or a number of blocks."""
        shape = self.tally.trained.shape
        clients = max((int(entry["client_id"]) for entry in entries), default=-1) + 1
        blocks = max((max(plan["trained"], default=-1) + 1 for plan in plans), default=0)
        if self.tally.trained.shape[1] == 0:
            blocks = max(blocks, *(int(block) + 1 for plan in plans for block in plan.get("ranks") or {}), 0)
        shape = self.tally.trained.shape
        if clients <= shape[0] and blocks <= shape[1]:
            return
        self.clients += [Client(f"client {k}", "all") for k in range(shape[0], clients)]
        old, self.tally = self.tally, Tally.empty(max(clients, shape[0]), max(blocks, shape[1]))
        for name, array in vars(old).items():
            getattr(self.tally, name)[tuple(slice(0, length) for length in array.shape)] = array


def _round(line: Entry, number: int, plans: Sequence[Entry], uploads: Sequence[Entry], left_out: int) -> Round:
    seconds = [plan.get("seconds") for plan in plans]
    known = [float(value) for value in seconds if value is not None]
    losses = [
        (float(loss), int(upload.get("num_examples") or 1))
        for upload in uploads
        if (loss := (upload.get("metrics") or {}).get("loss")) is not None
    ]
    weight = sum(examples for _, examples in losses)
    return Round(
        round=number,
        metrics=_numbers(line.get("metrics") or {}),
        train_loss=sum(loss * examples for loss, examples in losses) / weight if weight else None,
        bytes_down=int(line.get("bytes_down") or 0),
        bytes_up=int(line.get("bytes_up") or 0),
        bytes_base=None if line.get("bytes_base") is None else int(line["bytes_base"]),
        predicted_s=max(known, default=0.0) if len(known) == len(plans) else None,
        trained_s=max((float((u.get("metrics") or {}).get("seconds") or 0.0) for u in uploads), default=0.0),
        wall_s=float((line.get("seconds") or {}).get("total") or 0.0),
        facts={name: float(v) for name, v in (line.get("facts") or {}).items() if v is not None},
        asked=len(plans),
        left_out=left_out,
        delivered=len(uploads),
    )
