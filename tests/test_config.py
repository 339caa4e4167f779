import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedpilot.algorithms import ALGORITHMS
from fedpilot.config import clients, population, schema, server, setup
from fedpilot.config.recipe import SECTIONS, Recipe, load_recipe, method_names, method_recipe, read_recipe
from fedpilot.config.schema import AT_LEAST_ONE, ByteSize
from fedpilot.config.sections import AlgorithmSettings
from fedpilot.errors import ConfigError

Tables = dict[str, dict[str, object]]


def smallest() -> Tables:
    """A recipe with nothing but what has no default."""
    return {
        "model": {"source": "minilm-l3"},
        "data": {"source": "vader"},
        "partition": {"num_clients": 3},
        "clients": {"memory": ["100 MiB"]},
        "training": {"learning_rate": 0.01},
        "algorithm": {"name": "fed-pilot"},
    }


def read(tables: Tables, *overrides: str, folder: Path = Path("/nowhere")) -> Recipe:
    return read_recipe(tables, "r.toml", overrides, folder)


def problems(tables: Tables, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read(tables, *overrides)
    return caught.value.problems


def changed(section: str, **keys: object) -> Tables:
    tables = smallest()
    tables.setdefault(section, {}).update(keys)
    return tables


# --- schema -------------------------------------------------------------------------------------------------------


SMALL = ByteSize(0)


@dataclass(frozen=True)
class Toy:
    needed: int
    size: ByteSize = SMALL
    share: float = 0.5
    kind: Literal["one", "other"] = "one"
    many: tuple[Annotated[int, AT_LEAST_ONE], ...] = ()
    maybe: Annotated[int | None, AT_LEAST_ONE] = None
    flag: bool = False

    def __post_init__(self) -> None:
        if self.share > 1:
            raise ValueError(f"share must be at most 1, got {self.share}")


def toy(**table: object) -> tuple[Toy | None, list[str]]:
    found: list[str] = []
    return schema.build(Toy, table, lambda key: f"f: toy.{key}", found), found


def test_a_table_becomes_its_dataclass() -> None:
    assert toy(needed=2, size="1 KiB", share=1, kind="other", many=[1, 2], maybe=3, flag=True) == (
        Toy(2, ByteSize(1024), 1.0, "other", (1, 2), 3, True),
        [],
    )


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "f: toy.needed must be given; it has no default"),
        ({"needed": 2.0}, "f: toy.needed must be an integer, got 2.0"),
        ({"needed": True}, "f: toy.needed must be an integer, got true"),
        (
            {"needed": 1, "kind": "ohter"},
            """f: toy.kind must be one of "one", "other", got "ohter"; did you mean 'other'?""",
        ),
        ({"needed": 1, "many": 3}, "f: toy.many must be a list, each entry of which must be an integer, got 3"),
        ({"needed": 1, "many": [1, 0]}, "f: toy.many must be at least 1, got [1, 0]"),
        ({"needed": 1, "maybe": "x"}, 'f: toy.maybe must be an integer or be "none", got "x"'),
        ({"needed": 1, "maybe": 0}, "f: toy.maybe must be at least 1, got 0"),
        ({"needed": 1, "flag": 1}, "f: toy.flag must be true or false, got 1"),
        ({"needed": 1, "share": "half"}, 'f: toy.share must be a number, got "half"'),
        ({"needed": 1, "share": 2}, "f: toy.share must be at most 1, got 2.0"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(table: dict[str, object], message: str) -> None:
    assert toy(**table) == (None, [message])


def test_a_misspelt_key_comes_with_a_suggestion_and_the_known_ones() -> None:
    _, found = toy(needed=1, sahre=0.5)
    assert found == [
        "f: toy.sahre must be a known key, got 0.5; did you mean 'share'? "
        "known: flag, kind, many, maybe, needed, share, size"
    ]


def test_the_rules_of_the_class_are_heard_beside_those_of_single_values() -> None:
    _, found = toy(needed=1, share=2, flag="yes")
    assert len(found) == 2


@pytest.mark.parametrize("text", ["220 MB", "0.5 GiB", "7 KiB", "12 b", "1.5mib"])
def test_bytes_are_read_with_their_unit(text: str) -> None:
    number, unit = re.fullmatch(r"([\d.]+)\s*(\w+)", text).groups()  # type: ignore[union-attr]
    base = 1024 if "i" in unit.lower() else 1000
    assert schema.parse_bytes(text) == int(float(number) * base ** "bkmg".index(unit.lower()[0]))


@pytest.mark.parametrize("value", ["220", "220 apples", "-1 MiB", -1, 2.5, True, None])
def test_what_is_not_bytes_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="be bytes"):
        schema.parse_bytes(value)


