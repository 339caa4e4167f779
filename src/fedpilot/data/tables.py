"""What a data set is before a model sees it: rows of texts or images with classes and further columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, Union

import numpy as np
from numpy.typing import NDArray

from fedpilot.data.recommendation import RecommendationSettings
from fedpilot.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image  # an extra

TaskType: TypeAlias = Literal["sequence-classification", "image-classification", "causal-lm"]

AnyImage: TypeAlias = Union["Image", Path, NDArray[np.uint8]]
"""A decoded image, its file, or its bytes (height, width) or (height, width, 3)."""


Images: TypeAlias = Sequence[AnyImage] | NDArray[np.uint8]
"""Images of a table: one by one, or all in one array (n, height, width) or (n, height, width, 3)."""

Conversation: TypeAlias = tuple[tuple[str, str], ...]
"""Role and content of each turn."""


@dataclass(frozen=True)
class DataSettings:
    """Where data comes from and how it is split for training and testing.

    Attributes:
        source: A packaged name (``vader``, ``bbc``, ``fashion-mnist``, ``optdigits``, ``movielens-100k``), a file
            (``.csv``, ``.tsv``, ``.jsonl``, ``.parquet``), or a folder or hub id that ``datasets.load_dataset`` takes.
        task: What the data is read for.
        text: Column of the text.
        label: Column of the class; ``causal-lm`` keeps it, where it is there, for the partition only.
        image: Column of the image: in a file the path of each, relative to the file.
        prompt: Column of the text that stands before ``text`` and is not learnt (``causal-lm``).
        chat: Whether ``prompt`` and ``text`` are turns of a user and the assistant, put as the model's chat template
            says (``causal-lm``).
        messages: Column of whole conversations, lists of ``{"role", "content"}``, in place of ``prompt`` and ``text``;
            what the assistant says is learnt (``causal-lm``).
        columns: Further columns to keep, for partitioning and for figures by group; packaged sets keep theirs anyway.
        test: Test file, or name of the hub's test split; without one ``test_fraction`` is held out, unless the source
            brings a test set.
        test_fraction: Share of rows held out, evenly over classes and kept columns.
        config: Name of a hub data set's configuration.
        split: Name of the hub's training split.
        limit: Training rows kept at most, evenly over classes and kept columns.
        test_limit: The same for test rows.
        validation_fraction: Share of the training rows, after ``limit``, that is held out for choosing settings, evenly
            over classes and kept columns; no client trains on it. 0 for none.
        public_fraction: Share of the training rows, after the validation rows, that the server holds and no client has;
            0 for none.
        seed: Of the splits and the limits.
        labels: Classes in this order; empty for those that the training rows have. A node takes the server's, which
            its own rows may have a part of only.
        answers: Texts that stand for the classes, in their order, where a language model chooses among them
            (``causal-lm``): the figures of a classifier are then given for the choice. One token each.
        recommendation: How ratings become examples, for ``movielens-100k``.
    """

    source: str
    task: TaskType = "sequence-classification"
    text: str = "text"
    label: str = "label"
    image: str = "image"
    prompt: str | None = None
    chat: bool = False
    messages: str | None = None
    columns: tuple[str, ...] = ()
    test: str | None = None
    test_fraction: float = 0.2
    config: str | None = None
    split: str = "train"
    limit: int | None = None
    test_limit: int | None = None
    validation_fraction: float = 0.0
    public_fraction: float = 0.0
    seed: int = 0
    labels: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    recommendation: RecommendationSettings = field(default_factory=RecommendationSettings)


@dataclass(frozen=True)
class Rows:
    """Examples of one table; all sequences have the same length.

    Attributes:
        labels: (n,) classes; zeros where there are none.
        texts: Texts, or empty for images.
        prompts: What stands before each text, or empty.
        conversations: Turns to be put by the model's chat template, or empty.
        images: Images, or empty for texts.
        columns: Further columns by name, as strings.
    """

    labels: NDArray[np.int64]
    texts: Sequence[str] = ()
    prompts: Sequence[str] = ()
    images: Images = ()
    columns: Mapping[str, NDArray[np.str_]] = field(default_factory=dict)
    conversations: Sequence[Conversation] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def column(self, name: str) -> NDArray[np.str_]:
        """A further column.

        Raises:
            DataError: It was not kept.
        """
        if name not in self.columns:
            kept = ", ".join(sorted(self.columns)) or "none"
            raise DataError(f"column must be one that was kept ({kept}), got {name!r}; name it in the data's columns")
        return self.columns[name]

    def take(self, indices: NDArray[np.int64]) -> "Rows":
        """The rows at the given positions, in that order."""
        images = self.images
        return Rows(
            labels=self.labels[indices],
            texts=[self.texts[index] for index in indices] if len(self.texts) else (),
            prompts=[self.prompts[index] for index in indices] if len(self.prompts) else (),
            images=images[indices] if isinstance(images, np.ndarray) else [images[i] for i in indices if len(images)],
            columns={name: values[indices] for name, values in self.columns.items()},
            conversations=[self.conversations[index] for index in indices] if len(self.conversations) else (),
        )


@dataclass(frozen=True)
class Table:
    """A data set split for training and testing.

    Attributes:
        train: Rows that are divided among clients.
        test: Rows that the server evaluates on.
        label_names: Class -> its name; empty where there are no classes.
        validation: Rows held out of the training data for choosing settings; ``None`` where none were asked for.
        public: Rows of the training data that the server holds; ``None`` where none were asked for.
    """

    train: Rows
    test: Rows
    label_names: tuple[str, ...] = ()
    validation: Rows | None = None
    public: Rows | None = None
