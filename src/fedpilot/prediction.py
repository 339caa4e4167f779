"""A run's model on new inputs: the global one, a client's own, or one that adapts to each input."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from fedpilot import data, jobs, training
from fedpilot.config import setup
from fedpilot.config.population import data_settings, in_few_widths, load_population
from fedpilot.config.recipe import Recipe
from fedpilot.data import EncodedDataset, Rows
from fedpilot.data.encoded import descending
from fedpilot.data.language_modelling import PROMPT_TEMPLATE
from fedpilot.data.text import load_tokenizer
from fedpilot.errors import ConfigError, DataError
from fedpilot.evaluation import choice
from fedpilot.model import AdaptedModel, build_model
from fedpilot.record import RunDirectory
from fedpilot.types import Deployment, ModelSpec, Personalises

Which: TypeAlias = Literal["best", "last"]


@dataclass(frozen=True)
class Prediction:
    """What a model says of one input.

    Attributes:
        label: The likeliest class; ``None`` of a language model without classes.
        probabilities: Class -> probability, in the run's order.
        continuation: What a language model without classes goes on with.
    """

    label: str | None = None
    probabilities: Mapping[str, float] = field(default_factory=dict)
    continuation: str | None = None


def predict(
    directory: str | Path, texts: Sequence[str], *, client: str | None = None, which: Which = "best"
) -> list[Prediction]:
    """What a run's model says of texts; see `Predictor`, which loads the model once for many calls."""
    return Predictor.open(directory, client=client, which=which).texts(texts)