@given(
    st.text(st.characters(exclude_categories=("Cs", "Cc"))) | st.integers() | st.booleans() | st.lists(st.integers())
)
def test_what_is_shown_reads_back(value: object) -> None:
    import tomllib

    assert tomllib.loads(f"value = {schema.show(value)}")["value"] == value


# --- recipes ------------------------------------------------------------------------------------------------------


def test_the_smallest_recipe_has_defaults_for_everything_else() -> None:
    recipe = read(smallest())
    assert recipe.run.rounds == 10
    assert recipe.algorithm.name == "fed-pilot"
    assert recipe.baseline is None
    assert recipe.clients.memory == (100 * 2**20,)


def test_a_recipe_reads_back_from_what_it_writes(tmp_path: Path) -> None:
    tables = changed("baseline", name="fedit", participation="exclusive")
    tables["training"] |= {"max_grad_norm": "none", "schedule": "cosine"}
    tables["clients"] |= {"memory": ["1 GiB", 5], "tiers": ["a", 'b "quoted"']}
    recipe = read(tables)
    (tmp_path / "again.toml").write_text(recipe.to_toml())
    assert load_recipe(tmp_path / "again.toml") == recipe
    assert load_recipe(str(tmp_path / "again.toml")) == recipe
    assert read_recipe(recipe.resolved(), "manifest") == recipe


