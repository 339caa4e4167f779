"""A recipe: the whole configuration of a run as frozen dataclasses, read from TOML.

Sections whose settings belong to a module are that module's own dataclass; what is defined here is left for `setup`.
"""

import dataclasses
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedpilot.algorithms import ALGORITHMS
from fedpilot.assets import ASSETS
from fedpilot.config import schema
from fedpilot.config.schema import AT_LEAST_ONE, NOT_EMPTY, NOT_NEGATIVE, POSITIVE, SHARE, Rule
from fedpilot.config.sections import AlgorithmSettings, ClientSettings, EvaluationSettings, RunSettings
from fedpilot.data.partition import PartitionSettings
from fedpilot.data.tables import DataSettings
from fedpilot.errors import ConfigError, FedpilotError
from fedpilot.model import ModelSettings
from fedpilot.training import TrainingSettings

Table = Mapping[str, object]


@dataclass(frozen=True)
class Recipe:
    """The configuration of a run; each field is a section of the file."""

    run: RunSettings
    model: ModelSettings
    data: DataSettings
    partition: PartitionSettings
    clients: ClientSettings
    training: TrainingSettings
    algorithm: AlgorithmSettings
    evaluation: EvaluationSettings
    baseline: AlgorithmSettings | None = None

    def resolved(self) -> dict[str, dict[str, Any]]:
        """Section -> key -> value, defaults included; what a manifest keeps."""
        sections = {
            name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS if name not in ("algorithm", "baseline")
        }
        for key in FILLED["data"]:
            del sections["data"][key]
        for name in ("algorithm", "baseline"):
            chosen = getattr(self, name)
            if chosen is not None:
                sections[name] = {"name": chosen.name, **chosen.options}
        return sections

    def to_toml(self) -> str:
        """The recipe as a file that reads back as the same recipe."""
        return "\n".join(
            "\n".join([f"[{name}]", *(f"{key} = {schema.show(value)}" for key, value in section.items()), ""])
            for name, section in self.resolved().items()
        )


SECTIONS: Mapping[str, type[Any]] = {
    "run": RunSettings,
    "model": ModelSettings,
    "data": DataSettings,
    "partition": PartitionSettings,
    "clients": ClientSettings,
    "training": TrainingSettings,
    "algorithm": AlgorithmSettings,
    "baseline": AlgorithmSettings,
    "evaluation": EvaluationSettings,
}
"""Section of a file -> its class."""

FILLED: Mapping[str, frozenset[str]] = {
    "data": frozenset({"task"}),
    "algorithm": frozenset({"spec", "profile", "budget_bytes"}),
}
"""Section -> fields that follow from the rest of the recipe and are not in the file."""

DATA_NAMES = ("optdigits", *sorted(name for name, asset in ASSETS.items() if asset.kind == "data"))
MODEL_NAMES = tuple(sorted(name for name, asset in ASSETS.items() if asset.kind == "model"))

_RULES: Mapping[str, Rule] = {
    "model.source": NOT_EMPTY,
    "model.rank": AT_LEAST_ONE,
    "model.alpha": POSITIVE,
    "model.max_length": Rule("be at least 2", lambda value: value >= 2),
    "model.image_size": AT_LEAST_ONE,
    "model.dropout": Rule("lie in [0, 1)", lambda value: 0 <= value < 1),
    "model.lora_dropout": Rule("lie in [0, 1)", lambda value: 0 <= value < 1),
    "data.source": NOT_EMPTY,
    "data.test_fraction": SHARE,
    "data.limit": AT_LEAST_ONE,
    "data.test_limit": AT_LEAST_ONE,
    "data.seed": NOT_NEGATIVE,
    "partition.num_clients": AT_LEAST_ONE,
    "partition.alpha": POSITIVE,
    "partition.classes_per_client": AT_LEAST_ONE,
    "partition.clients_per_value": AT_LEAST_ONE,
    "partition.seed": NOT_NEGATIVE,
}
"""``section.key`` -> what its value must hold, where the section's own class does not say."""


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: A TOML file. Relative paths in it are relative to its folder.
        overrides: ``section.key=value`` each; the value is TOML, or else a string. Their paths are relative to the
            working directory.

    Raises:
        ConfigError: All that is wrong, each problem with its file, key, value and rule.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"recipe must be a readable text file, got {path}: {error}"]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{path} must be valid TOML, got: {error}"]) from error
    return read_recipe(tables, str(path), overrides, path.parent)