@dataclass(frozen=True)
class Predictor:
    """A run's model, loaded.

    Attributes:
        recipe: Of the run.
        adapted: Holds the deployment.
        labels: Names of the classes; empty for a language model without answers.
        batch_size: Inputs of one forward pass.
        max_words: Most tokens of a continuation.
    """

    recipe: Recipe
    adapted: AdaptedModel
    labels: tuple[str, ...]
    batch_size: int = 32
    max_words: int = 32

    @classmethod
    def open(cls, directory: str | Path, *, client: str | None = None, which: Which = "best") -> "Predictor":
        """Loads the model of a run directory.

        Args:
            directory: Of the run.
            client: Name of the client whose own model it is to be; ``None`` for everybody's.
            which: ``best`` by the recipe's metric, or ``last``.

        Raises:
            RecordError: There is no run, or no such adapter.
            ConfigError: The method has no model of a client's own, or there is no such client.
            FedpilotError: The base model, or a client's data, cannot be had.
        """
        path = Path(directory)
        found = RunDirectory.open(path)
        recipe, labels = jobs.recipe_of(path), jobs.label_names(found)
        deployment, _ = found.load_adapter(which)
        adapted = build_model(
            setup.resolved_model(recipe),
            num_labels=None if recipe.model.task == "causal-lm" else len(labels),
            device=setup.device_of(recipe),
            seed=recipe.run.seed,
        )
        adapted.deploy(of_client(recipe, adapted.spec, deployment, client))
        adapted.base.eval()
        return cls(recipe, adapted, recipe.data.answers if recipe.model.task == "causal-lm" else labels)

    def texts(self, texts: Sequence[str]) -> list[Prediction]:
        """One prediction a text; to a language model it is the prompt.

        Raises:
            ConfigError: The run's model takes images.
            DataError: A text is empty.
        """
        task, recipe = self.recipe.model.task, self.recipe
        if task == "image-classification":
            raise ConfigError(["texts must go to a model of texts, got one of images; give a table with --data"])
        if any(not text.strip() for text in texts):
            raise DataError("a text must not be empty, got an empty one; leave it out")
        if task == "causal-lm" and recipe.data.prompt is not None:
            return self.rows(Rows(np.zeros(len(texts), np.int64), texts=[""] * len(texts), prompts=list(texts)))
        return self.rows(Rows(np.zeros(len(texts), np.int64), texts=list(texts)))

    def table(self, file: str | Path) -> list[Prediction]:
        """One prediction a row of a table with the run's columns; classes are not needed.

        Raises:
            DataError: The file cannot be read, or lacks a column.
        """
        settings = replace(data_settings(self.recipe), source=str(file), test=None, limit=None)
        if self.recipe.model.task == "causal-lm" and settings.prompt is not None:
            settings = replace(settings, text=settings.prompt)  # what is to be said is not there yet
        return self.rows(data.load_inputs(settings))

    def rows(self, rows: Rows) -> list[Prediction]:
        """One prediction a row, in their order."""
        if self.recipe.model.task == "causal-lm" and not self.labels:
            return self._continued(rows.prompts if len(rows.prompts) else rows.texts)
        if self.recipe.model.task == "causal-lm":  # any answer will do: the place before it is what is asked
            rows = replace(rows, texts=[self.labels[0]] * len(rows))
        encoded = data.encode(
            rows,
            task=self.recipe.model.task,
            model=self.adapted.settings.source,
            max_length=self.recipe.model.max_length,
            image_size=self.recipe.model.image_size,
            name="inputs",
            answers=self.recipe.data.answers,
        )
        return [self._named(row) for row in self.probabilities(in_few_widths(self.recipe, encoded))]

    @torch.no_grad()
    def probabilities(self, examples: EncodedDataset) -> torch.Tensor:
        """(examples, classes) in their order, on the CPU."""
        parts: list[torch.Tensor] = []
        for made in examples.batches(self.batch_size, None):  # the longest first
            batch = training.on_device(made, self.adapted.device)
            with training.arithmetic(self.recipe.training.autocast, self.adapted.device.type):
                logits = self.adapted.logits(batch)
            if examples.answers:
                logits, _ = choice(logits, batch["labels"], examples.answers)
            parts.append(logits.float().softmax(dim=-1).cpu())
        sorted_by_length = torch.cat(parts)
        result = torch.empty_like(sorted_by_length)
        result[torch.from_numpy(descending(examples.lengths))] = sorted_by_length
        return result

    def _named(self, row: torch.Tensor) -> Prediction:
        shares = dict(zip(self.labels, row.tolist(), strict=True))
        return Prediction(max(shares, key=lambda name: shares[name]), shares)

    @torch.no_grad()
    def _continued(self, prompts: Sequence[str]) -> list[Prediction]:
        """The likeliest next token, again and again, up to ``max_words`` or the end of text."""
        tokenizer: Any = load_tokenizer(self.adapted.settings.source)
        template = "{prompt}" if self.recipe.data.prompt is None else PROMPT_TEMPLATE
        result = []
        for prompt in prompts:
            words = tokenizer([template.format(prompt=prompt)], add_special_tokens=False)["input_ids"][0]
            words = words[: self.recipe.model.max_length - 1]
            made: list[int] = []
            while len(made) < self.max_words and len(words) + len(made) < self.recipe.model.max_length:
                tokens = torch.tensor([[*words, *made]], device=self.adapted.device)
                with training.arithmetic(self.recipe.training.autocast, self.adapted.device.type):
                    logits = self.adapted.logits({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
                word = int(logits[0, -1].argmax())
                if word == tokenizer.eos_token_id:
                    break
                made.append(word)
            result.append(Prediction(continuation=tokenizer.decode(made)))
        return result


def of_client(
    recipe: Recipe, spec: ModelSpec, deployment: Deployment, client: str | None, *, plain: bool = False
) -> Deployment:
    """A client's own deployment; without a client everybody's, which needs no column but the model's own inputs.

    Args:
        recipe: Of the run.
        spec: Its model.
        deployment: Its outcome.
        client: Name; ``None`` for everybody.
        plain: Whether everybody's too is to be as plain pairs, where the method can say it so.

    Raises:
        ConfigError: The method has no model of a client's own, or there is no such client.
    """
    attachment = deployment.attachment
    if client is None and (attachment is None or not (plain or attachment.columns)):
        return deployment
    people = load_population(recipe)
    method = setup.algorithm(recipe.algorithm, recipe, spec, None, people)
    if client is None and not isinstance(method, Personalises):
        return deployment
    if not isinstance(method, Personalises):
        raise ConfigError(
            [f"--client must be left out for {recipe.algorithm.name}, whose model is the same for all, got {client!r}"]
        )
    if client is None:
        return method.personal(deployment, {})
    names = [profile.name for profile in people.clients]
    if client not in names:
        some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ConfigError([f"--client must be a client of the run, got {client!r}; there are {some}"])
    return method.personal(deployment, people.examples[names.index(client)].side)
