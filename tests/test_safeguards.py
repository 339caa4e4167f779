"""Safeguards in a recipe: read, checked with everything else, handed to whom they belong."""

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedpilot.algorithms import ALGORITHMS
from fedpilot.config.clients import Clients
from fedpilot.config.population import Population
from fedpilot.config.recipe import Recipe, load_recipe, read_recipe
from fedpilot.errors import ConfigError, PlanError
from fedpilot.model import AdaptedModel
from fedpilot.privacy.client_dp import ClientDP, LocalNoise
from fedpilot.privacy.secure_settings import SecureAggregation
from fedpilot.robust import Robust
from fedpilot.safeguards import NONE, Safeguards
from fedpilot.screening import Screening
from fedpilot.types import ClientProfile

TINY = Path(__file__).parent.parent / "recipes" / "tiny.toml"


def recipe(*overrides: str) -> Recipe:
    """The tiny recipe with a method that safeguards suit, and no baseline."""
    tables = tomllib.loads(TINY.read_text())
    del tables["baseline"]
    tables["algorithm"] = {"name": "fedit", "weights": "uniform"}
    return read_recipe(tables, "recipe.toml", overrides)


def test_a_recipe_without_them_has_none() -> None:
    assert recipe().safeguards == NONE


def test_a_recipe_gives_them_as_they_are_written_and_they_survive_the_file(tmp_path: Path) -> None:
    found = recipe(
        *("defence.max_norm_factor=5", 'defence.clip="median"', 'defence.rule="trimmed-mean"'),
        *("defence.attackers=0.1", 'privacy.kind="local"', "privacy.clip=0.5", "privacy.noise_multiplier=4"),
        *("privacy.max_epsilon=8", "privacy.delta=1e-4"),
    )
    private = ClientDP("local", 0.5, 4.0, 1e-4, 8.0)
    assert found.safeguards == Safeguards(Screening(5.0, "median"), Robust("trimmed-mean", 0.1), private)
    file = tmp_path / "again.toml"
    file.write_text(found.to_toml())
    assert load_recipe(file).safeguards == found.safeguards


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("defence.max_norm_factor=0.5", "defence.max_norm_factor must be above 1, got 0.5"),
        ('defence.rule="krum"', "defence.rule must be one of"),
        ("defence.attackers=0.5", "defence.attackers must lie in"),
        ('defence.clip="mean"', "defence.clip must be one of"),
        ('privacy.kind="clients"', "privacy.kind must be one of"),
        ("privacy.delta=1", "privacy.delta must lie strictly between 0 and 1"),
        ("privacy.max_epsilon=0", "privacy.max_epsilon must be positive"),
    ],
)
def test_a_wrong_value_is_named_with_its_rule(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(override)
    assert any(message in problem for problem in caught.value.problems)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (('algorithm.weights="examples"', 'defence.rule="median"'), "defence.rule 'median' must replace a plain mean"),
        (('algorithm.weights="examples"', 'privacy.kind="client"'), "privacy.kind 'client' must go with a method"),
        (('defence.rule="median"', 'privacy.kind="client"'), "privacy.kind 'client' must go without screening"),
        (("defence.max_norm_factor=3", 'privacy.kind="client"'), "privacy.kind 'client' must go without screening"),
    ],
)
def test_what_does_not_go_together_is_a_problem_of_the_recipe(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(*overrides)
    assert [problem for problem in caught.value.problems if message in problem], caught.value.problems


UNIFORM: dict[str, Any] = {"weights": "uniform"}
ALL, OPEN = ("client", "local", "secure"), ("local", "secure")

ACCEPTED: dict[str, list[tuple[dict[str, Any], tuple[str, ...]]]] = {
    "fed-hello": [(UNIFORM, ())],
    "fed-pilot": [
        (UNIFORM, ()),
        ({"aggregation": "layerwise", **UNIFORM}, ()),
        ({"aggregation": "layerwise", "solver": "random"}, OPEN),
        ({"aggregation": "layerwise", "solver": "suffix", "temporal_mean": 4.0}, OPEN),
        *(({"aggregation": "layerwise", "solver": s, **UNIFORM}, ALL) for s in ("suffix", "random", "all")),
    ],
    "fedaf": [({}, ())],
    "fedbiot": [({}, OPEN), (UNIFORM, ALL), ({"adapter_blocks": 1, **UNIFORM}, ALL)],
    "fedex-lora": [(UNIFORM, ())],
    "fedins": [({}, ALL), ({"participation": "all", "pool": "lora"}, ALL), ({"weights": "examples"}, OPEN)],
    "fedit": [({}, OPEN), (UNIFORM, ALL), ({"participation": "straggler", **UNIFORM}, ALL)],
    "fedra": [(UNIFORM, ())],
    "ffa-lora": [
        ({}, OPEN),
        (UNIFORM, ALL),
        ({"participation": "ranks", **UNIFORM}, ALL),
        ({"participation": "straggler", **UNIFORM}, ALL),
        ({"noise_multiplier": 1.0, **UNIFORM}, ()),
        ({"epsilon": 3.0, **UNIFORM}, ()),
    ],
    "flexlora": [(UNIFORM, ())],
    "flora": [(UNIFORM, ())],
    "galore": [(UNIFORM, ())],
    "hetlora": [
        (UNIFORM, ()),
        ({"gamma": 1.0}, ("local",)),
        ({"gamma": 1.0, "weights": "examples"}, OPEN),
        ({"gamma": 1.0, **UNIFORM}, ALL),
    ],
    "lora-fair": [(UNIFORM, ())],
    "reclora": [
        (UNIFORM, ()),
        ({"gate": "none"}, OPEN),
        ({"gate": "none", **UNIFORM}, ALL),
        ({"gate": "none", "participation": "suffix", **UNIFORM}, ALL),
    ],
    "xgblora": [(UNIFORM, ())],
}
"""Method -> options, and what they go with: a new method states it here, and in docs/privacy.md."""


@pytest.mark.parametrize("name", ALGORITHMS)
def test_which_methods_go_with_privacy_and_secure_sums(name: str) -> None:
    guards = {kind: Safeguards(private=ClientDP(kind, 1.0, 1.0)) for kind in ("client", "local")}  # type: ignore[arg-type]
    guards["secure"] = Safeguards(secure=SecureAggregation())
    for options, accepted in ACCEPTED[name]:
        made = ALGORITHMS[name](**{"spec": None, "profile": None}, **options)
        found = {kind: guard.problems(made) for kind, guard in guards.items()}
        assert {kind for kind, problems in found.items() if not problems} == set(accepted), options
        assert all("; take fedit, " in text for problems in found.values() for _, text in problems)


def test_a_click_model_that_learnt_from_the_clients_is_named_as_the_reason() -> None:
    for override in ('privacy.kind="client"', 'privacy.kind="local"', "privacy.secure_aggregation=true"):
        with pytest.raises(ConfigError, match=r"before the rounds.*reclora with gate 'none'"):
            recipe('algorithm.name="reclora"', override)


def test_a_baseline_must_suit_the_safeguards_too() -> None:
    with pytest.raises(ConfigError, match="got FLoRA, which does not average"):
        recipe('baseline.name="flora"', 'defence.rule="median"')


def test_a_client_gets_its_own_noise_and_only_in_local_runs() -> None:
    people = SimpleNamespace(clients=[ClientProfile(k, 5, 10**9) for k in range(3)], examples=[None] * 3)

    def release(kind: str, client_id: int, round: int) -> Any:
        made = recipe(f'privacy.kind="{kind}"', "privacy.noise_multiplier=4", "run.seed=6")
        clients = Clients(made, cast(Population, people), cast(AdaptedModel, None))
        return clients.site(client_id, round).release

    assert release("none", 0, 1) is None
    assert release("client", 0, 1) is None
    found = [release("local", client_id, round) for client_id, round in ((0, 1), (1, 1), (1, 2))]
    assert found == [LocalNoise(ClientDP("local", 1.0, 4.0), (6, k, t)) for k, t in ((0, 1), (1, 1), (1, 2))]


def test_a_budget_ends_a_run_by_the_share_that_is_sampled() -> None:
    people = [ClientProfile(k, 5, 10**9) for k in range(10)]
    guards = Safeguards(private=ClientDP("client", 1.0, 1.0, max_epsilon=6.0))
    assert NONE.last_round(50, people, None) == 50
    assert guards.last_round(50, people, None) < guards.last_round(50, people, 2) <= 50
    with pytest.raises(PlanError, match="max_epsilon must allow one round"):
        Safeguards(private=ClientDP("client", 1.0, 0.1, max_epsilon=1.0)).last_round(50, people, None)