def test_all_problems_are_reported_at_once() -> None:
    tables = smallest()
    tables["run"] = {"ronds": 5, "seed": -1}
    tables["model"]["rank"] = 0
    tables["training"] = {"learning_rate": -1, "batch_size": 0, "optimizer": "adamw"}
    tables["partition"] = {"kind": "dirichlet"}
    tables["algorithm"] = {"name": "fed-pilto"}
    tables["modle"] = {}
    found = problems(tables)
    assert len(found) == 10
    assert all(problem.startswith("r.toml: ") for problem in found)
    for part in ("run.ronds", "run.seed", "model.rank", "learning_rate", "batch_size", "optimizer", "[modle]"):
        assert any(part in problem for problem in found), part
    assert f"did you mean 'fed-pilot'? known: {', '.join(sorted(ALGORITHMS))}" in "\n".join(found)


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        ("run", {"rounds": 0}, "r.toml: run.rounds must be at least 1, got 0"),
        ("run", {"name": "a/b"}, 'r.toml: run.name must be a name without slashes, got "a/b"'),
        ("run", {"cohort": 4}, 'r.toml: run.cohort must be at most partition.num_clients, 3, got 4; set it to "none"'),
        ("clients", {"memory": []}, "r.toml: clients.memory must not be empty, got []"),
        ("clients", {"memory": ["9 apples"]}, "clients.memory must be bytes: an integer, or a number with a unit"),
        ("clients", {"tiers": ["a", "b"]}, "clients.tiers must have one entry for each of the 1 of memory, got 2"),
        ("clients", {"micro_batches": [3]}, "clients.micro_batches must be divisors of training.batch_size, 16"),
        ("partition", {"kind": "column"}, 'r.toml: partition.column must be given for kind "column", got none'),
        ("partition", {"kind": "pathological"}, "r.toml: partition.classes_per_client must be given"),
        ("data", {"test_fraction": 1}, "r.toml: data.test_fraction must lie strictly between 0 and 1, got 1"),
        ("data", {"task": "causal-lm"}, "r.toml: data.task must be a known key"),
        ("model", {"task": "causal-ml"}, "did you mean 'causal-lm'?"),
        ("model", {"source": "minilm-l7"}, "r.toml: model.source must be a packaged asset, a local path or a hub id"),
        ("data", {"source": "vadre"}, "did you mean 'vader'? known: "),
        ("algorithm", {"name": "fedit", "particpation": "all"}, "did you mean 'participation'?"),
        ("algorithm", {"name": "fedit", "participation": "most"}, 'must be one of "all", "exclusive", "straggler"'),
        ("evaluation", {"metric": "accurracy"}, "must be one of auto, accuracy, loss, auc, got"),
        ("algorithm", {"spec": 1}, "r.toml: algorithm.spec must be a known key"),
        ("algorithm", {"name": "hetlora", "r_min": 8, "r_max": 4}, "r.toml: algorithm.r_min must lie in 1..r_max"),
        (
            "privacy",
            {"noise_multiplier": 1.0, "max_epsilon": 8},
            "r.toml: privacy.noise_multiplier must go with kind, which turns it on, got none: it would do "
            'nothing; set kind to "client" or "local", or remove noise_multiplier',
        ),
        (
            "privacy",
            {"kind": "client", "min_clients": 3},
            "r.toml: privacy.min_clients must go with secure_aggregation, which turns it on, got none",
        ),
        (
            "defence",
            {"attackers": 0.3},
            "r.toml: defence.attackers must go with rule, which turns it on, got none",
        ),
        (
            "algorithm",
            {"name": "ffa-lora", "delta": 1e-3},
            "r.toml: algorithm.delta must go with noise_multiplier or epsilon, which turns it on, got none",
        ),
        ("baseline", {"participation": "all"}, "r.toml: baseline.name must be a known algorithm, got nothing"),
    ],
)
def test_a_wrong_setting_is_named_with_file_key_value_and_rule(
    section: str, keys: dict[str, object], message: str
) -> None:
    assert message in "\n".join(problems(changed(section, **keys)))


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("privacy", {"kind": "none", "noise_multiplier": 1.0}),  # turned off in so many words
        ("privacy", {"kind": "local", "clip": 0.5}),
        ("privacy", {"secure_aggregation": True, "bits": 64}),
        ("algorithm", {"name": "ffa-lora", "epsilon": 4.0, "delta": 1e-3}),
        ("algorithm", {"name": "ffa-lora", "noise_multiplier": "none", "clip": 1.0}),
    ],
)
def test_a_protection_that_is_named_may_have_its_settings(section: str, keys: dict[str, object]) -> None:
    tables = changed("algorithm", name="fedit")
    tables.setdefault(section, {}).update(keys)
    written = read(tables).resolved()[section]
    assert all(written[key] == (None if value == "none" and key != "kind" else value) for key, value in keys.items())


def test_settings_of_a_protection_on_the_command_line_and_of_methods_must_turn_it_on_too() -> None:
    assert "--set: privacy.clip must go with kind, which" in problems(smallest(), "privacy.clip=2")[0]
    (said,) = problems({**smallest(), "methods": {"private": {"name": "ffa-lora", "clip": 1.0}}})
    assert said.startswith("r.toml: methods.private.clip must go with noise_multiplier or epsilon, which")
    (said,) = problems({**smallest(), "methods": {"private": {"name": "fedit", "set": ["privacy.clip=2"]}}})
    assert "privacy.clip must go with kind, which" in said


def choices(hint: object) -> list[object]:
    """All values of all Literals in an annotation."""
    parts = get_args(hint)
    return list(parts) if get_origin(hint) is Literal else [value for part in parts for value in choices(part)]


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_recipe_may_name_every_choice_that_an_algorithm_knows(name: str) -> None:
    for hint in get_type_hints(ALGORITHMS[name]).values():
        assert [schema.convert(value, hint) for value in choices(hint)] == choices(hint)


