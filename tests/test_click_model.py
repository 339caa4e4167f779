"""The click model, on made-up users of whom half like comedies and half dramas."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fedpilot import click_model
from fedpilot.click_model import Clicks, ClickSettings
from fedpilot.data.recommendation import Film, Interactions, RecommendationSettings, long_histories, parts
from fedpilot.errors import TrainingError

SETTINGS = ClickSettings(rounds=4, batch_size=32, embedding=4, width=6, dropout=0.0)


@pytest.fixture(scope="module")
def found() -> Interactions:
    """Twenty users rate twenty films in an order of their own, one an hour; their number's parity is their taste."""
    rng = np.random.default_rng(0)
    films = (Film("", "", ()), *(Film(f"Film {n}", "", ("Comedy" if n % 2 else "Drama",)) for n in range(1, 21)))
    order = np.concatenate([rng.permutation(20) + 1 for _ in range(20)])
    users = np.repeat(np.arange(20), 20)
    stars = np.where((order + users) % 2 == 1, 5, 1)
    times = np.tile(np.arange(20), 20) * 60 + users
    new = np.argsort(times)
    return Interactions(users[new], order[new].astype(np.int64), stars[new], times[new], films)


@pytest.fixture(scope="module")
def clicks(found: Interactions) -> Clicks:
    return Clicks.of(found, long_histories(found, RecommendationSettings(long=8)))


def shares(found: Interactions, rows: np.ndarray) -> list[np.ndarray]:
    """Clients of five users each."""
    return [rows[found.users[rows] // 5 == client] for client in range(4)]


def auc(odds: torch.Tensor, labels: torch.Tensor) -> float:
    return float((odds[labels == 1][:, None] > odds[labels == 0][None]).float().mean())


@pytest.mark.parametrize("training", ["federated", "central"])
def test_it_learns_from_histories_what_a_user_likes(found: Interactions, clicks: Clicks, training: str) -> None:
    train, validation, test = parts(found, "time")
    settings = replace(SETTINGS, training=training, rounds=12, batch_size=8)  # type: ignore[arg-type]
    model = click_model.build(found, settings)
    trained = click_model.train(model, clicks, shares(found, train), validation, settings)
    vectors, odds = click_model.user_vectors(model, clicks, test)
    assert vectors.shape == (len(test), 6)
    assert auc(odds, clicks.labels[torch.from_numpy(test)]) > 0.9
    assert trained.log_losses[trained.round - 1] == min(trained.log_losses)


def test_bytes_of_the_stage_are_counted_for_every_client_and_round(found: Interactions, clicks: Clicks) -> None:
    train, validation, _ = parts(found, "time")
    model = click_model.build(found, SETTINGS)
    trained = click_model.train(model, clicks, shares(found, train), validation, SETTINGS)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert trained.bytes_up == trained.bytes_down == 4 * 4 * weights
    central = replace(SETTINGS, training="central", rounds=1)
    assert click_model.train(model, clicks, shares(found, train), validation, central).bytes_up == 0


def test_a_client_without_ratings_takes_no_part(found: Interactions, clicks: Clicks) -> None:
    train, validation, _ = parts(found, "time")
    one = replace(SETTINGS, rounds=1)
    results = []
    for clients in (shares(found, train), [*shares(found, train), train[:0]]):
        model = click_model.build(found, one)
        results.append(click_model.train(model, clicks, clients, validation, one))
    assert results[0].bytes_up == results[1].bytes_up
    assert all(torch.equal(results[0].weights[name], results[1].weights[name]) for name in results[0].weights)
    with pytest.raises(TrainingError, match="must have training rows"):
        click_model.train(click_model.build(found, one), clicks, [train[:0]], validation, one)


def test_one_round_of_federated_training_is_the_weighted_mean_of_its_clients(
    found: Interactions, clicks: Clicks
) -> None:
    train, validation, _ = parts(found, "time")
    one = replace(SETTINGS, rounds=1)
    clients = [train[:50], train[50:170]]
    model = click_model.build(found, one)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    both = click_model.train(model, clicks, clients, validation, one).weights
    alone = [click_model._local(model, clicks, start, rows, one, (0, 1, k)) for k, rows in enumerate(clients)]
    for name, tensor in both.items():
        torch.testing.assert_close(tensor, (50 * alone[0][name] + 120 * alone[1][name]) / 170)


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_generator_alone(
    found: Interactions, clicks: Clicks
) -> None:
    train, validation, _ = parts(found, "time")
    settings = replace(SETTINGS, rounds=1, dropout=0.3)
    results = []
    for ambient, seed in ((1, 0), (2, 0), (2, 1)):
        torch.manual_seed(ambient)
        before = torch.get_rng_state()
        chosen = replace(settings, seed=seed)
        model = click_model.build(found, chosen)
        results.append(click_model.train(model, clicks, shares(found, train), validation, chosen).weights)
        assert torch.equal(torch.get_rng_state(), before)
    first, second, other = results
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_padding_of_a_history_counts_for_nothing(found: Interactions, clicks: Clicks) -> None:
    model = click_model.build(found, SETTINGS)
    row = torch.tensor([250])
    items, history, stars = clicks.take(row)
    longer = [torch.cat([tensor, torch.zeros(1, 5, dtype=tensor.dtype)], dim=1) for tensor in (history, stars)]
    torch.testing.assert_close(model.user_vectors(items, history, stars), model.user_vectors(items, *longer))
    turned = torch.where(stars > 0, 6 - stars, 0)
    assert not torch.allclose(model.user_vectors(items, history, stars), model.user_vectors(items, history, turned))


@pytest.mark.parametrize(
    ("field", "value"), [("rounds", 0), ("width", 0), ("batch_size", 0), ("learning_rate", 0.0), ("dropout", 1.0)]
)
def test_settings_say_what_they_must_be(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} must"):
        ClickSettings(**{field: value})  # type: ignore[arg-type]
