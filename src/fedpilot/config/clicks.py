"""The first stage of Few2Many for a recipe: the click model is trained on all data, and gives each example its vector.

What is federated of it: with ``click_model.training = "federated"`` every client trains on its own ratings and sends
weights; its user vectors are then made from its own history by its own copy of the model, and stay in its examples.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.nn import functional as F

from fedpilot import assets, checkpoint, click_model
from fedpilot.assets import ASSETS
from fedpilot.attachments import USER_VECTOR
from fedpilot.click_model import ClickModel, Clicks, ClickSettings, TrainedClicks
from fedpilot.config.recipe import Recipe
from fedpilot.data.partition import PartitionSettings
from fedpilot.data.recommendation import (
    MOVIELENS,
    Interactions,
    RecommendationSettings,
    long_histories,
    movielens,
    parts,
)
from fedpilot.data.tables import Rows
from fedpilot.evaluation import area_under_curve

logger = logging.getLogger(__name__)

FOLDER = "click-models"
"""In the cache: click models by what they were trained from."""


@dataclass(frozen=True)
class ClickStage:
    """A trained click model over all ratings.

    Attributes:
        model: With the best round's weights.
        clicks: All ratings as it takes them.
        trained: How it came about.
    """

    model: ClickModel
    clicks: Clicks
    trained: TrainedClicks

    def side(self, rows: Rows) -> Mapping[str, torch.Tensor]:
        """The user vector (rows, d_h) of each example, under the batch's name for it."""
        return {USER_VECTOR: click_model.user_vectors(self.model, self.clicks, _numbers(rows))[0]}

    def metrics(self, rows: Rows) -> dict[str, float]:
        """The click model alone on these examples: what a language model with its vectors is held against."""
        numbers = _numbers(rows)
        _, odds = click_model.user_vectors(self.model, self.clicks, numbers)
        labels = self.clicks.labels[torch.from_numpy(numbers)]
        return {
            "accuracy": float(((odds > 0) == labels.bool()).float().mean()),
            "loss": float(F.binary_cross_entropy_with_logits(odds, labels)),
            "auc": area_under_curve(labels.numpy(), odds.numpy()) if 0 < labels.mean() < 1 else float("nan"),
        }

    def facts(self, test: Rows) -> dict[str, object]:
        """What a run records of the stage."""
        trained = self.trained
        return {
            "round": trained.round,
            "validation_loss": list(trained.log_losses),
            "bytes_down": trained.bytes_down,
            "bytes_up": trained.bytes_up,
            "test": self.metrics(test),
        }


def click_stage(recipe: Recipe) -> ClickStage | None:
    """The recipe's click model: from the cache where the same one was trained before; ``None`` where none is asked for.

    Raises:
        TrainingError: Training came to nothing.
    """
    settings = recipe.click_model
    if settings is None:
        return None
    found, choices = movielens(), recipe.data.recommendation
    clicks = Clicks.of(found, long_histories(found, choices))
    model = click_model.build(found, settings)
    file = _file(settings, choices, recipe.partition)
    trained = _read(file, model)
    if trained is None:
        logger.info("training the click model on all %d training ratings", len(parts(found, choices.split)[0]))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # so that its bits do not depend on the number
        try:
            trained = _train(model, clicks, found, settings, choices, recipe.partition)
        finally:
            torch.set_num_threads(threads)
        _write(file, trained)
    model.load_state_dict(dict(trained.weights))
    return ClickStage(model, clicks, trained)


def _train(
    model: ClickModel,
    clicks: Clicks,
    found: Interactions,
    settings: ClickSettings,
    choices: RecommendationSettings,
    partition: PartitionSettings,
) -> TrainedClicks:
    train, validation, _ = parts(found, choices.split)
    clients = [train]
    if settings.training == "federated":
        owners = found.users[train] % choices.groups if partition.column == "group" else found.users[train]
        clients = [train[owners == owner] for owner in np.unique(owners)]
    return click_model.train(model, clicks, clients, validation, settings)


def _numbers(rows: Rows) -> NDArray[np.int64]:
    return rows.column("row").astype(np.int64)


def _file(settings: ClickSettings, choices: RecommendationSettings, partition: PartitionSettings) -> Path:
    clients = partition.column if settings.training == "federated" else None
    what = [ASSETS[MOVIELENS].sha256, asdict(settings), asdict(choices), clients, torch.__version__]
    name = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
    return assets.cache_folder() / FOLDER / f"{name}.safetensors"


def _write(file: Path, trained: TrainedClicks) -> None:
    facts = {name: value for name, value in vars(trained).items() if name != "weights"}
    file.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.contiguous() for name, tensor in trained.weights.items()}
    checkpoint.write_file(file, save(weights, metadata={"facts": json.dumps(facts)}))


def _read(file: Path, model: ClickModel) -> TrainedClicks | None:
    """What was trained before; ``None`` where there is none, or it cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            facts = json.loads(opened.metadata()["facts"])
        if {name: tensor.shape for name, tensor in weights.items()} != _shapes(model):
            return None
        return TrainedClicks(
            weights, facts["round"], tuple(facts["log_losses"]), facts["bytes_down"], facts["bytes_up"]
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None


def _shapes(model: ClickModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}