def test_a_section_that_is_missing_names_what_it_must_hold() -> None:
    tables = smallest()
    del tables["clients"]
    assert problems(tables) == ("r.toml: clients.memory must be given; it has no default",)


def test_a_value_where_a_section_belongs_is_refused() -> None:
    tables: dict[str, object] = {**smallest(), "run": 5}
    assert "r.toml: run must be a section, got 5; write [run] above its keys" in problems(tables)  # type: ignore[arg-type]


def test_overrides_win_and_are_read_as_toml_or_else_as_text() -> None:
    recipe = read(
        smallest(), "run.rounds=3", "run.name=mine", 'clients.memory=["1 KiB"]', "training.max_grad_norm=none"
    )
    assert (recipe.run.rounds, recipe.run.name, recipe.clients.memory) == (3, "mine", (1024,))
    assert recipe.training.max_grad_norm is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.rounds", "--set must be section.key=value, got 'run.rounds'"),
        ("rounds=3", "--set must be section.key=value, got 'rounds=3'"),
        ("rnu.rounds=3", "--set rnu.rounds: [rnu] must be a known section; did you mean 'run'?"),
        ("run.rounds=0", "--set: run.rounds must be at least 1, got 0"),
    ],
)
def test_a_wrong_override_is_said_to_be_one(override: str, message: str) -> None:
    assert message in "\n".join(problems(smallest(), override))


def test_paths_in_a_recipe_are_relative_to_it_and_those_on_the_command_line_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tables = changed("data", source="mine.csv", test="more.csv")
    recipe = read(tables, folder=tmp_path / "recipes")
    assert recipe.data.source == str(tmp_path / "recipes" / "mine.csv")
    assert recipe.data.test == str(tmp_path / "recipes" / "more.csv")
    assert read(tables, "data.source=here.csv", folder=tmp_path / "recipes").data.source == str(tmp_path / "here.csv")


