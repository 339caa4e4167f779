"""What ``fedpilot plan --model`` does: what fits which memory."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from rich.table import Table

from fedpilot import display, progress
from fedpilot.config import hardware, profiles
from fedpilot.config.hardware import Answer, Fit, Outlook
from fedpilot.config.schema import parse_bytes
from fedpilot.display import size
from fedpilot.errors import ConfigError
from fedpilot.report import plots

PICTURES = (".png", ".svg", ".pdf")


def budgets_of(text: str | None) -> list[int]:
    """Bytes of sizes between commas.

    >>> budgets_of("6 GiB, 512MiB"), budgets_of(None)
    ([6442450944, 536870912], [])

    Raises:
        ConfigError: One is none.
    """
    found, problems = [], []
    for part in (text or "").split(","):
        if text is None:
            break
        try:
            found.append(parse_bytes(int(part) if part.strip().isdecimal() else part.strip()))
        except ValueError as error:
            problems.append(f"--memory must {error}, between commas, got {part.strip()!r}")
    if any(budget <= 0 for budget in found):
        problems.append("--memory must be more than 0 bytes")
    if problems:
        raise ConfigError(problems)
    return found


def plan(
    model: Mapping[str, object],
    training: Mapping[str, object],
    micro_batch: int | None,
    num_labels: int,
    *,
    memory: str | None,
    recompute: bool,
    speed: float | None,
    out: Path | None,
    say: Callable[[object], None] | None,
) -> None:
    """Which blocks fit which budgets, at what cost; ``say`` gets plain values instead of the tables, where given."""
    name, budgets = str(model["source"]), budgets_of(memory)
    if out is not None and out.suffix not in PICTURES:
        raise ConfigError([f"--out must be a picture here, {', '.join(PICTURES)}, got {out}"])
    console = display.console_for(stderr=say is not None)
    with ExitStack() as stack:
        source = stack.enter_context(hardware.source_of(name))
        settings, steps, labels = profiles.options(dict(model) | {"source": source}, training, micro_batch, num_labels)
        stack.enter_context(progress.working(console, "tracing the memory of a training step, without weights"))
        found = hardware.outlook(name, settings, steps, labels, budgets, micro_batch, recompute)
    if out is not None:
        _draw(found, out)
        console.print(f"drawn to {out}", soft_wrap=True)
    if say is not None:
        say(document(found, speed))
        return
    console.print(
        f"{name}: {found.what}; {size(found.weight_bytes)} of weights in {found.step.precision}", soft_wrap=True
    )
    console.print(f"a step: {_step_words(found, steps.batch_size)}, {steps.optimiser}", soft_wrap=True)
    console.print(_fits_table(found, speed) if found.answers else _ladder_table(found, speed))
    for answer in found.answers:
        if answer.left_out:
            _say_changes(console.print, found, answer, speed)
    console.print(
        "adapter: the share of the adapter's numbers that are trained, of all at the rank asked for. It says how much "
        "of the adapter learns from this client, not how good it gets.",
        soft_wrap=True,
    )


def _step_words(found: Outlook, batch: int) -> str:
    step = found.step
    parts = [f"batch {batch}", f"{step.length} tokens", f"rank {step.rank}", step.precision]
    parts += [f"micro-batch {step.micro_batch}"] if step.micro_batch < batch else []
    return ", ".join([*parts, "blocks recomputed as needed"] if step.recompute else parts)


def _cost(flops: float, found: Outlook, speed: float | None) -> str:
    """Operations beside those of training everything plainly; seconds where a speed is known."""
    share = f"{flops / found.all_flops:.2f} x"
    return share if speed is None else f"{share}, {display.clock(flops / speed)}"


def _fits_table(found: Outlook, speed: float | None) -> Table:
    table = Table(title="What fits", title_justify="left")
    table.add_column("budget", justify="right", no_wrap=True)
    table.add_column("how")
    for header in ("blocks trained", "recomputed", "rank", "peak", "computing", "adapter"):
        table.add_column(header, justify="right", no_wrap=True)
    for answer in found.answers:
        budget = size(answer.budget_bytes)
        if answer.left_out:
            out = f"left out as asked; {size(answer.needed_bytes)} would do"
            table.add_row(budget, out, *("-",) * 6)
            budget = ""
        for fit in answer.fits:
            table.add_row(budget, fit.change or "as asked", *_cells(fit, found, speed))
            budget = ""
    table.caption = "computing: operations of an optimiser step beside those of training all blocks plainly, as asked"
    return table


def _cells(fit: Fit, found: Outlook, speed: float | None) -> list[str]:
    top = fit.loaded - fit.trained
    blocks = f"{display.blocks(range(top, fit.loaded))} ({fit.trained} of {found.num_blocks})"
    if fit.loaded < found.num_blocks:
        blocks = f"any {fit.trained} of {found.num_blocks}"
    again = str(fit.recomputed) if fit.recomputed else "-"
    costs = (size(fit.peak_bytes), _cost(fit.flops, found, speed), f"{fit.adapter_share:.0%}")
    return [blocks, again, str(fit.step.rank), *costs]


def _say_changes(say: Callable[..., None], found: Outlook, answer: Answer, speed: float | None) -> None:
    budget = size(answer.budget_bytes)
    if not answer.changes:
        say(f"{budget}: no change would let it in; the weights are {size(found.weight_bytes)}. Take a smaller model.")
        return
    table = Table(title=f"What would let {budget} in, the cheapest change first", title_justify="left")
    table.add_column("change")
    for header in ("blocks trained", "recomputed", "rank", "peak", "computing", "adapter"):
        table.add_column(header, justify="right", no_wrap=True)
    for fit in answer.changes:
        table.add_row(fit.change, *_cells(fit, found, speed))
    say(table)


def _ladder_table(found: Outlook, speed: float | None) -> Table:
    table = Table(title="Smallest budget for the deepest blocks", title_justify="left")
    for header in ("blocks trained", "budget", "computing", "recomputed", "computing then"):
        table.add_column(header, justify="right", no_wrap=True)
    for rung in found.rungs:
        plain, again = (_cost(flops, found, speed) for flops in (rung.flops, rung.recomputed_flops))
        table.add_row(str(rung.trained), size(rung.peak_bytes), plain, size(rung.recomputed_peak_bytes), again)
    return table


def document(found: Outlook, speed: float | None = None) -> dict[str, object]:
    """All of it as plain values; bytes, and operations of an optimiser step."""

    def plain(fit: Fit) -> dict[str, object]:
        timed = {} if speed is None else {"seconds": fit.flops / speed}
        first = 0 if fit.loaded < found.num_blocks else fit.loaded - fit.trained
        blocks = list(range(first, first + fit.trained))
        return {**asdict(fit), "blocks": blocks, "flops_share": fit.flops / found.all_flops, **timed}

    return {
        "model": found.source,
        "what": found.what,
        "weight_bytes": found.weight_bytes,
        "num_blocks": found.num_blocks,
        "all_flops": found.all_flops,
        "step": asdict(found.step),
        "smallest_budgets": [asdict(rung) for rung in found.rungs],
        "budgets": [
            {
                "budget_bytes": answer.budget_bytes,
                "left_out": answer.left_out,
                "needed_bytes": answer.needed_bytes,
                "fits": [plain(fit) for fit in answer.fits],
                "changes": [plain(fit) for fit in answer.changes],
            }
            for answer in found.answers
        ],
    }


def _draw(found: Outlook, out: Path) -> None:
    def curve(values: Sequence[int]) -> list[tuple[int, float]]:
        return [(rung.trained, value / 2**30) for rung, value in zip(found.rungs, values, strict=True)]

    plots.budgets_by_blocks(
        {
            "as asked": curve([rung.peak_bytes for rung in found.rungs]),
            "recomputed": curve([rung.recomputed_peak_bytes for rung in found.rungs]),
        },
        {size(answer.budget_bytes): answer.budget_bytes / 2**30 for answer in found.answers},
        found.weight_bytes / 2**30,
        f"{found.source}: memory by blocks trained",
        out,
    )
