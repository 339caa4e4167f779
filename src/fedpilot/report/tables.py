"""The tables of a report that stand for themselves."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from fedpilot.display import clock, size
from fedpilot.report import words
from fedpilot.report.reading import Group, Missed, Run
from fedpilot.report.svg import Table


def totals(groups: Sequence[Group]) -> Table:
    """What each method came to, with its spread over seeds; the further forms of what it deploys behind it."""

    def over(group: Group, read: Callable[[Run], float | None], show: Callable[[float], str]) -> str:
        mean = group.over_seeds(read(run) for run in group.runs)
        if mean is None:
            return "-"
        if not math.isfinite(mean.mean):
            return "not a number"
        return f"{show(mean.mean)} ± {show(mean.sd)}" if mean.n > 1 else show(mean.mean)

    def share(run: Run) -> float | None:
        out, asked = int(run.tally.left_out.sum()), int(run.tally.asked.sum())
        return out / (out + asked) if out + asked else None

    rows = []
    for group in [row for method in groups for row in (method, *method.forms.values())]:
        metric = group.first.goal.metric
        failures = sum(sum(missed.clients.values()) for run in group.runs for missed in run.failures.values())
        rows.append(
            [
                group.label,
                str(len(group.runs)),
                over(group, lambda run: float(run.last_round), "{:.0f}".format),
                over(group, lambda run: run.score(), "{:.4f}".format),
                over(group, lambda run, name=metric: (run.test or {}).get(name), "{:.4f}".format),  # type: ignore[misc]
                over(group, lambda run: float(run.total_bytes()[0]), size),
                over(group, lambda run: float(run.total_bytes()[1]), size),
                over(group, words.predicted_seconds, clock),
                over(group, lambda run: sum(line.trained_s for line in run.rounds), clock),
                over(group, lambda run: sum(line.wall_s for line in run.rounds), clock),
                over(group, share, lambda value: f"{100 * value:.0f}%"),
                str(failures),
            ]
        )
    header = [
        *("method", "seeds", "rounds", f"{groups[0].first.goal.metric}, last evaluations", "test set, at the end"),
        *("down", "up", "predicted time", "training time here", "wall time here", "left out", "failures"),
    ]
    if all(row[7] in ("-", clock(0.0)) for row in rows):
        header.pop(7)
        rows = [row[:7] + row[8:] for row in rows]
    return Table(header, rows)


def differing(groups: Sequence[Group]) -> Table:
    """Settings that are not the same in all groups; seeds and places are not settings."""
    flat = [_flat(group.first.config) for group in groups]
    names = dict.fromkeys(name for one in flat for name in one)
    ignored = ("run.seed", "run.name", "run.out", "partition.seed", "baseline")
    rows = [
        [name, *(one.get(name, "-") for one in flat)]
        for name in names
        if not name.startswith(ignored) and len({one.get(name, "-") for one in flat}) > 1
    ]
    return Table(["setting", *(group.label for group in groups)], rows if len(groups) > 1 else [])


def _flat(value: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    result: dict[str, str] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            result |= _flat(item, f"{prefix}{name}.")
        elif item is not None:
            result[f"{prefix}{name}"] = item if isinstance(item, str) else json.dumps(item)
    return result


def commands(paths: Sequence[Path], groups: Sequence[Group]) -> str:
    """What to type."""
    commit = groups[0].first.manifest.get("commit")
    lines = [f"git checkout {commit}"] if commit else ["pip install " + _pinned(groups[0].first)]
    if groups[0].first.manifest.get("dirty"):
        lines[0] += "    # files were edited since: the numbers may not come out the same"
    for path in paths:
        if (path / "manifest.json").exists():
            lines.append(f"fedpilot run {path / 'recipe.toml'} --out again")
            continue
        names = ",".join(sorted({file.parent.parent.name for file in path.glob("*/seed-*/manifest.json")}))
        seeds = max(len(group.runs) for group in groups)
        lines.append(f"fedpilot compare RECIPE --algorithms {names} --seeds {seeds} --out again")
        lines += [f"fedpilot run {run.path / 'recipe.toml'}    # one of its runs" for run in groups[0].runs[:1]]
    return "\n".join([*lines, f"fedpilot report {' '.join(map(str, paths))}    # this page"])


def _pinned(run: Run) -> str:
    versions = run.manifest.get("versions") or {}
    return " ".join(f"{name}=={version}" for name, version in versions.items() if name != "python" and version)


def origins(groups: Sequence[Group]) -> Table:
    """Commit, versions and seed of each run."""
    rows = []
    for group in groups:
        for run in group.runs:
            facts = run.manifest
            versions = ", ".join(f"{name} {version}" for name, version in (facts.get("versions") or {}).items())
            edited = " (edited)" if facts.get("dirty") else ""
            commit = f"{facts.get('commit') or 'installed, not a checkout'}{edited}"
            others = [str(facts.get(name, "-")) for name in ("dtype", "num_threads")]
            rows.append([f"{group.label}, seed {run.seed}", str(facts.get("started", "-")), commit, *others, versions])
    return Table(["run", "started", "commit", "arithmetic", "threads", "versions"], rows)


def communication(run: Run) -> Table:
    """Totals by direction and kind, and by tier."""
    down, up = run.total_bytes()
    rounds = max(run.last_round, 1)
    known = [line.bytes_base for line in run.rounds if line.bytes_base is not None]
    rows = []
    if known:
        base = sum(known)
        rows = [
            ["down: adapters and heads", size(down - base), size((down - base) / rounds)],
            ["down: changes of the base that clients lacked", size(base), size(base / rounds)],
        ]
    rows += [["down", size(down), size(down / rounds)], ["up", size(up), size(up / rounds)]]
    by_tier: dict[str, int] = {}
    for client, num_bytes in zip(run.clients, run.tally.bytes_up.tolist(), strict=True):
        by_tier[client.tier] = by_tier.get(client.tier, 0) + num_bytes
    if len(by_tier) > 1:
        rows += [[f"up, from tier {tier}", size(total), size(total / rounds)] for tier, total in by_tier.items()]
    return Table(["direction", "in all", "a round"], rows)


def missed_table(run: Run) -> Table:
    """Reasons with who they befell and how often."""
    rows = []
    for kind, found in (("left out", run.left_out), ("failed", run.failures)):
        for (reason, tier), missed in _by_tier(run, found).items():
            names = [run.clients[client].name for client in missed.clients]
            needed = f"{size(max(missed.needed_bytes.values()))}" if missed.needed_bytes else "-"
            times = sum(missed.clients.values())
            rows.append([kind, tier, f"{len(names)}: {words.named(names)}", str(times), needed, reason])
    return Table(["what", "tier", "clients", "times", "would need", "reason"], rows)


def _by_tier(run: Run, found: Mapping[str, Missed]) -> dict[tuple[str, str], Missed]:
    """Reasons that differ in a number only, as of bytes, are one reason of a tier: the first stands for them."""
    result: dict[tuple[str, str], Missed] = {}
    first: dict[tuple[str, str], str] = {}
    for reason, missed in found.items():
        shape = "".join("0" if sign.isdigit() else sign for sign in reason)
        for client, times in missed.clients.items():
            tier = run.clients[client].tier
            key = (first.setdefault((shape, tier), reason), tier)
            one = result.setdefault(key, Missed())
            one.clients[client] = one.clients.get(client, 0) + times
            if client in missed.needed_bytes:
                one.needed_bytes[client] = missed.needed_bytes[client]
    return result
