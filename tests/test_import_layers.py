"""Who may import whom, read off the syntax trees of the whole package."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "fedpilot"

LAYERS: dict[str, set[str]] = {
    "startup": set(),
    "errors": set(),
    "types": {"errors"},
    "tensors": {"types", "errors"},
    "lora": {"types", "errors", "tensors"},
    "base_deltas": {"types", "errors", "tensors"},
    "attachments": {"types", "errors", "lora"},
    "memory": {"types", "errors", "tensors", "lora", "base_deltas", "tracing", "attachments"},
    "allocation": {"types", "errors"},
    "planning": {"types", "errors", "tensors", "lora", "memory", "allocation", "attachments"},
    "algorithms": {
        *("types", "errors", "tensors", "lora", "base_deltas", "corrections", "memory", "allocation"),
        *("planning", "privacy", "attachments"),
    },
    "exchange": {"types", "errors", "tensors", "lora", "base_deltas", "screening"},
    "screening": {"types", "errors", "lora", "base_deltas"},
    "robust": {"types", "errors", "tensors"},
    "margins": {"types"},
    "secure_round": {"types", "errors", "tensors", "base_deltas", "exchange", "privacy"},
    "safeguards": {"types", "errors", "screening", "robust", "privacy"},
    "stopping": {"errors"},
    "interrupts": set(),
    "trackers": {"errors"},
    "checkpoint": {"errors"},
    "corrections": {"types", "errors", "tensors", "lora"},
    "aggregation_error": {"types", "errors", "tensors", "lora", "base_deltas"},
    "rounds": {
        *("types", "errors", "tensors", "lora", "exchange", "aggregation_error"),
        *("screening", "safeguards", "privacy", "secure_round", "margins"),
    },
    "manifest": {"errors"},
    "record": {"types", "errors", "tensors", "checkpoint", "manifest", "rounds", "attachments"},
    "runs": {
        "types",
        "errors",
        "stopping",
        "manifest",
        "rounds",
        "record",
        "screening",
        "safeguards",
        "margins",
        "trackers",
    },
    "engines": {"types", "errors", "checkpoint", "attachments", "startup"},
    "assets": {"errors"},
    "training": {"types", "errors", "galore", "privacy"},
    "privacy": {"types", "errors", "tensors", "lora"},
    "galore": {"types", "errors"},
    "condensation": {"types", "errors", "training"},
    "model": {
        *(
            "types",
            "errors",
            "tensors",
            "lora",
            "base_deltas",
            "memory",
            "training",
            "galore",
            "condensation",
            "privacy",
        ),
        *("attachments", "startup"),
    },
    "alignment": {"types", "errors", "training", "model"},
    "client": {
        *("types", "errors", "tensors", "lora", "memory", "training", "model", "galore", "condensation", "privacy"),
        "alignment",
    },
    "together": {"types", "errors", "training", "model", "client"},
    "export": {"types", "errors", "tensors", "lora", "base_deltas", "model"},
    "pool_export": {"types", "errors", "attachments", "model"},
    "data": {"types", "errors", "assets"},
    "click_model": {"types", "errors", "tensors", "data"},
    "evaluation": {"types", "errors", "training", "model", "data"},
}
"""Module or folder -> what it may import of fedpilot; what is not listed (config, cli, report) may import all."""

DOORS = {
    "peft": {"model/adapted.py"},
    "bitsandbytes": {"model/quantised.py"},
    "flwr": {"engines/flower"},
    "flwr_datasets": {"data/partition.py"},
    "transformers": {"model", "data"},
    "datasets": {"data"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "mlflow": {"trackers.py"},
    "wandb": {"trackers.py"},
    "opacus": {"privacy"},
    "dp_accounting": {"privacy"},
    "cryptography": {"engines/flower", "privacy/primitives.py"},
}
"""Third-party package -> the only files or folders that import it."""

FILES = sorted(PACKAGE.rglob("*.py"))


def imported_names(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} must import by absolute name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def unit_of(path: Path) -> str:
    """What a file is judged as; engines/flower starts whole runs, so it may import all, like config."""
    if path.is_relative_to(PACKAGE / "engines" / "flower"):
        return "engines/flower"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_what_stands_left_of_it(path: Path) -> None:
    unit = unit_of(path)
    if unit not in LAYERS:
        return
    used = {name.split(".")[1] for name in imported_names(path) if name.startswith("fedpilot.")}
    assert used - LAYERS[unit] - {unit} == set()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_third_party_package_has_one_door(path: Path) -> None:
    where = path.relative_to(PACKAGE).as_posix()
    for name in imported_names(path):
        doors = DOORS.get(name.split(".")[0])
        assert doors is None or any(where == door or where.startswith(f"{door}/") for door in doors), name


def test_algorithms_do_not_import_each_other() -> None:
    for path in (PACKAGE / "algorithms").glob("*.py"):
        if path.name != "__init__.py":
            assert not any(name.startswith("fedpilot.algorithms") for name in imported_names(path)), path
