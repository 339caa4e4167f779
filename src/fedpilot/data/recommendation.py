"""Film ratings as clicks in the order of time: who liked what, and what each had rated before.

MovieLens-100K, read from a package that carries it. An example is one rating: a text with the film and a few films that
its user rated before, a Yes or No answer, and under the number of its row the long history that a click model reads. A
history holds what the same user rated strictly earlier, so nothing of an example's own moment or future is in it.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedpilot import assets
from fedpilot.data.packaged import Columns, Raw
from fedpilot.errors import DataError

MOVIELENS = "movielens-100k"
CORE = 5
"""Ratings that every user and every film must have."""

LIKED = 4
"""Stars from which a rating is a click."""

ANSWERS = ("No", "Yes")

Split = Literal["time", "user"]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class RecommendationSettings:
    """How ratings become examples; for ``movielens-100k``.

    Attributes:
        split: ``time`` cuts all ratings 8:1:1 at two moments, so that every test rating is later than every training
            rating and most of its users are new; ``user`` cuts each user's own ratings 8:1:1 in their order, so that
            every client is tested on its own future, while other clients' training ratings may be later.
        groups: Groups that users are dealt to, for the column ``group``; 0 for none, where a user is a client.
        short: Films of the history that the text names, the newest.
        long: K, films of the history that the click model reads.
        retrieval: Which K: the ``recent`` ones, or those that share most ``genres`` with the film, newest first among
            equals (the hard search of SIM, arXiv 2006.05639).
    """

    split: Split = "time"
    groups: int = 0
    short: int = 10
    long: int = 60
    retrieval: Literal["recent", "genres"] = "genres"

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be at least {least}, got {getattr(self, name)}"
            for name, least in (("groups", 0), ("short", 0), ("long", 1))
            if getattr(self, name) < least
        ]
        if problems:
            raise ValueError("; ".join(problems))


@dataclass(frozen=True)
class Film:
    """A film of the catalogue."""

    title: str
    year: str
    genres: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.title} ({self.year})" if self.year else self.title


@dataclass(frozen=True)
class Interactions:
    """All ratings, oldest first.

    Attributes:
        users: (n,) user of each rating.
        items: (n,) film, from 1; 0 stands for none.
        stars: (n,) from 1 to 5.
        times: (n,) seconds.
        films: Film of each number; entry 0 is none.
    """

    users: Indices
    items: Indices
    stars: Indices
    times: Indices
    films: tuple[Film, ...]

    def __len__(self) -> int:
        return len(self.users)

    @property
    def clicks(self) -> Indices:
        """(n,) 1 where the user liked the film."""
        return (self.stars >= LIKED).astype(np.int64)

    @property
    def genres(self) -> NDArray[np.float32]:
        """(films + 1, genres) 1 where the film has the genre."""
        names = sorted({genre for film in self.films for genre in film.genres})
        return np.array([[genre in film.genres for genre in names] for film in self.films], dtype=np.float32)

    def earlier(self) -> Indices:
        """(n,) how many of the user's ratings are strictly earlier; they are the first so many of the user's own."""
        counts = np.zeros(len(self), dtype=np.int64)
        for where in self.by_user():
            counts[where] = np.searchsorted(self.times[where], self.times[where], side="left")
        return counts

    def by_user(self) -> list[Indices]:
        """Positions of each user's ratings, oldest first."""
        order = np.argsort(self.users, kind="stable")
        return np.split(order, np.flatnonzero(np.diff(self.users[order])) + 1)


@cache
def movielens() -> Interactions:
    """MovieLens-100K's ratings, 5-core.

    Raises:
        AssetError: The package cannot be had.
    """
    return read_interactions(assets.folder(MOVIELENS))


def read_interactions(folder: Path) -> Interactions:
    """Ratings and films of a folder with ``ml-100k.inter`` and ``ml-100k.item``, tab-separated below names."""
    films = {
        int(item): Film(title, year if year.isdecimal() else "", tuple(kinds.split()))
        for item, title, year, kinds in _table(folder / "ml-100k.item")
    }
    found = np.array([[int(float(value)) for value in row] for row in _table(folder / "ml-100k.inter")], dtype=np.int64)
    # Ties in time are broken by film and not by the file's order, so that the file's order is never a hint.
    found = found[core(found[:, 0], found[:, 1], CORE)]
    found = found[np.lexsort((found[:, 1], found[:, 0], found[:, 3]))]
    kept, items = np.unique(found[:, 1], return_inverse=True)
    catalogue = (Film("", "", ()), *(films[int(item)] for item in kept))
    return Interactions(found[:, 0], items.astype(np.int64) + 1, found[:, 2], found[:, 3], catalogue)


