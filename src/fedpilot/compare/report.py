"""A comparison on paper: tables on the screen and in Markdown, everything in JSON, and plots."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import cast

from rich.table import Table

from fedpilot import checkpoint, jobs
from fedpilot.compare import figures
from fedpilot.compare.figures import (
    AXES,
    NUMBERS,
    Axis,
    Equal,
    Lead,
    Mean,
    MethodFigures,
    PairedTest,
    RunFigures,
    at_equal,
    band,
    block_shares,
    leads,
    mean_of,
    paired_test,
    ranking,
    run_figures,
)
from fedpilot.compare.study import Member, Study
from fedpilot.config import setup
from fedpilot.display import clock, counted, size
from fedpilot.record import RunDirectory, strict
from fedpilot.report import plots
from fedpilot.stopping import Goal

logger = logging.getLogger(__name__)

JSON, MARKDOWN = "comparison.json", "comparison.md"

AXIS_NAMES: Mapping[Axis, str] = {
    "rounds": "rounds",
    "bytes": "bytes down and up",
    "client_seconds": "predicted client seconds",
}


@dataclass(frozen=True)
class Report:
    """What a comparison shows.

    Attributes:
        made: The comparison.
        goal: The metric.
        target: Of the rounds to it.
        methods: Figures, best method first; those without a score behind, in the order asked for.
        equal: What all stand at, on each axis that is known.
        test: The best two.
        leads: The best method against each other one, and against the further forms.
        forms: Method -> what else its runs deploy, evaluated beside: Fed-piLot's newest adapter where it deploys a mean
            over rounds, FedBiOT's emulator. Named ``METHOD, FORM``.
    """

    made: Study
    goal: Goal
    target: float | None
    methods: tuple[MethodFigures, ...]
    equal: tuple[Equal, ...]
    test: PairedTest | None
    leads: tuple[Lead, ...] = ()
    forms: Mapping[str, tuple[MethodFigures, ...]] = field(default_factory=dict)

    @property
    def rows(self) -> tuple[MethodFigures, ...]:
        """The methods in their order, each one's further forms behind it."""
        return tuple(row for method in self.methods for row in (method, *self.forms.get(method.name, ())))


def read(made: Study, target: float | None = None) -> Report:
    """The figures of whatever the folder holds by now."""
    goal = setup.goal(made.recipe)
    runs: dict[str, dict[int, RunFigures]] = {method: {} for method in made.methods}
    further: dict[str, dict[str, dict[int, RunFigures]]] = {method: {} for method in made.methods}
    for member in made.members():
        if lines := member.lines():
            runs[member.method][member.seed] = _figures(member, lines, goal, target)
            for form in figures.forms((cast(Mapping[str, object], line["metrics"]) for line in lines), goal.metric):
                its = replace(goal, metric=f"{form}_{goal.metric}")
                further[member.method].setdefault(form, {})[member.seed] = _figures(member, lines, its, target)
    methods = [MethodFigures(method, runs[method], made.seeds) for method in made.methods]
    forms = {
        method: tuple(MethodFigures(f"{method}, {form}", seeds, made.seeds) for form, seeds in of_method.items())
        for method, of_method in further.items()
    }
    beside = [form for of_method in forms.values() for form in of_method]
    ranked = ranking([method for method in methods if method.finished], goal)
    behind = [method for method in methods if method not in ranked]
    rounds, last = made.recipe.run.rounds, made.recipe.evaluation.last
    found = (at_equal([*methods, *beside], axis, rounds=rounds, last=last) for axis in AXES)
    equal = tuple(one for one in found if one is not None)
    ahead = leads(methods, goal, rounds=rounds, last=last, forms=beside)
    return Report(made, goal, target, (*ranked, *behind), equal, paired_test(methods, goal), ahead, forms)


def _figures(member: Member, lines: Sequence[Mapping[str, object]], goal: Goal, target: float | None) -> RunFigures:
    rounds, last = member.recipe.run.rounds, member.recipe.evaluation.last
    stood = jobs.tested(RunDirectory.open(member.path))
    test = None if stood is None else stood.metrics.get(goal.metric)
    if member.recipe.evaluation.on == "test" and lines[-1]["round"] == rounds:
        value = cast(Mapping[str, float | None], lines[-1]["metrics"]).get(goal.metric)
        test = math.nan if value is None else value
    return run_figures(lines, goal, rounds=rounds, last=last, target=target, test=test)


# --- tables -------------------------------------------------------------------------------------------------------

Show = Callable[[float], str]


def _pm(digits: int) -> Callable[[Mean | None], str]:
    def show(mean: Mean | None) -> str:
        if mean is None:
            return "-"
        return f"{mean.mean:.{digits}f}" + (f" ± {mean.sd:.{digits}f}" if mean.n > 1 else "")

    return show


def _plain(show: Show) -> Callable[[Mean | None], str]:
    return lambda mean: "-" if mean is None else show(mean.mean)


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"


def rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the main table."""
    metric = report.goal.metric
    columns: dict[str, Callable[[MethodFigures], str]] = {
        "method": lambda method: method.name,
        "seeds": lambda method: f"{sum(run.done for run in method.runs.values())}/{method.seeds}",
        metric: lambda method: _pm(4)(method.over_seeds("score")),
        "test, at the end": lambda method: _pm(4)(method.over_seeds("test")),
        "down": lambda method: _plain(size)(method.over_seeds("bytes_down")),
        "up": lambda method: _plain(size)(method.over_seeds("bytes_up")),
        "peak/budget": lambda method: _peak(method),
        "left out": lambda method: _plain(_percent)(method.over_seeds("left_out_share")),
        "client time": lambda method: _plain(clock)(method.over_seeds("client_seconds")),
        "wall time": lambda method: _plain(clock)(method.over_seeds("wall_seconds")),
        "aggregation error": lambda method: _plain("{:.2g}".format)(method.over_seeds("aggregation_error")),
    }
    if report.target is not None:
        columns[f"rounds to {report.target:g}"] = _to_target
    return list(columns), [[show(method) for show in columns.values()] for method in report.rows]


def _peak(method: MethodFigures) -> str:
    shares = [run.peak_share for run in method.runs.values() if run.peak_share is not None]
    return f"{100 * max(shares):.1f}%" if shares else "-"


def _to_target(method: MethodFigures) -> str:
    reached = [run.rounds_to_target for run in method.runs.values() if run.rounds_to_target is not None]
    if not reached:
        return "-"
    share = "" if len(reached) == len(method.runs) else f" ({len(reached)} of {len(method.runs)})"
    return f"{sum(reached) / len(reached):.0f}{share}"


def equal_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table at equal rounds, bytes and predicted client seconds."""
    header = ["method", *(f"at equal {AXIS_NAMES[equal.axis]}" for equal in report.equal)]
    names = [row.name for row in report.rows if any(row.name in equal.values for equal in report.equal)]
    return header, [[name, *(_pm(4)(equal.values.get(name)) for equal in report.equal)] for name in names]


def lead_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of how far the best method is ahead of each other one."""
    cells: dict[str, dict[Axis, str]] = {}
    for lead in report.leads:
        cells.setdefault(lead.other, {})[lead.axis] = _lead(lead)
    header = ["ahead of", *(f"at equal {AXIS_NAMES[axis]}" for axis in AXES)]
    return header, [[other, *(of.get(axis, "-") for axis in AXES)] for other, of in cells.items()]


def _lead(lead: Lead) -> str:
    found = mean_of(list(lead.differences.values()))
    assert found is not None, "a lead has at least one seed"
    spread = f" ± {found.sd:.4f}" if found.n > 1 else ""
    p = "" if lead.p is None else f" (p {lead.p:.3f})"
    return f"{'' if lead.settled else '~ '}{found.mean:+.4f}{spread}{p}"


def limits(report: Report) -> list[str]:
    """Where "equal" is, in words."""
    show: Mapping[Axis, Show] = {
        "rounds": lambda rounds: f"{rounds:.0f} rounds",
        "bytes": size,
        "client_seconds": clock,
    }
    return [
        f"Equal {AXIS_NAMES[equal.axis]}: {show[equal.axis](equal.limit)}"
        + (
            "."
            if equal.axis == "rounds"
            else f", the total of {equal.set_by}, the smallest of the methods that finished."
        )
        for equal in report.equal
    ]


def sentences(report: Report) -> list[str]:
    """What the tables mean."""
    made, recipe = report.made, report.made.recipe
    last = min(recipe.evaluation.last, recipe.run.rounds)
    on = recipe.evaluation.on
    words = [
        f"{report.goal.metric} is the mean over the last {last} rounds on the {on} set; ± is the standard deviation "
        f"over {counted(made.seeds, 'seed')}. Client time is predicted: each round lasts as long as its slowest client."
    ]
    unfinished = [method.name for method in report.methods if not method.finished]
    if unfinished:
        words.append(f"Not finished: {', '.join(unfinished)}; their numbers are those of the rounds so far.")
    if further := [form.name for of_method in report.forms.values() for form in of_method]:
        words.append(f"Further forms of what the same runs deploy: {'; '.join(further)}.")
    if report.test is not None:
        words.append(report.test.words(report.goal.metric))
        words.append(
            f"Ahead of: how much better {report.test.best} was, as mean and deviation over seeds with the p of "
            "a paired t-test; at as many bytes or seconds as the cheaper one of the two took in all."
        )
    if not all(lead.settled for lead in report.leads):
        words.append(
            "~: who is ahead there hangs on the straight line between two evaluations; smaller evaluation.every tells."
        )
    return [*words, *limits(report)]


def screen_table(title: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> Table:
    """A table for the terminal."""
    table = Table(title=title, title_justify="left")
    for index, name in enumerate(header):
        table.add_column(name, justify="right" if index else "left", no_wrap=index == 0)
    for row in cells:
        table.add_row(*row)
    return table


def markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    """The report as a page."""
    made = report.made
    parts = [f"# {made.recipe.run.name}: {len(made.methods)} methods, {made.seeds} seeds", ""]
    for header, cells in (rows(report), equal_rows(report), lead_rows(report)):
        if len(header) > 1 and cells:
            parts += [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
            parts += [f"| {' | '.join(row)} |" for row in cells] + [""]
    parts += [sentence + "\n" for sentence in sentences(report)]
    if made.tuned:
        parts += ["Chosen on validation data:", ""]
        parts += [f"- {method}: `{', '.join(overrides)}`" for method, overrides in made.tuned.items()] + [""]
    parts += [f"![{name}]({name})" for name in pictures]
    return "\n".join(parts) + "\n"


def as_json(report: Report) -> dict[str, object]:
    """Everything, for other programs."""
    made, recipe = report.made, report.made.recipe
    test = report.test
    return {
        "recipe": recipe.run.name,
        "metric": report.goal.metric,
        "higher_is_better": report.goal.higher_is_better,
        "evaluated_on": recipe.evaluation.on,
        "rounds": recipe.run.rounds,
        "last": recipe.evaluation.last,
        "seeds": made.seeds,
        "target": report.target,
        "tuned": {method: list(overrides) for method, overrides in made.tuned.items()},
        "methods": {method.name: _method_json(method) for method in report.methods},
        "forms": {form.name: _method_json(form) for of_method in report.forms.values() for form in of_method},
        "equal": {
            equal.axis: {
                "limit": equal.limit,
                "set_by": equal.set_by,
                "values": {name: asdict(value) for name, value in equal.values.items()},
            }
            for equal in report.equal
        },
        "leads": [asdict(lead) for lead in report.leads],
        "paired_test": None
        if test is None
        else {**asdict(test), "n": len(test.differences), "words": test.words(report.goal.metric)},
    }


def _method_json(method: MethodFigures) -> dict[str, object]:
    means = {number: method.over_seeds(number) for number in NUMBERS}
    return {
        "finished": method.finished,
        "over_seeds": {number: None if mean is None else asdict(mean) for number, mean in means.items()},
        "runs": {str(seed): asdict(run) for seed, run in sorted(method.runs.items())},
    }


# --- files --------------------------------------------------------------------------------------------------------


def write(report: Report) -> list[Path]:
    """``comparison.json``, ``comparison.md`` and the plots, in the comparison's folder."""
    folder = report.made.path
    folder.mkdir(parents=True, exist_ok=True)
    pictures = draw(report)
    body = json.dumps(strict(as_json(report)), indent=2) + "\n"
    checkpoint.write_file(folder / JSON, body.encode())
    checkpoint.write_file(folder / MARKDOWN, markdown(report, [path.name for path in pictures]).encode())
    return [folder / JSON, folder / MARKDOWN, *pictures]