def test_a_local_model_folder_becomes_absolute_and_a_hub_id_stays(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert read(changed("model", source="model"), folder=tmp_path).model.source == str(tmp_path / "model")
    assert read(changed("model", source="org/model"), folder=tmp_path).model.source == "org/model"


@pytest.mark.parametrize("text", ["[run\n", "run = \xff"])
def test_a_file_that_is_not_toml_is_refused_with_its_place(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        load_recipe(path)


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recipe must be a readable text file"):
        load_recipe(tmp_path / "none.toml")


def test_the_metric_follows_from_the_task_where_it_is_left_out() -> None:
    assert read(smallest()).evaluation.metric == "accuracy"
    assert read(changed("model", task="causal-lm")).evaluation.metric == "perplexity"


def test_every_section_is_a_field_of_the_recipe() -> None:
    assert {*SECTIONS, "methods"} == set(Recipe.__dataclass_fields__)


# --- setup --------------------------------------------------------------------------------------------------------


def test_tiers_go_round_and_a_shuffle_deals_the_same_ones() -> None:
    recipe = read(changed("clients", memory=[1, 2, 3]))
    assert population.tier_of_clients(recipe, 7) == [0, 1, 2, 0, 1, 2, 0]
    shuffled = replace(recipe, clients=replace(recipe.clients, assign="shuffle"))
    dealt = population.tier_of_clients(shuffled, 7)
    assert sorted(dealt) == [0, 0, 0, 1, 1, 2, 2]
    assert dealt == population.tier_of_clients(shuffled, 7)


@pytest.mark.parametrize(("examples", "epochs", "cap", "steps"), [(33, 1, None, 3), (33, 2, None, 6), (33, 2, 4, 4)])
def test_steps_of_a_local_update_are_counted(examples: int, epochs: int, cap: int | None, steps: int) -> None:
    training = replace(read(smallest()).training, batch_size=16, local_epochs=epochs, max_steps=cap)
    assert population.num_steps(examples, training) == steps


def test_seeds_differ_by_client_round_and_purpose() -> None:
    seeds = {
        clients.seed_of(0, purpose, client, round) for purpose in (1, 2) for client in range(5) for round in range(5)
    }
    assert len(seeds) == 50


def test_columns_that_other_sections_name_are_kept() -> None:
    tables = changed("partition", kind="column", column="domain")
    tables["evaluation"] = {"by": "source"}
    tables["data"]["columns"] = ["domain"]
    assert population.data_settings(read(tables)).columns == ("domain", "source")


def test_a_metric_of_loss_is_better_when_it_is_lower() -> None:
    assert setup.goal(read(changed("evaluation", metric="loss/nyt"))).higher_is_better is False
    assert setup.goal(read(changed("evaluation", metric="accuracy"))).higher_is_better is True


# --- methods of a comparison --------------------------------------------------------------------------------------


def with_methods(**methods: dict[str, object]) -> Tables:
    return {**smallest(), "methods": methods}  # type: ignore[dict-item]


def test_a_method_is_an_algorithm_with_options_and_overrides_of_its_own() -> None:
    table = {"name": "fedit", "participation": "exclusive", "set": ["training.learning_rate=2e-2", "model.rank=4"]}
    recipe = read(with_methods(mine=table))
    own = method_recipe(recipe, "mine", ["training.learning_rate=5e-2"])
    assert own.algorithm == AlgorithmSettings("fedit", {"participation": "exclusive"})
    assert (own.model.rank, own.training.learning_rate) == (4, 0.05)  # what is given later holds
    assert (recipe.model.rank, recipe.training.learning_rate) == (8, 0.01)
    assert own.methods == {}


def test_a_method_without_a_section_is_the_recipes_own_or_the_defaults() -> None:
    recipe = read({**with_methods(mine={"name": "fedit"}), "algorithm": {"name": "hetlora", "gamma": 0.5}})
    assert method_recipe(recipe, "hetlora").algorithm.options == {"gamma": 0.5}
    assert method_recipe(recipe, "fed-pilot").algorithm == AlgorithmSettings("fed-pilot")
    assert method_names(recipe) == tuple(sorted({"mine", *ALGORITHMS}))


def test_everything_that_is_wrong_with_methods_is_said_at_once() -> None:
    found = problems(
        with_methods(
            one={"name": "fedti"},
            two={"name": "fedit", "participation": "exclsive", "rnak": 3},
            five={"name": "fedit", "set": "training.learning_rate=1"},
        )
    )
    text = "\n".join(found)
    assert "r.toml: methods.one.name must be a known algorithm" in text
    assert "did you mean 'fedit'?" in text
    assert "r.toml: methods.two.participation must be one of" in text
    assert "r.toml: methods.two.rnak must be a known key" in text
    assert "r.toml: methods.five.set must be a list of strings" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.learning_rat=1", "did you mean 'learning_rate'?"),
        ("training.learning_rate=-1", "r.toml: methods.mine.set: training.learning_rate must be positive"),
        ("data.seed=3", 'methods.mine.set must leave what all methods share, got "data.seed=3"'),
        ("training.batch_size=3", "must leave what all methods share"),
        ("run.seed=1", "must leave what all methods share"),
        ("learning_rate=1", "methods.mine.set must be section.key=value"),
    ],
)
def test_an_override_of_a_method_is_checked_where_it_stands(override: str, message: str) -> None:
    assert message in "\n".join(problems(with_methods(mine={"name": "fedit", "set": [override]})))


def test_methods_survive_writing_the_recipe_down() -> None:
    recipe = read(with_methods(mine={"name": "fedit", "weights": "uniform", "set": ['training.schedule="cosine"']}))
    assert read_recipe(tomllib.loads(recipe.to_toml()), "again.toml") == recipe


# --- the server ---------------------------------------------------------------------------------------------------


