"""A sequential click model: reads a user's long history and gives, for a user and a film, a vector and a click's odds.

In the style of DIN: Zhou et al., "Deep Interest Network for Click-Through Rate Prediction", 2018, arXiv 1706.06978. The
history is weighed by how each entry bears on the film asked for; there is no parameter of a user, so the model serves
users whom it never saw, and it can be trained by federated averaging without any history leaving its client.

Differs from the paper: an entry of the history carries the stars that the user gave; plain ReLU layers in place of the
adaptive activation.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from fedpilot.data.recommendation import Interactions
from fedpilot.errors import TrainingError
from fedpilot.tensors import is_finite, num_bytes, weighted_mean
from fedpilot.types import Tensors

logger = logging.getLogger(__name__)

Indices = NDArray[np.int64]

MAX_STARS = 5


@dataclass(frozen=True)
class ClickSettings:
    """The click model and its training, the first stage of Few2Many; the section ``[click_model]`` of a recipe.

    Attributes:
        training: ``federated``: the recipe's clients train it by federated averaging, and no history leaves them.
            ``central``: one place sees all training ratings, as in the paper.
        rounds: Rounds, or epochs of ``central``; the one that is best on the validation rows counts.
        learning_rate: Of Adam, on each client anew in every round; ``central`` wants about a fifth of the default.
        batch_size: Examples of a step.
        embedding: Width of a film's vector.
        width: d_h, width of the user vector.
        dropout: Before the last two layers.
        weight_decay: Decoupled.
        seed: Of weights, orders and dropout.
    """

    training: Literal["federated", "central"] = "federated"
    rounds: int = 8
    learning_rate: float = 1e-2
    batch_size: int = 128
    embedding: int = 16
    width: int = 32
    dropout: float = 0.2
    weight_decay: float = 1e-4
    seed: int = 0

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least 1, got {getattr(self, name)}"
            for name in ("rounds", "batch_size", "embedding", "width")
            if getattr(self, name) < 1
        ]
        if not self.learning_rate > 0:
            problems.append(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must lie in [0, 1), got {self.dropout}")
        if problems:
            raise ValueError("; ".join(problems))


class ClickModel(nn.Module):
    """DIN over films with genres and stars.

    Args:
        genres: (films + 1, genres) 1 where a film has a genre; row 0 stands for no film.
        settings: Widths and dropout.
    """

    def __init__(self, genres: torch.Tensor, settings: ClickSettings) -> None:
        super().__init__()
        e = settings.embedding
        self.register_buffer("genres", genres, persistent=False)
        self.film = nn.Embedding(genres.shape[0], e, padding_idx=0)
        self.genre = nn.Linear(genres.shape[1], e, bias=False)
        self.star = nn.Embedding(MAX_STARS + 1, e, padding_idx=0)
        self.attention = nn.Sequential(nn.Linear(4 * e, 2 * e), nn.ReLU(), nn.Linear(2 * e, 1))
        self.body = nn.Sequential(
            nn.Linear(5 * e, 2 * settings.width),
            nn.ReLU(),
            nn.Dropout(settings.dropout),
            nn.Linear(2 * settings.width, settings.width),
            nn.ReLU(),
        )
        self.drop = nn.Dropout(settings.dropout)
        self.out = nn.Linear(settings.width, 1)
        with torch.no_grad():
            for table in (self.film, self.star):
                table.weight.mul_(0.1)

    def user_vectors(self, items: torch.Tensor, history: torch.Tensor, stars: torch.Tensor) -> torch.Tensor:
        """h_u (examples, width) of (user, film).

        Args:
            items: (examples,) the films asked for.
            history: (examples, K) films rated before; 0 where there is none.
            stars: (examples, K) their stars.
        """
        target, entries, there = self._films(items), self._films(history), (history > 0).unsqueeze(-1)
        asked = target.unsqueeze(1).expand_as(entries)
        weights = self.attention(torch.cat([entries, asked, entries * asked, entries - asked], dim=-1))
        weights = weights.masked_fill(~there, 0.0)
        # Not normalised, as in DIN: how much of the history bears on the film is itself a sign.
        count = there.sum(dim=1).clamp(min=1)
        told = entries + self.star(stars)
        interest = (weights * told).sum(dim=1) / count.sqrt()
        usual = (told * there).sum(dim=1) / count
        hidden: torch.Tensor = self.body(torch.cat([target, interest, usual, target * interest, target * usual], -1))
        return hidden

    def forward(self, items: torch.Tensor, history: torch.Tensor, stars: torch.Tensor) -> torch.Tensor:
        """Log-odds of a click (examples,)."""
        odds: torch.Tensor = self.out(self.drop(self.user_vectors(items, history, stars))).squeeze(-1)
        return odds

    def _films(self, items: torch.Tensor) -> torch.Tensor:
        genres = self.get_buffer("genres")[items]
        vectors: torch.Tensor = self.film(items) + self.genre(genres)
        return vectors


@dataclass(frozen=True)
class Clicks:
    """All examples as the click model takes them.

    Attributes:
        items: (n,) films asked for.
        history: (n, K) films rated before, 0 where there is none.
        stars: (n, K) their stars.
        labels: (n,) 1 for a click.
    """

    items: torch.Tensor
    history: torch.Tensor
    stars: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def of(cls, found: Interactions, histories: Indices) -> "Clicks":
        """From ratings and the positions of each one's long history, -1 for none."""
        there = histories >= 0
        return cls(
            torch.from_numpy(found.items),
            torch.from_numpy(np.where(there, found.items[histories], 0)),
            torch.from_numpy(np.where(there, found.stars[histories], 0)),
            torch.from_numpy(found.clicks).float(),
        )

    def take(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Inputs of the model for the rows."""
        return self.items[rows], self.history[rows], self.stars[rows]


@dataclass(frozen=True)
class TrainedClicks:
    """What the first stage ends with.

    Attributes:
        weights: The click model's.
        round: The round that was best on the validation rows.
        log_losses: On the validation rows, after each round.
        bytes_down: That all clients together received; 0 of ``central``.
        bytes_up: That they sent.
    """

    weights: Tensors
    round: int
    log_losses: tuple[float, ...]
    bytes_down: int = 0
    bytes_up: int = 0


def build(found: Interactions, settings: ClickSettings) -> ClickModel:
    """A fresh model, drawn from the settings' seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return ClickModel(torch.from_numpy(found.genres), settings)


def train(
    model: ClickModel, clicks: Clicks, clients: Sequence[Indices], validation: Indices, settings: ClickSettings
) -> TrainedClicks:
    """Few2Many's first stage; the model holds the best round's weights afterwards.

    Args:
        model: Where training starts.
        clicks: All examples.
        clients: Each client's training rows; ``central`` trains on all of them as one.
        validation: Rows that the best round is chosen by.
        settings: How.

    Raises:
        TrainingError: There are no training rows, or the weights are not finite.
    """
    federated = settings.training == "federated"
    shares = [rows for rows in clients if len(rows)] if federated else [np.concatenate([*clients])]
    if not sum(map(len, shares)):
        raise TrainingError("a click model must have training rows, got none; give clients data")
    weights: Tensors = _weights(model)
    losses: list[float] = []
    best, best_round = weights, 0
    for round in range(1, settings.rounds + 1):
        uploads = (
            (_local(model, clicks, weights, rows, settings, (settings.seed, round, client)), float(len(rows)))
            for client, rows in enumerate(shares)
        )
        weights = weighted_mean(uploads)
        model.load_state_dict(dict(weights))
        losses.append(_log_loss(model, clicks, validation))
        logger.info("click model, round %d: log-loss %.4f on validation rows", round, losses[-1])
        if losses[-1] <= min(losses):
            best, best_round = weights, round
    if not is_finite(best):
        raise TrainingError("the click model's weights must be finite, got NaN or infinity; lower its learning_rate")
    model.load_state_dict(dict(best))
    travelled = settings.rounds * len(shares) * num_bytes(best) if federated else 0
    return TrainedClicks(best, best_round, tuple(losses), travelled, travelled)


def user_vectors(model: ClickModel, clicks: Clicks, rows: Indices) -> tuple[torch.Tensor, torch.Tensor]:
    """h_u (rows, width) and the log-odds of a click (rows,), dropout off; what each client computes of its own rows."""
    vectors, odds = [], []
    model.eval()
    with torch.no_grad():
        for batch in _batches(torch.from_numpy(rows), 1024):
            hidden = model.user_vectors(*clicks.take(batch))
            vectors.append(hidden)
            odds.append(model.out(hidden).squeeze(-1))
    return torch.cat(vectors), torch.cat(odds)


def _local(
    model: ClickModel, clicks: Clicks, start: Tensors, rows: Indices, settings: ClickSettings, seed: Sequence[int]
) -> Tensors:
    """One epoch on a client's rows from the given weights."""
    model.load_state_dict(dict(start))
    model.train()
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=False
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence(list(seed)).generate_state(1)[0]))
        order = torch.from_numpy(rows)[torch.randperm(len(rows))]
        for batch in _batches(order, settings.batch_size):
            optimiser.zero_grad()
            F.binary_cross_entropy_with_logits(model(*clicks.take(batch)), clicks.labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return _weights(model)


def _weights(model: ClickModel) -> Mapping[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _log_loss(model: ClickModel, clicks: Clicks, rows: Indices) -> float:
    _, odds = user_vectors(model, clicks, rows)
    return float(F.binary_cross_entropy_with_logits(odds, clicks.labels[torch.from_numpy(rows)]))


def _batches(rows: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    yield from torch.split(rows, size)
