"""From a data source to a checked table of training and test rows."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedpilot.data.chat import ASSISTANT, conversations
from fedpilot.data.files import SUFFIXES, read_file, read_hub
from fedpilot.data.packaged import PACKAGED, Column, Columns, Raw
from fedpilot.data.recommendation import MOVIELENS, read_movielens
from fedpilot.data.sampling import spread, strata
from fedpilot.data.tables import Conversation, DataSettings, Images, Rows, Table
from fedpilot.data.vision import check_images, decoded
from fedpilot.errors import DataError

logger = logging.getLogger(__name__)


def load(settings: DataSettings) -> Table:
    """Reads, checks and splits a data set.

    Raises:
        DataError: The source cannot be read, or lacks a column, or has rows without text or class, or an image that
            cannot be opened, or a single class, or a class that only the test rows have.
        AssetError: A packaged source cannot be fetched.
    """
    _check(settings)
    raw = read(settings)
    names = _label_names(raw, settings)
    train = _rows(raw, raw.train, settings, names, settings.source)
    if raw.test is not None:
        test = _rows(raw, raw.test, settings, names, settings.test or f"{settings.source} (test)")
    else:
        train, test = _held_out(train, settings.test_fraction, [settings.seed, 0], "test_fraction")
    train = _limited(train, settings.limit, settings.seed)
    test = _limited(test, settings.test_limit, settings.seed + 1)
    _check_classes(train, test, names)
    validation = None
    if raw.validation is not None:
        validation = _rows(raw, raw.validation, settings, names, f"{settings.source} (validation)")
        validation = _limited(validation, settings.test_limit, settings.seed + 2)
    elif settings.validation_fraction:
        seed = [settings.seed, 2]
        train, validation = _held_out(train, settings.validation_fraction, seed, "validation_fraction")
    public = None
    if settings.public_fraction:
        train, public = _held_out(train, settings.public_fraction, [settings.seed, 3], "server.fraction")
    logger.info("%s: %d training and %d test rows, %d classes", settings.source, len(train), len(test), len(names))
    return Table(train, test, names, validation, public)


def load_inputs(settings: DataSettings) -> Rows:
    """All training rows of a source, inputs alone: whether it has classes, and which, does not matter.

    Raises:
        DataError: The source cannot be read, or lacks a column, or has rows without a text or an image.
        AssetError: A packaged source cannot be fetched.
    """
    _check(settings)
    raw, source = read(settings), settings.source
    images = settings.task == "image-classification"
    found = _column(raw.train, settings.image if images else settings.text, source)
    rows = Rows(
        labels=np.zeros(len(found), dtype=np.int64),
        texts=() if images else _texts(raw.train, settings.text, source),
        prompts=() if settings.prompt is None else _texts(raw.train, settings.prompt, source),
        images=_images(found, raw.folder, source) if images else (),
    )
    return _limited(rows, settings.limit, settings.seed)


def read(settings: DataSettings) -> Raw:
    """The source as it is, unchecked.

    Raises:
        DataError: It cannot be read.
        AssetError: A packaged source cannot be fetched.
    """
    path = Path(settings.source).expanduser()
    if settings.source in PACKAGED or settings.source == MOVIELENS:
        if settings.test is not None:
            raise DataError(f"test must be left out for the packaged source {settings.source!r}, got {settings.test!r}")
        return read_movielens(settings.recommendation) if settings.source == MOVIELENS else PACKAGED[settings.source]()
    if path.suffix not in SUFFIXES and not path.is_file():
        return read_hub(settings)
    test = None if settings.test is None else read_file(Path(settings.test).expanduser())
    return Raw(read_file(path), test, folder=path.parent)


def _check(settings: DataSettings) -> None:
    if not 0 < settings.test_fraction < 1:
        raise DataError(f"test_fraction must be above 0 and below 1, got {settings.test_fraction}")
    if not 0 <= settings.validation_fraction < 1:
        raise DataError(f"validation_fraction must be 0 or more and below 1, got {settings.validation_fraction}")
    if settings.source == MOVIELENS and settings.validation_fraction:
        raise DataError(
            f"validation_fraction must be 0 for {MOVIELENS!r}, which sets its own validation rows aside, got "
            f"{settings.validation_fraction}"
        )
    for name, value in (("limit", settings.limit), ("test_limit", settings.test_limit)):
        if value is not None and value < 1:
            raise DataError(f"{name} must be at least 1, got {value}")
    for name in ("prompt", "messages", "chat"):
        value = getattr(settings, name)
        if value and settings.task != "causal-lm":
            raise DataError(f"{name} must be left out for {settings.task}, got {value!r}")
    if settings.chat and (settings.prompt is None or settings.messages is not None):
        raise DataError("chat must go with a prompt column, and without messages, which are a chat by themselves")
    if settings.messages is not None and settings.prompt is not None:
        raise DataError(f"prompt must be left out beside messages, got {settings.prompt!r}")
    if settings.answers and (settings.chat or settings.messages):
        raise DataError("answers must be left out for chats, got some; give columns prompt and text without chat")


def _rows(raw: Raw, columns: Columns, settings: DataSettings, names: tuple[str, ...], source: str) -> Rows:
    """The chosen columns, checked."""
    images = settings.task == "image-classification"
    kept = {name: _strings(_column(columns, name, source)) for name in (*raw.keep, *settings.columns)}
    if settings.messages is not None:
        talks = conversations(list(_column(columns, settings.messages, source)), settings.messages, source)
        return Rows(_classes(columns, settings, names, source), columns=kept, conversations=talks)
    if settings.chat:
        talks = _exchanges(columns, settings, source)
        return Rows(_classes(columns, settings, names, source), columns=kept, conversations=talks)
    return Rows(
        labels=_classes(columns, settings, names, source),
        texts=() if images else _texts(columns, settings.text, source),
        prompts=() if settings.prompt is None else _texts(columns, settings.prompt, source),
        images=_images(_column(columns, settings.image, source), raw.folder, source) if images else (),
        columns=kept,
    )


def _exchanges(columns: Columns, settings: DataSettings, source: str) -> list[Conversation]:
    """A question and its answer in each row."""
    assert settings.prompt is not None, "checked"
    asked, said = (_texts(columns, name, source) for name in (settings.prompt, settings.text))
    return [(("user", question), (ASSISTANT, answer)) for question, answer in zip(asked, said, strict=True)]


def _column(columns: Columns, name: str, source: str) -> Column:
    if name not in columns:
        raise DataError(f"{source} must have a column {name!r}, got the columns {', '.join(sorted(columns))}")
    return columns[name]


def _texts(columns: Columns, name: str, source: str) -> list[str]:
    texts = [_string(value) for value in _column(columns, name, source)]
    _refuse_empty([not text.strip() for text in texts], name, source)
    return texts


def _string(value: object) -> str:
    # A missing cell of a typed table is None or, in a column of numbers, not equal to itself.
    return "" if value is None or value != value else str(value)


def _refuse_empty(empty: Sequence[bool], name: str, source: str) -> None:
    rows = [number for number, missing in enumerate(empty, start=1) if missing]
    if rows:
        shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise DataError(
            f"column {name!r} of {source} must not be empty, got {len(rows)} empty of {len(empty)} (rows {shown}); "
            f"remove those rows or fill them in"
        )


def _images(values: Column, folder: Path, source: str) -> Images:
    """Decoded images as they are; paths made whole and each file looked at."""
    if isinstance(values, np.ndarray):
        return values
    images = [folder / value if isinstance(value, str) else value for value in values]
    if not all(isinstance(image, Path) or decoded(image) for image in images):
        raise DataError(f"images of {source} must be paths or decoded images; name the right image column")
    check_images(images)
    return images


def _has_labels(columns: Columns, settings: DataSettings) -> bool:
    return settings.task != "causal-lm" or settings.label in columns


def _label_names(raw: Raw, settings: DataSettings) -> tuple[str, ...]:
    """Classes in the source's own order, else sorted: as numbers where all are."""
    if raw.label_names is not None:
        return raw.label_names
    if settings.labels:
        return settings.labels
    if not _has_labels(raw.train, settings):
        return ()
    names = sorted(set(_label_strings(raw.train, settings.label, settings.source)))
    return tuple(sorted(names, key=int) if all(name.lstrip("-").isdecimal() for name in names) else names)