def draw(report: Report) -> list[Path]:
    """The metric over rounds, bytes and predicted seconds, and who trained which blocks."""
    folder, metric = report.made.path, report.goal.metric
    made: list[Path] = []
    if not plots.available():
        logger.warning(plots.ABSENT)
        return made
    for axis in AXES:
        found = {method.name: band(method, axis) for method in report.methods}
        bands = {name: (one.x, one.y, one.sd) for name, one in found.items() if one is not None}
        if bands:
            path = folder / f"{metric.replace('/', '-')}-{axis.replace('_', '-')}.png"
            made.append(plots.metric_bands(bands, AXIS_NAMES[axis], metric, path, in_bytes=axis == "bytes"))
    shares = {method.name: shares for method in report.methods if (shares := _shares(report.made, method)) is not None}
    if shares:
        tiers = _tier_names(report.made)
        made.append(plots.block_maps(shares, tiers, folder / "blocks.png"))
    return made


def _tier_names(made: Study) -> list[str]:
    named = made.recipe.clients.tiers
    return list(named) or [f"tier {number}" for number in range(1, len(made.recipe.clients.memory) + 1)]


def _shares(made: Study, method: MethodFigures) -> plots.Shares | None:
    """(tiers, blocks) over all seeds of a method."""
    lines: list[Mapping[str, object]] = []
    tiers: list[str] = []
    offset = num_blocks = 0
    for member in made.members():
        if member.method != method.name or not member.started():
            continue
        directory = RunDirectory.open(member.path)
        of_run = cast(Sequence[str], directory.manifest["tiers"])
        num_blocks = cast(int, directory.manifest["num_blocks"])
        tiers += of_run
        lines += [_shifted(line, offset) for line in directory.lines()]
        offset += len(of_run)
    if not tiers:
        return None
    return block_shares(lines, tiers.__getitem__, _tier_names(made), num_blocks)


def _shifted(line: Mapping[str, object], offset: int) -> dict[str, object]:
    """The line with the clients of one seed numbered behind those of another."""
    return {
        key: [
            {**entry, "client_id": entry["client_id"] + offset} for entry in cast(Sequence[dict[str, int]], line[key])
        ]
        for key in ("plans", "left_out")
    }
