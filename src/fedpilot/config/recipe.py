"""A recipe: the whole configuration of a run as frozen dataclasses, read from TOML.

Sections whose settings belong to a module are that module's own dataclass; what is defined here is left for `setup`.
"""

import dataclasses
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from fedpilot.algorithms import ALGORITHMS
from fedpilot.assets import ASSETS
from fedpilot.click_model import ClickSettings
from fedpilot.config import schema
from fedpilot.config.schema import AT_LEAST_ONE, NOT_EMPTY, NOT_NEGATIVE, POSITIVE, SHARE, Rule
from fedpilot.config.sections import (
    AlgorithmSettings,
    ClientSettings,
    DefenceSettings,
    EvaluationSettings,
    MethodSettings,
    PrivacySettings,
    RunSettings,
    ServerSettings,
)
from fedpilot.data.partition import PartitionSettings
from fedpilot.data.recommendation import MOVIELENS, RecommendationSettings
from fedpilot.data.tables import DataSettings
from fedpilot.errors import ConfigError, FedpilotError
from fedpilot.model import ModelSettings, faster_attention
from fedpilot.privacy.client_dp import ClientDP
from fedpilot.privacy.secure_settings import SecureAggregation
from fedpilot.robust import Robust
from fedpilot.safeguards import Safeguards
from fedpilot.screening import Screening
from fedpilot.training import TrainingSettings, native_arithmetic
from fedpilot.types import UsesPublicData

Table = Mapping[str, object]


@dataclass(frozen=True)
class Recipe:
    """The configuration of a run; each field is a section of the file.

    ``methods`` holds what ``fedpilot compare`` may select besides the algorithms by name: ``[methods.NAME]``.
    """

    run: RunSettings
    model: ModelSettings
    data: DataSettings
    partition: PartitionSettings
    clients: ClientSettings
    training: TrainingSettings
    algorithm: AlgorithmSettings
    evaluation: EvaluationSettings
    defence: DefenceSettings = field(default_factory=DefenceSettings)
    privacy: PrivacySettings = field(default_factory=PrivacySettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    recommendation: RecommendationSettings | None = None
    click_model: ClickSettings | None = None
    baseline: AlgorithmSettings | None = None
    methods: Mapping[str, MethodSettings] = field(default_factory=dict)

    @property
    def products(self) -> Literal["float32", "bf16"]:
        """Arithmetic of matrix products; a base in bf16 computes in it whatever ``training.autocast`` says."""
        return "bf16" if "bf16" in (self.model.dtype, self.training.autocast) else "float32"

    @property
    def safeguards(self) -> Safeguards:
        """What stands between uploads and the aggregation."""
        return _safeguards(self.run, self.defence, self.privacy)

    def resolved(self) -> dict[str, dict[str, Any]]:
        """Section -> key -> value, defaults included; what a manifest keeps."""
        sections = {
            name: dataclasses.asdict(getattr(self, name))
            for name in SECTIONS
            if name not in ("algorithm", "baseline") and getattr(self, name) is not None
        }
        for key in FILLED["data"]:
            del sections["data"][key]
        for name in ("algorithm", "baseline"):
            chosen = getattr(self, name)
            if chosen is not None:
                sections[name] = {"name": chosen.name, **chosen.options}
        if self.methods:
            sections["methods"] = {
                name: {"name": method.algorithm.name, **method.algorithm.options, "set": list(method.set)}
                for name, method in self.methods.items()
            }
        return sections

    def to_toml(self) -> str:
        """The recipe as a file that reads back as the same recipe."""
        sections = self.resolved()
        methods = {f"methods.{name}": table for name, table in sections.pop("methods", {}).items()}
        return "\n".join(
            "\n".join([f"[{name}]", *(f"{key} = {schema.show(value)}" for key, value in section.items()), ""])
            for name, section in {**sections, **methods}.items()
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
    "defence": DefenceSettings,
    "privacy": PrivacySettings,
    "server": ServerSettings,
    "recommendation": RecommendationSettings,
    "click_model": ClickSettings,
}
"""Section of a file -> its class."""

OPTIONAL = frozenset({"baseline", "recommendation", "click_model"})
"""Sections that mean nothing where the file has them not."""

FILLED: Mapping[str, frozenset[str]] = {
    "data": frozenset({"task", "labels", "public_fraction", "recommendation"}),
    "algorithm": frozenset({"spec", "profile", "budget_bytes", "num_rounds", "batch_size", "user_width"}),
}
"""Section -> fields that follow from the rest of the recipe and are not in the file."""

_DERIVED = ("fashion-mnist-domains", "optdigits")  # not packages of their own
DATA_NAMES = (*_DERIVED, *sorted(name for name, asset in ASSETS.items() if asset.kind == "data"))
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
    "data.validation_fraction": Rule("lie in [0, 1)", lambda value: 0 <= value < 1),
    "data.seed": NOT_NEGATIVE,
    "partition.num_clients": AT_LEAST_ONE,
    "partition.alpha": POSITIVE,
    "partition.classes_per_client": AT_LEAST_ONE,
    "partition.clients_per_value": AT_LEAST_ONE,
    "partition.seed": NOT_NEGATIVE,
}
"""``section.key`` -> what its value must hold, where the section's own class does not say."""


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe.

    Args:
        path: A TOML file. Relative paths in it are relative to its folder.
        overrides: ``section.key=value`` each; the value is TOML, or else a string. Their paths are relative to the
            working directory.

    Raises:
        ConfigError: All that is wrong, each problem with its file, key, value and rule.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"recipe must be a readable text file, got {path}: {error}"]) from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError([f"{path} must be valid TOML, got: {error}"]) from error
    return read_recipe(tables, str(path), overrides, path.parent)


