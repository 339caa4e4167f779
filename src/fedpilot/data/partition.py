"""Dividing training rows among clients: evenly, by Dirichlet label skew, by few classes a client, or by a column."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedpilot.data.sampling import spread
from fedpilot.data.tables import Rows
from fedpilot.errors import DataError

Part: TypeAlias = NDArray[np.int64]

TRIES = 10
"""Fresh starts of a Dirichlet partition whose smallest client came out too small; each is eleven draws."""


@dataclass(frozen=True)
class PartitionSettings:
    """How rows are divided among clients.

    Attributes:
        kind: ``iid``: at random, equal sizes. ``dirichlet``: each class is divided in proportions drawn from a
            Dirichlet distribution (Yurochkin et al. 2019, arXiv 1905.12022). ``pathological``: each client has
            ``classes_per_client`` classes (McMahan et al. 2017, arXiv 1602.05629). ``column``: each value of a column
            is divided among its own clients.
        num_clients: Clients; for ``column`` it follows from the values and may be left out.
        alpha: Concentration of ``dirichlet``: small for strong skew. With ``column`` it divides each value's rows by
            label skew; ``None`` divides them evenly.
        classes_per_client: For ``pathological``.
        column: For ``column``.
        clients_per_value: For ``column``.
        min_examples: Fewest examples a client may have.
        per_client_limit: Examples kept of each client at most, evenly over its classes.
        seed: Of every draw.
    """

    kind: Literal["iid", "dirichlet", "pathological", "column"] = "iid"
    num_clients: int | None = None
    alpha: float | None = None
    classes_per_client: int | None = None
    column: str | None = None
    clients_per_value: int = 1
    min_examples: int = 1
    per_client_limit: int | None = None
    seed: int = 0


def partition(rows: Rows, settings: PartitionSettings) -> list[Part]:
    """Positions of each client's rows, in random order: disjoint, and together all rows unless limited.

    Deterministic from the settings' seed.

    Raises:
        DataError: The request cannot be met; the message says what to change.
    """
    _check(rows, settings)
    if settings.kind == "column":
        parts = _by_column(rows, settings)
    else:
        parts = _divide(rows.labels, settings, _num_clients(settings), settings.seed)
    smallest = min(len(part) for part in parts)
    if smallest < settings.min_examples:
        raise DataError(
            f"every client must have at least {settings.min_examples} examples, got one with {smallest}; use fewer "
            f"clients, more data or a smaller min_examples"
        )
    if settings.per_client_limit is None:
        return parts
    return [part[spread(rows.labels[part], settings.per_client_limit)] for part in parts]


def client_names(rows: Rows, settings: PartitionSettings) -> list[str]:
    """What to call the clients of :func:`partition`: by their value of the column, else by number from 0."""
    if settings.kind != "column":
        return [f"client {number}" for number in range(_num_clients(settings))]
    values = np.unique(rows.column(settings.column or "")).tolist()
    if settings.clients_per_value == 1:
        return list(values)
    return [f"{value} {number}" for value in values for number in range(1, settings.clients_per_value + 1)]


def partition_table(parts: Sequence[Part], codes: NDArray[np.int64], num_codes: int) -> NDArray[np.int64]:
    """Counts (clients, num_codes) of each client's rows by class, or by any other numbering of rows.

    >>> partition_table([np.array([0, 1]), np.array([2])], np.array([0, 2, 2]), 3).tolist()
    [[1, 0, 1], [0, 0, 1]]
    """
    return np.stack([np.bincount(codes[part], minlength=num_codes) for part in parts])


def _check(rows: Rows, settings: PartitionSettings) -> None:
    if settings.min_examples < 1 or settings.clients_per_value < 1:
        raise DataError(
            f"min_examples and clients_per_value must be at least 1, got {settings.min_examples} and "
            f"{settings.clients_per_value}"
        )
    if settings.per_client_limit is not None and settings.per_client_limit < settings.min_examples:
        raise DataError(
            f"per_client_limit must be at least min_examples ({settings.min_examples}), got {settings.per_client_limit}"
        )
    if settings.alpha is not None and not settings.alpha > 0:
        raise DataError(f"alpha must be above 0, got {settings.alpha}")
    clients = len(client_names(rows, settings))
    if settings.kind == "column" and settings.num_clients not in (None, clients):
        raise DataError(
            f"num_clients must be {clients}, the column's values times clients_per_value, or left out, got "
            f"{settings.num_clients}"
        )
    needed = clients * settings.min_examples
    if needed > len(rows):
        raise DataError(
            f"{clients} clients of at least {settings.min_examples} examples must find {needed} rows, got {len(rows)}; "
            f"use fewer clients, more data or a smaller min_examples"
        )


def _num_clients(settings: PartitionSettings) -> int:
    if settings.num_clients is None or settings.num_clients < 1:
        raise DataError(f"num_clients must be at least 1 for the kind {settings.kind}, got {settings.num_clients}")
    return settings.num_clients


def _divide(labels: NDArray[np.int64], settings: PartitionSettings, clients: int, seed: int) -> list[Part]:
    """Rows with the given labels among so many clients."""
    rng = np.random.default_rng(seed)
    if settings.kind == "pathological":
        return _pathological(labels, settings.classes_per_client, clients, rng)
    if settings.kind == "dirichlet" or settings.alpha is not None:
        return _dirichlet(labels, settings, clients, seed)
    return list(np.array_split(rng.permutation(len(labels)), clients))


def _by_column(rows: Rows, settings: PartitionSettings) -> list[Part]:
    values = rows.column(settings.column or "")
    parts: list[Part] = []
    for number, value in enumerate(np.unique(values)):
        where = np.flatnonzero(values == value)
        if len(where) < settings.clients_per_value:
            raise DataError(
                f"column {settings.column!r} must have at least {settings.clients_per_value} rows of {str(value)!r}, "
                f"got {len(where)}; use fewer clients_per_value"
            )
        divided = _divide(rows.labels[where], settings, settings.clients_per_value, settings.seed + number)
        parts += [where[part] for part in divided]
    return parts


def _pathological(
    labels: NDArray[np.int64], classes_per_client: int | None, clients: int, rng: np.random.Generator
) -> list[Part]:
    """Each client holds exactly ``classes_per_client`` classes and each class has a holder.

    Classes are dealt from one shuffled deck, over and over; a class is divided evenly among its holders. flwr-datasets'
    partitioner draws classes independently and leaves out those that nobody drew.
    """
    classes = rng.permutation(np.unique(labels))
    if classes_per_client is None or not 1 <= classes_per_client <= len(classes):
        raise DataError(
            f"classes_per_client must be from 1 to {len(classes)}, the number of classes, got {classes_per_client}"
        )
    if clients * classes_per_client < len(classes):
        raise DataError(
            f"clients times classes_per_client must reach the {len(classes)} classes, so that each has a holder, got "
            f"{clients} x {classes_per_client}; raise either"
        )
    hands = np.arange(clients * classes_per_client).reshape(clients, classes_per_client) % len(classes)
    parts: list[list[Part]] = [[] for _ in range(clients)]
    for number, label in enumerate(classes):
        holders = np.flatnonzero((hands == number).any(axis=1))
        where = rng.permutation(np.flatnonzero(labels == label))
        if len(where) < len(holders):
            raise DataError(
                f"class {label} must have a row for each of its {len(holders)} holders, got {len(where)}; use fewer "
                f"clients or classes_per_client"
            )
        for holder, share in zip(holders, np.array_split(where, len(holders)), strict=True):
            parts[holder].append(share)
    return [rng.permutation(np.concatenate(shares)) for shares in parts]


def _dirichlet(labels: NDArray[np.int64], settings: PartitionSettings, clients: int, seed: int) -> list[Part]:
    """flwr-datasets' Dirichlet partitioner, which gives up after eleven draws, started anew a few times."""
    from datasets import Dataset
    from flwr_datasets.partitioner import DirichletPartitioner

    if settings.alpha is None:
        raise DataError("alpha must be given for the kind dirichlet, got none; 0.1 is strong skew, 100 nearly none")
    table = Dataset.from_dict({"label": labels, "row": np.arange(len(labels))})
    for start in range(TRIES):
        partitioner = DirichletPartitioner(
            num_partitions=clients,
            partition_by="label",
            alpha=float(settings.alpha),
            min_partition_size=settings.min_examples,
            seed=[seed, start],
        )
        partitioner.dataset = table
        with warnings.catch_warnings():
            # It warns on every draw that is too small; the error below says it once.
            warnings.simplefilter("ignore")
            try:
                divided = [partitioner.load_partition(client)["row"] for client in range(clients)]
            except ValueError:
                continue
        return [np.array(part, dtype=np.int64) for part in divided]
    raise DataError(
        f"Dirichlet partition must give every client at least {settings.min_examples} examples, got fewer in each of "
        f"{TRIES * 11} draws with alpha {settings.alpha} and {clients} clients; raise alpha, or lower num_clients or "
        f"min_examples"
    )