def test_a_method_whose_server_trains_on_public_data_must_be_given_some() -> None:
    (found,) = problems(changed("algorithm", name="fedbiot"))
    assert found == (
        "r.toml: server.source must be given for fedbiot, whose server trains on public data, got none; "
        "or set server.fraction, such as 0.1"
    )
    assert read(changed("algorithm", name="fedbiot", pre_steps=0, align_steps=0)).server.source is None
    tables = changed("algorithm", name="fedbiot")
    assert read({**tables, "server": {"source": "bbc"}}).data.public_fraction == 0
    assert read({**tables, "server": {"fraction": 0.1}}).data.public_fraction == 0.1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "vader"}, "server.source must be another source than data.source, whose test rows it holds"),
        (
            {"source": "bcc"},
            'server.source must be a packaged asset, a local path or a hub id, got "bcc"; did you mean',
        ),
        ({"source": "bbc", "fraction": 0.1}, "server.fraction must be 0 where source names the server's data, got 0.1"),
        ({"fraction": 1.0}, "server.fraction must lie in [0, 1), got 1.0"),
        ({"learning_rate": 0.0}, "server.learning_rate must be positive, got 0.0"),
        ({"steps": 3}, "server.steps must be a known key, got 3"),
    ],
)
def test_what_a_server_cannot_have_is_refused(keys: dict[str, object], message: str) -> None:
    assert any(message in found for found in problems(changed("server", **keys)))


def test_public_data_is_the_same_for_all_methods_of_a_comparison_and_the_servers_steps_are_each_ones_own() -> None:
    tables = with_methods(own={"name": "fedit", "set": ["server.fraction=0.3"]})
    assert "must leave what all methods share" in problems(tables)[0]
    tables = with_methods(own={"name": "fedit", "set": ["server.learning_rate=0.3"]})
    assert method_recipe(read(tables), "own").server.learning_rate == 0.3


def test_a_servers_own_file_is_relative_to_the_recipe() -> None:
    assert read(changed("server", source="public.csv")).server.source == "/nowhere/public.csv"


def test_the_server_trains_as_clients_do_but_for_what_its_section_says() -> None:
    tables = changed("training", batch_size=8, local_epochs=3, max_steps=5, schedule="cosine", cache_bytes=9)
    tables["training"]["autocast"] = "bf16"
    settings = server.training_settings(read({**tables, "server": {"optimiser": "sgd", "learning_rate": 0.3}}))
    assert (settings.optimiser, settings.learning_rate, settings.batch_size) == ("sgd", 0.3, 8)
    assert (settings.local_epochs, settings.max_steps, settings.schedule, settings.cache_bytes) == (
        1,
        None,
        "constant",
        0,
    )
    assert settings.autocast == "bf16"
    assert server.training_settings(read({**tables, "server": {"batch_size": 2}})).batch_size == 2