def read_recipe(tables: Table, file: str, overrides: Sequence[str] = (), folder: Path = Path()) -> Recipe:
    """The recipe of tables as `tomllib` gives them; see `load_recipe`.

    Args:
        tables: Section -> key -> value.
        file: How messages call it.
        overrides: ``section.key=value`` each.
        folder: What relative paths in the tables are relative to.
    """
    problems: list[str] = []
    sections, labels = _sections(tables, file, problems)
    _anchor(sections, folder)
    for override in overrides:
        _override(override, sections, labels, problems)
    known = {name: sections.get(name, {}) for name in SECTIONS if name in sections or name != "baseline"}

    def where(section: str, key: str) -> str:
        return f"{labels.get(f'{section}.{key.split()[0]}', file)}: {section}.{key}"

    read: dict[str, Any] = {}
    for name, table in known.items():
        at = partial(where, name)
        if name in ("algorithm", "baseline"):
            read[name] = _algorithm(table, at, problems)
        else:
            rules = {key.partition(".")[2]: rule for key, rule in _RULES.items() if key.startswith(f"{name}.")}
            read[name] = schema.build(SECTIONS[name], table, at, problems, rules=rules, hidden=FILLED.get(name, ()))
    problems += _across(read, where)
    if problems:
        raise ConfigError(problems)
    recipe = Recipe(**read)
    task, evaluation = recipe.model.task, recipe.evaluation
    if evaluation.metric == "auto":
        evaluation = dataclasses.replace(evaluation, metric=_metrics(task)[0])
    return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, task=task), evaluation=evaluation)


def _metrics(task: str) -> tuple[str, ...]:
    """Metrics of a task's evaluation, the usual one first."""
    return ("perplexity", "loss") if task == "causal-lm" else ("accuracy", "loss")


def _sections(tables: Table, file: str, problems: list[str]) -> tuple[dict[str, dict[str, object]], dict[str, str]]:
    sections: dict[str, dict[str, object]] = {}
    for name, table in tables.items():
        if name not in SECTIONS:
            problems.append(f"{file}: [{name}] must be a known section; {schema.suggestion(name, SECTIONS)}")
        elif not isinstance(table, dict):
            advice = f"write [{name}] above its keys"
            problems.append(f"{file}: {name} must be a section, got {schema.show(table)}; {advice}")
        else:
            sections[name] = dict(table)
    return sections, {}


def _override(text: str, sections: dict[str, dict[str, object]], labels: dict[str, str], problems: list[str]) -> None:
    dotted, equals, raw = text.partition("=")
    section, dot, key = dotted.strip().partition(".")
    if not (equals and dot and key):
        problems.append(f"--set must be section.key=value, got {text!r}; for example --set run.rounds=5")
        return
    if section not in SECTIONS:
        problems.append(f"--set {dotted}: [{section}] must be a known section; {schema.suggestion(section, SECTIONS)}")
        return
    try:
        value: object = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    sections.setdefault(section, {})[key] = value
    labels[f"{section}.{key}"] = "--set"
    _anchor({section: sections[section]}, Path(), only=key)


def _anchor(sections: dict[str, dict[str, object]], folder: Path, only: str | None = None) -> None:
    """Makes relative paths that mean files absolute; names of assets and hub ids stay."""
    for section, key in (("data", "source"), ("data", "test"), ("model", "source")):
        value = sections.get(section, {}).get(key)
        if not isinstance(value, str) or (only is not None and key != only) or value in ASSETS:
            continue
        path = folder / Path(value).expanduser()
        is_file = section == "data" and Path(value).suffix in (".csv", ".tsv", ".jsonl", ".json", ".parquet")
        if is_file or path.is_dir() or value.startswith((".", "/", "~")):
            sections[section][key] = str(path.resolve())


