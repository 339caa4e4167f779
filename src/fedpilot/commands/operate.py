"""What ``fedpilot status`` and ``fedpilot doctor`` do."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedpilot import display
from fedpilot.display import clock, size
from fedpilot.doctor import Finding, examine

if TYPE_CHECKING:
    from fedpilot.engines.flower.status import Client, Status

COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


def show_status(directory: Path, as_json: bool) -> None:
    """A served run at this moment."""
    from fedpilot.engines.flower import status
    from fedpilot.engines.flower.commands import require

    require()
    found = status.read(directory)
    console = display.console_for()
    if as_json:
        console.print_json(json.dumps(asdict(found)))
        return
    console.print(headline(found), soft_wrap=True)
    if found.metrics:
        shown = {name: value for name, value in found.metrics.items() if "/" not in name and value is not None}
        console.print("  ".join(f"{name} {value:.4f}" for name, value in shown.items()), soft_wrap=True)
    if found.clients:
        console.print(_clients(found))
    for name, reason in sorted(found.refused.items()):
        console.print(f"[red]{escape(name)} may not take part:[/] {escape(reason)}", soft_wrap=True)


def headline(found: "Status") -> str:
    """The state of a run in a line."""
    parts = [f"{found.method or 'run'}: {found.state}, {found.phase}"]
    if found.last_round:
        parts.append(f"round {found.round} of {found.last_round}")
    if found.seconds is not None:
        parts.append(f"{clock(found.seconds)} in it")
    if found.left_s is not None and found.state == "running":
        parts.append(f"about {clock(found.left_s)} left")
    return "; ".join(parts)


def _clients(found: "Status") -> Table:
    table = Table()
    for header in ("client", "connected", "now", "budget", "uploads", "failed", "last round", "why not"):
        table.add_column(header)
    for client in found.clients:
        connected = {None: "?", True: "yes", False: "no"}[client.connected]
        counts = (str(client.rounds), str(client.failures), str(client.last_round or "-"))
        table.add_row(
            escape(client.name), connected, client.doing or "-", _budget(client), *counts, escape(client.reason)
        )
    return table


def _budget(client: "Client") -> str:
    if client.budget_bytes is None:
        return "?"
    if client.margin == 1.0:
        return size(client.budget_bytes)
    return f"{size(client.budget_bytes / client.margin)}, reported {size(client.budget_bytes)}"


def show_findings(folder: Path, server: str | None, ca: Path | None, key: Path | None, as_json: bool) -> bool:
    """What is wrong here and on the way to a server; whether nothing keeps it from working."""
    console = display.console_for()
    found = []
    for finding in _findings(folder, server, ca, key):
        found.append(finding)
        if not as_json:
            _show(console, finding)
    if as_json:
        console.print_json(json.dumps([asdict(finding) for finding in found]))
    return all(finding.state != "problem" for finding in found)


def _findings(folder: Path, server: str | None, ca: Path | None, key: Path | None) -> Iterator[Finding]:
    yield from examine(folder)
    if server is not None and ca is not None and key is not None:
        from fedpilot.engines.flower import commands

        commands.require()
        from fedpilot.engines.flower import reach

        host, port = commands.host_and_port(server)
        yield from reach.examine(host, port, ca, key)


def _show(console: Console, finding: Finding) -> None:
    mark = f"[{COLOURS[finding.state]}]{finding.state:<8}[/]"
    console.print(f"{mark} {finding.what:<12} {escape(finding.said)}", soft_wrap=True)
    if finding.advice:
        console.print(f"{'':<21} {escape(finding.advice)}", soft_wrap=True)