@pytest.mark.parametrize(
    ("on_gpu", "found", "expected"),
    [
        (False, {"avx2": True, "avx512_bf16": False}, "float32"),
        (False, {"avx512_bf16": True}, "bf16"),
        (False, {"amx_bf16": True}, "bf16"),
        (True, {"avx512_bf16": True}, "float32"),
    ],
)
def test_automatic_arithmetic_is_bf16_where_the_device_has_it_and_on_record(
    on_gpu: bool, found: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    recipe = read(changed("training", autocast="auto"))
    assert recipe.training.autocast == recipe.resolved()["training"]["autocast"] == expected
    tables = with_methods(own={"name": "fedit", "set": ["training.autocast=auto"]})
    assert method_recipe(read(tables), "own").training.autocast == expected


def test_a_clusters_address_is_for_flowers_simulation_alone() -> None:
    (found,) = problems(changed("run", ray_address="auto"))
    assert found == (
        "r.toml: run.ray_address must be left out where engine is not 'flower-simulation', got 'auto'; "
        "set engine = 'flower-simulation'"
    )
    assert problems(changed("run", ray_address="auto", cohort=1, min_uploads=2)) == (
        "r.toml: run.min_uploads must be at most cohort, 1, got 2; no round would count",
        found,
    )
    assert read(changed("run", ray_address="auto", engine="flower-simulation")).run.ray_address == "auto"


def test_arithmetic_that_is_asked_for_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert read(smallest()).training.autocast == "float32"
    assert read(changed("training", autocast="bf16")).training.autocast == "bf16"


@pytest.mark.parametrize(
    ("on_gpu", "keys", "expected"),
    [
        (False, {"training.autocast": "bf16"}, "eager"),
        (False, {"training.autocast": "auto"}, "eager"),
        (False, {"model.dtype": "bf16"}, "eager"),
        (False, {}, "sdpa"),
        (False, {"training.autocast": "bf16", "model.max_length": 512}, "sdpa"),
        (True, {"training.autocast": "bf16"}, "sdpa"),
    ],
)
def test_automatic_attention_is_the_faster_kernel_and_on_record(
    on_gpu: bool, keys: dict[str, object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    tables = changed("model", attention="auto", max_length=64)
    for key, value in keys.items():
        section, name = key.split(".")
        tables.setdefault(section, {})[name] = value
    recipe = read(tables)
    assert recipe.model.attention == recipe.resolved()["model"]["attention"] == expected


def test_validation_data_must_be_there_to_be_evaluated_on() -> None:
    (found,) = problems(changed("evaluation", on="validation"))
    assert found == (
        'r.toml: data.validation_fraction must be above 0 where evaluation.on is "validation", got 0.0; 0.1 is usual'
    )


# --- recommendation -----------------------------------------------------------------------------------------------


def recommended(**sections: dict[str, object]) -> Tables:
    tables = smallest()
    tables["data"] = {"source": "movielens-100k"}
    tables["partition"] = {"kind": "column", "column": "group"}
    tables["recommendation"] = {"groups": 4}
    return tables | sections


def test_a_recommendation_is_read_and_reads_back() -> None:
    tables = recommended(click_model={"rounds": 2}, algorithm={"name": "reclora", "N": 3})
    recipe = read(tables)
    assert recipe.data.recommendation.groups == 4
    assert recipe.click_model is not None
    assert read_recipe(tomllib.loads(recipe.to_toml()), "again.toml") == recipe
    assert "click_model" not in read(smallest()).to_toml()


def test_reclora_must_have_user_vectors_or_no_gate() -> None:
    (problem,) = problems(recommended(algorithm={"name": "reclora"}))
    assert problem.startswith('r.toml: algorithm.gate must be "none" where no section [click_model]')
    assert read(recommended(algorithm={"name": "reclora", "gate": "none"})).click_model is None


def test_a_click_model_must_have_histories_and_clients_that_are_users() -> None:
    found = problems(recommended(click_model={}, data={"source": "vader"}))
    assert [problem.partition(" must")[0] for problem in found] == ["r.toml: data.source", "r.toml: data.source"]
    (problem,) = problems(recommended(click_model={}, partition={"num_clients": 3}))
    assert 'click_model.training must be "central" unless each client is a user or a group of users' in problem
    assert read(recommended(click_model={"training": "central"}, partition={"num_clients": 3})).click_model is not None


def test_movielens_may_be_evaluated_on_the_validation_rows_that_it_brings() -> None:
    assert read(recommended(evaluation={"on": "validation"})).evaluation.on == "validation"


def test_a_language_model_that_chooses_is_judged_by_a_classifiers_metrics() -> None:
    tables = recommended(
        model={"source": "smollm2-135m", "task": "causal-lm"},
        data={"source": "movielens-100k", "prompt": "prompt", "text": "answer", "answers": ["No", "Yes"]},
    )
    assert read(tables).evaluation.metric == "accuracy"
    assert read(tables | {"evaluation": {"metric": "auc"}}).evaluation.metric == "auc"
    (problem,) = problems(tables | {"evaluation": {"metric": "perplexity"}})
    assert "must be one of auto, accuracy, loss, auc" in problem
