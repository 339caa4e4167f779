"""What ``fedpilot assets`` does."""

from collections.abc import Callable, Sequence

from rich.table import Table

from fedpilot import assets, display


def list_assets(say: Callable[[object], None] | None = None) -> None:
    """The packaged models and data sets; ``say`` gets plain values instead of the table, where given."""
    if say is not None:
        listed = sorted(assets.ASSETS.items())
        say([{"name": n, "kind": one.kind, "what": one.what, "licence": one.licence} for n, one in listed])
        return
    table = Table(title=f"Packaged assets; the cache is {assets.cache_folder()}", title_justify="left")
    for header in ("name", "kind", "what", "licence"):
        table.add_column(header)
    for name, asset in sorted(assets.ASSETS.items(), key=lambda entry: (entry[1].kind, entry[0])):
        table.add_row(name, asset.kind, asset.what, asset.licence)
    display.console_for().print(table)


def fetch_assets(names: Sequence[str]) -> None:
    """Fetches and unpacks."""
    console = display.console_for()
    for name, folder in assets.prepare(names).items():
        console.print(f"{name}: {folder}")