def read_recipe(
    tables: Table, file: str, overrides: Sequence[str] = (), folder: Path = Path(), by: str = "--set"
) -> Recipe:
    """The recipe of tables as `tomllib` gives them; see `load_recipe`.

    Args:
        tables: Section -> key -> value.
        file: How messages call it.
        overrides: ``section.key=value`` each.
        folder: What relative paths in the tables are relative to.
        by: How messages call the overrides.
    """
    problems: list[str] = []
    given = tables.get("methods", {})
    sections, labels = _sections({name: table for name, table in tables.items() if name != "methods"}, file, problems)
    _anchor(sections, folder)
    for override in overrides:
        _override(override, sections, labels, problems, by)
    known = {name: sections.get(name, {}) for name in SECTIONS if name in sections or name not in OPTIONAL}

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
            problems += _idle(name, table, at)
    problems += _across(read, where)
    methods = _methods(given, sections, file, problems)
    if problems:
        raise ConfigError(problems)
    recipe = Recipe(**read, methods=methods)
    task, evaluation, public = recipe.model.task, recipe.evaluation, recipe.server.fraction
    if evaluation.metric == "auto":
        evaluation = dataclasses.replace(evaluation, metric=_metrics(task, recipe.data)[0])
    device = "cuda" if wants_gpu(recipe.run) else "cpu"
    if recipe.training.autocast == "auto":
        training = dataclasses.replace(recipe.training, autocast=native_arithmetic(device))
        recipe = dataclasses.replace(recipe, training=training)
    if recipe.model.attention == "auto":
        attention = faster_attention(device, recipe.products, recipe.model.max_length)
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, attention=attention))
    data = dataclasses.replace(recipe.data, task=task, public_fraction=public)
    if recipe.recommendation is not None:
        data = dataclasses.replace(data, recommendation=recipe.recommendation)
    return dataclasses.replace(recipe, data=data, evaluation=evaluation)


def wants_gpu(run: RunSettings) -> bool:
    """Whether clients are to train on a GPU; ``auto`` is where there is one."""
    return run.device == "cuda" or (run.device == "auto" and torch.cuda.is_available())


def _metrics(task: str, data: DataSettings | None) -> tuple[str, ...]:
    """Metrics of a task's evaluation, the usual one first; ``auc`` is there where there are two classes."""
    words = task == "causal-lm" and not (data is not None and data.answers)
    return ("perplexity", "loss") if words else ("accuracy", "loss", "auc")


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