def _label_strings(columns: Columns, name: str, source: str) -> list[str]:
    values = [_string(value).strip() for value in _column(columns, name, source)]
    _refuse_empty([not value for value in values], name, source)
    return values


def _classes(columns: Columns, settings: DataSettings, names: tuple[str, ...], source: str) -> NDArray[np.int64]:
    if not _has_labels(columns, settings):
        return np.zeros(len(next(iter(columns.values()))), dtype=np.int64)
    index = {name: number for number, name in enumerate(names)}
    values = _label_strings(columns, settings.label, source)
    unknown = sorted(set(values) - index.keys())
    if unknown:
        shown = ", ".join(map(repr, unknown[:5]))
        raise DataError(
            f"every class of {source} must be in the training rows, got {shown}; add such rows or drop these"
        )
    return np.array([index[value] for value in values], dtype=np.int64)


def _strings(values: Column) -> NDArray[np.str_]:
    return np.array([_string(value) for value in values], dtype=np.str_)


def _check_classes(train: Rows, test: Rows, names: tuple[str, ...]) -> None:
    """Refuses what no classifier can be trained or tested on; a language model's classes are only columns."""
    if len(names) == 0:
        return
    if len(names) < 2:
        raise DataError(f"training data must have at least two classes, got only {names[0]!r}; check the label column")
    unseen = sorted(set(test.labels.tolist()) - set(train.labels.tolist()))
    if unseen:
        shown = ", ".join(repr(names[label]) for label in unseen[:5])
        raise DataError(f"every class of the test rows must be in the training rows, got {shown}; raise limit")


# --- splitting --------------------------------------------------------------------------------------------------------


def _held_out(rows: Rows, fraction: float, seed: Sequence[int], name: str) -> tuple[Rows, Rows]:
    """Training rows and those held out, classes and kept columns in proportion; every class keeps one training row."""
    order = np.random.default_rng(seed).permutation(len(rows))
    _, first = np.unique(rows.labels[order], return_index=True)
    free = np.delete(order, first)
    held = free[spread(strata(rows)[free], round(fraction * len(rows)))]
    if len(held) == 0 or len(held) == len(rows):
        advice = "change it or name a test file" if name == "test_fraction" else "change it"
        raise DataError(f"{name} must leave rows on both sides, got {fraction} of {len(rows)} rows; {advice}")
    return rows.take(np.setdiff1d(np.arange(len(rows)), held)), rows.take(np.sort(held))


def _limited(rows: Rows, limit: int | None, seed: int) -> Rows:
    if limit is None or limit >= len(rows):
        return rows
    order = np.random.default_rng([seed, 1]).permutation(len(rows))
    return rows.take(np.sort(order[spread(strata(rows)[order], limit)]))