def core(users: Indices, items: Indices, least: int) -> Indices:
    """Positions left when users and items with fewer than ``least`` ratings are dropped until none has.

    >>> core(np.array([1, 1, 2, 2, 3]), np.array([7, 8, 7, 8, 8]), 2).tolist()
    [0, 1, 2, 3]
    """
    left = np.arange(len(users))
    while True:
        enough = np.ones(len(left), dtype=np.bool_)
        for values in (users[left], items[left]):
            _, codes, counts = np.unique(values, return_inverse=True, return_counts=True)
            enough &= counts[codes] >= least
        if enough.all():
            return left
        left = left[enough]


def parts(found: Interactions, split: Split) -> tuple[Indices, Indices, Indices]:
    """Positions of training, validation and test ratings, 8:1:1 in the order of time, cut between two moments."""
    if split == "time":
        return _cut(found.times, np.arange(len(found)))
    cuts = [_cut(found.times[where], where) for where in found.by_user()]
    train, validation, test = (np.sort(np.concatenate([cut[part] for cut in cuts])) for part in range(3))
    return train, validation, test


def _cut(times: Indices, where: Indices) -> tuple[Indices, Indices, Indices]:
    """8:1:1 of ratings that are in order; those of one moment stay together, on the earlier side."""
    n = len(where)
    first, second = (int(np.searchsorted(times, times[share * n // 10 - 1], side="right")) for share in (8, 9))
    return where[:first], where[first:second], where[second:]


def long_histories(found: Interactions, settings: RecommendationSettings) -> Indices:
    """(n, K) positions of the ratings that each one's history consists of, newest first; -1 where there are fewer."""
    result = np.full((len(found), settings.long), -1, dtype=np.int64)
    counts, genres = found.earlier(), found.genres
    for where in found.by_user():
        of_film = genres[found.items[where]]
        shared = of_film @ of_film.T if settings.retrieval == "genres" else np.zeros((len(where), len(where)))
        for place, row in enumerate(where):
            before = np.arange(counts[row])[::-1]
            # Sorting by number of shared genres keeps the newest first among equals.
            chosen = np.sort(before[np.argsort(-shared[place, before], kind="stable")][: settings.long])[::-1]
            result[row, : len(chosen)] = where[chosen]
    return result


def read_movielens(settings: RecommendationSettings) -> Raw:
    """The examples of MovieLens-100K as a source: ``text``, ``prompt`` and ``answer``, with user, group and row."""
    found = movielens()
    train, validation, test = (columns(found, where, settings) for where in parts(found, settings.split))
    keep = ("user", "row", *(["group"] if settings.groups else []))
    return Raw(train, test, label_names=("no", "yes"), keep=keep, validation=validation)


def columns(found: Interactions, where: Indices, settings: RecommendationSettings) -> Columns:
    """The given ratings as columns."""
    earlier, own = found.earlier(), {int(found.users[rows[0]]): rows for rows in found.by_user()}
    result: dict[str, list[object]] = {
        name: [] for name in ("text", "prompt", "answer", "label", "user", "row", "group")
    }
    for row in where:
        user = int(found.users[row])
        newest = own[user][: earlier[row]][::-1][: settings.short]
        film = found.films[found.items[row]]
        result["text"].append(text(film, found, newest))
        result["prompt"].append(prompt(film, found, newest))
        result["answer"].append(ANSWERS[int(found.stars[row] >= LIKED)])
        result["label"].append(ANSWERS[int(found.stars[row] >= LIKED)].lower())
        result["user"].append(f"user {user}")
        result["row"].append(str(row))
        result["group"].append(f"group {user % settings.groups}" if settings.groups else "")
    return result


def text(film: Film, found: Interactions, history: Sequence[int] | Indices) -> str:
    """What a classifier reads: the film first, for what is too long loses its end."""
    liked, disliked = _names(found, history)
    return f"{film}, {' '.join(film.genres)}. liked: {liked}. disliked: {disliked}."


def prompt(film: Film, found: Interactions, history: Sequence[int] | Indices) -> str:
    """What a language model answers with Yes or No: the question first, for what is too long loses its end."""
    liked, disliked = _names(found, history)
    return (
        f"Will this user like the film {film}, {', '.join(film.genres)}? Answer Yes or No. "
        f"Liked before: {liked}. Disliked before: {disliked}."
    )


def _names(found: Interactions, history: Sequence[int] | Indices) -> tuple[str, str]:
    """Liked and disliked films of a history, newest first."""
    sides: tuple[list[str], list[str]] = ([], [])
    for row in history:
        sides[int(found.stars[row] < LIKED)].append(found.films[found.items[row]].title)
    liked, disliked = ("; ".join(side) or "none" for side in sides)
    return liked, disliked


def _table(path: Path) -> list[list[str]]:
    """Rows below the line of names.

    Raises:
        DataError: A row has another number of cells.
    """
    with path.open(encoding="utf-8", newline="") as file:
        names, *rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
    if uneven := [number for number, row in enumerate(rows, start=2) if len(row) != len(names)]:
        raise DataError(f"every line of {path} must have {len(names)} cells, got another number in line {uneven[0]}")
    return rows