def _algorithm(table: Table, where: Callable[[str], str], problems: list[str]) -> AlgorithmSettings | None:
    name = table.get("name")
    if not isinstance(name, str) or name not in ALGORITHMS:
        got = "nothing" if name is None else schema.show(name)
        advice = schema.suggestion(str(name or ""), ALGORITHMS)
        problems.append(f"{where('name')} must be a known algorithm, got {got}; {advice}")
        return None
    cls = ALGORITHMS[name]
    options = {key: value for key, value in table.items() if key != "name"}
    before = len(problems)
    values = schema.read(cls, options, where, problems, hidden=FILLED["algorithm"])
    if len(problems) > before:
        return None
    try:  # its own check looks at the hyper-parameters alone; model and memory profile are not there yet
        cls(**dict.fromkeys(("spec", "profile")), **values)
    except (ValueError, FedpilotError) as error:
        problems.append(where(str(error)))
        return None
    return AlgorithmSettings(name, values)


def _across(read: Mapping[str, Any], where: Callable[[str, str], str]) -> list[str]:
    """Problems between keys, and names that are nearly an asset's."""
    problems: list[str] = []
    model, data, run, partition = (read.get(name) for name in ("model", "data", "run", "partition"))
    for section, known in ((("model", model), MODEL_NAMES), (("data", data), DATA_NAMES)):
        if section[1] is not None and (wrong := _nearly(section[1].source, known)):
            rule = f"must be a packaged asset, a local path or a hub id, got {schema.show(section[1].source)}"
            problems.append(f"{where(section[0], 'source')} {rule}; {wrong}")
    num_clients = getattr(partition, "num_clients", None)
    if run is not None and run.cohort is not None and num_clients is not None and run.cohort > num_clients:
        rule = f"must be at most partition.num_clients, {num_clients}, got {run.cohort}"
        problems.append(f'{where("run", "cohort")} {rule}; set it to "none" for all clients')
    evaluation = read.get("evaluation")
    if model is not None and evaluation is not None:
        known, metric = ("auto", *_metrics(model.task)), evaluation.metric
        if metric.partition("/")[0] not in known:
            rule = f"must be one of {', '.join(known)}, got {schema.show(metric)}"
            problems.append(f"{where('evaluation', 'metric')} {rule}; {schema.suggestion(metric, known)}")
    clients, training = read.get("clients"), read.get("training")
    if clients is not None and training is not None:
        uneven = [size for size in clients.micro_batches if training.batch_size % size]
        if uneven:
            rule = f"must be divisors of training.batch_size, {training.batch_size}, got {schema.show(uneven)}"
            problems.append(f"{where('clients', 'micro_batches')} {rule}")
    return problems + (_of_partition(partition, where) if partition is not None else [])


_NEEDS = {"dirichlet": ("num_clients", "alpha"), "pathological": ("num_clients", "classes_per_client")}


def _of_partition(partition: PartitionSettings, where: Callable[[str, str], str]) -> list[str]:
    """Keys that a kind of partition cannot do without."""
    needed = ("column",) if partition.kind == "column" else _NEEDS.get(partition.kind, ("num_clients",))
    return [
        f"{where('partition', key)} must be given for kind {schema.show(partition.kind)}, got none"
        for key in needed
        if getattr(partition, key) is None
    ]


def _nearly(source: str, known: Sequence[str]) -> str:
    """The advice for a source that is a misspelt asset; empty for everything else, which may be a hub id."""
    if source in known or "/" in source or Path(source).suffix:
        return ""
    advice = schema.suggestion(source, known)
    return advice if advice.startswith("did you mean") else ""