def _override(
    text: str, sections: dict[str, dict[str, object]], labels: dict[str, str], problems: list[str], by: str = "--set"
) -> None:
    dotted, equals, raw = text.partition("=")
    section, dot, key = dotted.strip().partition(".")
    if not (equals and dot and key):
        example = "--set run.rounds=5" if by == "--set" else "training.learning_rate=1e-2"
        problems.append(f"{by} must be section.key=value, got {text!r}; for example {example}")
        return
    if section not in SECTIONS:
        problems.append(f"{by} {dotted}: [{section}] must be a known section; {schema.suggestion(section, SECTIONS)}")
        return
    try:
        value: object = tomllib.loads(f"value = {raw}")["value"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    sections.setdefault(section, {})[key] = value
    labels[f"{section}.{key}"] = by
    _anchor({section: sections[section]}, Path(), only=key)


def _anchor(sections: dict[str, dict[str, object]], folder: Path, only: str | None = None) -> None:
    """Makes relative paths that mean files absolute; names of assets and hub ids stay."""
    for section, key in (("data", "source"), ("data", "test"), ("model", "source"), ("server", "source")):
        value = sections.get(section, {}).get(key)
        if not isinstance(value, str) or (only is not None and key != only) or value in ASSETS:
            continue
        path = folder / Path(value).expanduser()
        is_file = section != "model" and Path(value).suffix in (".csv", ".tsv", ".jsonl", ".json", ".parquet")
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
    foreign = {key: having for key in options if (having := _methods_with(key)) and name not in having}
    for key, having in foreign.items():
        who = f"{', '.join(having)} {'has' if len(having) == 1 else 'have'} it"
        problems.append(f"{where(key)} must be an option of {name}, got one of other methods; {who}")
    options = {key: value for key, value in options.items() if key not in foreign}
    values = schema.read(cls, options, where, problems, hidden=FILLED["algorithm"])
    problems += _idle(name, options, where)
    if len(problems) > before:
        return None
    try:  # its own check looks at the hyper-parameters alone; model and memory profile are not there yet
        cls(**dict.fromkeys(("spec", "profile")), **values)
    except (ValueError, FedpilotError) as error:
        problems.append(where(str(error)))
        return None
    return AlgorithmSettings(name, values)


_PROTECTIONS: Mapping[str, Sequence[tuple[Sequence[str], Sequence[str], str]]] = {
    "privacy": (
        (("kind",), ("clip", "noise_multiplier", "delta", "max_epsilon"), '"client" or "local"'),
        (("secure_aggregation",), ("threshold", "min_clients", "bits", "bound"), "true"),
    ),
    "defence": ((("rule",), ("attackers",), '"trimmed-mean" or "multi-krum"'),),
    "ffa-lora": ((("noise_multiplier", "epsilon"), ("clip", "delta"), "a number"),),
}
"""Section or algorithm -> keys of which one turns a protection on, keys that say how, what to turn it on with."""


def _idle(name: str, table: Table, where: Callable[[str], str]) -> list[str]:
    """Settings of a protection that is not turned on: who writes them believes to be protected."""
    return [
        f"{where(key)} must go with {' or '.join(switches)}, which turns it on, got none: it would do nothing; "
        f"set {' or '.join(switches)} to {value}, or remove {key}"
        for switches, keys, value in _PROTECTIONS.get(name, ())
        if not any(switch in table for switch in switches)
        for key in keys
        if key in table
    ]


# --- methods of a comparison --------------------------------------------------------------------------------------

SHARED: Mapping[str, frozenset[str]] = {
    **{section: frozenset() for section in ("run", "data", "partition", "clients", "evaluation", *OPTIONAL)},
    "model": frozenset({"source", "task", "max_length", "image_size"}),
    "training": frozenset({"batch_size", "local_epochs", "max_steps"}),
    "server": frozenset({"source", "text", "image", "prompt", "fraction", "limit"}),
}
"""What all methods of a comparison have in common: section -> keys, none for all of them."""


def method_names(recipe: Recipe) -> tuple[str, ...]:
    """What ``--algorithms`` may select, sorted."""
    return tuple(sorted({*recipe.methods, *ALGORITHMS}))


def method_recipe(recipe: Recipe, name: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of one method's runs in a comparison: its own algorithm and overrides, no baseline, no early stop.

    ``name`` is that of a section ``[methods.NAME]``, or else of the recipe's own algorithm, or else of an algorithm
    with its defaults.

    Args:
        recipe: Of the comparison.
        name: The method.
        overrides: ``section.key=value`` each, after the method's own; none may touch what all methods share.

    Raises:
        ConfigError: There is no such method, or an override is wrong.
    """
    if name not in method_names(recipe):
        raise ConfigError([f"method must be known, got {name!r}; {schema.suggestion(name, method_names(recipe))}"])
    own = recipe.algorithm if recipe.algorithm.name == name else AlgorithmSettings(name)
    method = recipe.methods.get(name) or MethodSettings(own)
    tables = recipe.resolved()
    tables["algorithm"] = {"name": method.algorithm.name, **method.algorithm.options}
    tables["evaluation"]["patience"] = None
    plain = {section: table for section, table in tables.items() if section not in ("baseline", "methods")}
    return _of_method(name, plain, "recipe", (*method.set, *overrides))


def _methods(
    given: object, sections: Mapping[str, dict[str, object]], file: str, problems: list[str]
) -> dict[str, MethodSettings]:
    if not isinstance(given, Mapping):
        problems.append(
            f"{file}: methods must be tables, got {schema.show(given)}; write [methods.NAME] above its keys"
        )
        return {}
    found: dict[str, MethodSettings] = {}
    sound = not problems
    for name, table in given.items():
        at = f"{file}: methods.{name}"
        if not isinstance(table, Mapping) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            problems.append(f"{at} must be a table with a name of letters, digits, '-', '_' and '.'")
            continue
        chosen = _algorithm({key: value for key, value in table.items() if key != "set"}, f"{at}.{{}}".format, problems)
        overrides = table.get("set", [])
        if not isinstance(overrides, list | tuple) or not all(isinstance(entry, str) for entry in overrides):
            problems.append(f'{at}.set must be a list of strings "section.key=value", got {schema.show(overrides)}')
        elif chosen is not None:
            method = MethodSettings(chosen, tuple(overrides))
            try:
                own = {"name": chosen.name, **chosen.options}
                if sound:  # or else what is wrong with the recipe would be said again for every method
                    _of_method(name, {**sections, "algorithm": own}, file, method.set)
            except ConfigError as error:
                problems += error.problems
            found[name] = method
    return found


def _of_method(name: str, tables: Table, file: str, overrides: Sequence[str]) -> Recipe:
    by = f"{file}: methods.{name}.set"
    problems = []
    for override in overrides:
        section, _, key = override.partition("=")[0].strip().partition(".")
        if section in SHARED and (not SHARED[section] or key in SHARED[section]):
            advice = f"change it for all of them with --set {override}"
            problems.append(f"{by} must leave what all methods share, got {schema.show(override)}; {advice}")
    if problems:
        raise ConfigError(problems)
    return read_recipe(tables, file, overrides, by=by)


def _methods_with(key: str) -> list[str]:
    """Methods whose option the key is."""
    return [name for name, cls in ALGORITHMS.items() if key in schema.fields_of(cls, hidden=FILLED["algorithm"])]


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
        known, metric = ("auto", *_metrics(model.task, data)), evaluation.metric
        if metric.partition("/")[0] not in known:
            rule = f"must be one of {', '.join(known)}, got {schema.show(metric)}"
            problems.append(f"{where('evaluation', 'metric')} {rule}; {schema.suggestion(metric, known)}")
    held_out = data is not None and (data.validation_fraction or data.source == MOVIELENS)
    if evaluation is not None and evaluation.on == "validation" and data is not None and not held_out:
        rule = 'must be above 0 where evaluation.on is "validation", got 0.0; 0.1 is usual'
        problems.append(f"{where('data', 'validation_fraction')} {rule}")
    clients, training = read.get("clients"), read.get("training")
    if clients is not None and training is not None:
        uneven = [size for size in clients.micro_batches if training.batch_size % size]
        if uneven:
            rule = f"must be divisors of training.batch_size, {training.batch_size}, got {schema.show(uneven)}"
            problems.append(f"{where('clients', 'micro_batches')} {rule}")
    problems += _of_safeguards(read, where)
    problems += _of_server(read, where)
    problems += _of_recommendation(read, where)
    return problems + (_of_partition(partition, where) if partition is not None else [])


def _safeguards(run: RunSettings, defence: DefenceSettings, privacy: PrivacySettings) -> Safeguards:
    private = None
    if privacy.kind != "none":
        private = ClientDP(privacy.kind, privacy.clip, privacy.noise_multiplier, privacy.delta, privacy.max_epsilon)
    screening = Screening(defence.max_norm_factor, defence.clip)
    robust = Robust(defence.rule, defence.attackers)
    secure = None
    if privacy.secure_aggregation:
        secure = SecureAggregation(privacy.threshold, privacy.min_clients, privacy.bits, privacy.bound)
    return Safeguards(screening, robust, private, run.min_uploads, run.min_share, secure)


def _of_safeguards(read: Mapping[str, Any], where: Callable[[str, str], str]) -> list[str]:
    """Safeguards that cannot serve the method or the baseline."""
    run = read.get("run")
    if run is None or read.get("defence") is None or read.get("privacy") is None:
        return []
    safeguards = _safeguards(run, read["defence"], read["privacy"])
    problems: list[str] = []
    for settings in filter(None, (read.get("algorithm"), read.get("baseline"))):
        made = ALGORITHMS[settings.name](**dict.fromkeys(("spec", "profile")), **settings.options)
        problems += [where(section, text.removeprefix(f"{section}.")) for section, text in safeguards.problems(made)]
    return list(dict.fromkeys([*problems, *_of_cohorts(read, safeguards, where)]))


def _of_cohorts(read: Mapping[str, Any], safeguards: Safeguards, where: Callable[[str, str], str]) -> list[str]:
    """Rounds that have fewer clients than a sum needs."""
    run, secure, num_clients = read["run"], safeguards.secure, getattr(read.get("partition"), "num_clients", None)
    if secure is None:
        return []
    of_round = run.cohort or num_clients
    if of_round is None or of_round >= secure.min_clients:
        return []
    rule = f"must be at most the clients of a round, {of_round}, got {secure.min_clients}; sample more of them"
    return [f"{where('privacy', 'min_clients')} {rule}"]


def _of_server(read: Mapping[str, Any], where: Callable[[str, str], str]) -> list[str]:
    """Public data that is not public, or that a method needs and nobody names."""
    server, data = read.get("server"), read.get("data")
    if server is None:
        return []
    problems: list[str] = []
    if server.source is not None and data is not None and server.source == data.source:
        rule = f"must be another source than data.source, whose test rows it holds, got {schema.show(server.source)}"
        problems.append(f"{where('server', 'source')} {rule}; set server.fraction instead")
    if server.source is not None and (wrong := _nearly(server.source, DATA_NAMES)):
        rule = f"must be a packaged asset, a local path or a hub id, got {schema.show(server.source)}"
        problems.append(f"{where('server', 'source')} {rule}; {wrong}")
    for settings in filter(None, (read.get("algorithm"), read.get("baseline"))):
        made = ALGORITHMS[settings.name](**dict.fromkeys(("spec", "profile")), **settings.options)
        lacks = server.source is None and not server.fraction
        if isinstance(made, UsesPublicData) and made.uses_public_data and lacks:
            rule = f"must be given for {settings.name}, whose server trains on public data, got none"
            problems.append(f"{where('server', 'source')} {rule}; or set server.fraction, such as 0.1")
    return list(dict.fromkeys(problems))


def _of_recommendation(read: Mapping[str, Any], where: Callable[[str, str], str]) -> list[str]:
    """Sections of a recommendation that its data or its partition cannot serve."""
    data, partition, clicks = (read.get(name) for name in ("data", "partition", "click_model"))
    problems: list[str] = []
    if data is not None and data.source != MOVIELENS:
        rule = f"must be {schema.show(MOVIELENS)} where there is a section"
        problems += [
            f"{where('data', 'source')} {rule} [{name}], got {schema.show(data.source)}; remove the section"
            for name in ("recommendation", "click_model")
            if read.get(name) is not None
        ]
    for section in ("algorithm", "baseline"):
        settings = read.get(section)
        if settings is None or clicks is not None:
            continue
        made = ALGORITHMS[settings.name](**dict.fromkeys(("spec", "profile")), **settings.options)
        if getattr(made, "needs_user_vectors", False):
            rule = 'must be "none" where no section [click_model] gives examples their user vectors, got "user"'
            problems.append(f"{where(section, 'gate')} {rule}; add the section, or set it")
    if partition is not None and clicks is not None and clicks.training == "federated":
        by_user = partition.kind == "column" and partition.column in ("user", "group")
        if not by_user or partition.clients_per_value != 1:
            rule = 'must be "central" unless each client is a user or a group of users, got "federated"'
            advice = 'set partition.kind = "column" and partition.column = "group"'
            problems.append(f"{where('click_model', 'training')} {rule}; {advice}")
    return problems


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
