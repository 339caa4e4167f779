import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedpilot.data import PartitionSettings, Rows, client_names, partition, partition_table
from fedpilot.data.sampling import spread
from fedpilot.errors import DataError

SITES = ("east", "north", "west")


def rows(number: int, classes: int = 4) -> Rows:
    """Classes go round from row to row; sites change after every 5 rows."""
    index = np.arange(number)
    return Rows(index % classes, columns={"site": np.array([SITES[k // 5 % 3] for k in index])})


def covers(parts: list[np.ndarray], number: int) -> bool:
    """Whether every row is in exactly one part."""
    return sorted(np.concatenate(parts).tolist()) == list(range(number))


@st.composite
def requests(draw: st.DrawFn) -> tuple[Rows, PartitionSettings]:
    """Requests that can be met."""
    number, classes = draw(st.integers(60, 200)), draw(st.integers(2, 5))
    kind = draw(st.sampled_from(["iid", "dirichlet", "pathological", "column"]))
    clients = draw(st.integers(1, 8))
    per_client = draw(st.integers(min(classes, -(-classes // clients)), classes))
    request = PartitionSettings(
        kind,
        num_clients=None if kind == "column" else clients,
        alpha=draw(st.sampled_from([5.0, 50.0])) if kind == "dirichlet" else None,
        classes_per_client=per_client,
        column="site",
        clients_per_value=draw(st.integers(1, 3)),
        seed=draw(st.integers(0, 99)),
    )
    return rows(number, classes), request


@given(requests())
@settings(deadline=None, max_examples=60)
def test_parts_are_disjoint_and_cover_all_rows(request_: tuple[Rows, PartitionSettings]) -> None:
    table, request = request_
    parts = partition(table, request)
    assert covers(parts, len(table))
    assert min(map(len, parts)) >= request.min_examples
    assert len(parts) == len(client_names(table, request))
    again = partition(table, request)
    assert all(np.array_equal(first, second) for first, second in zip(parts, again, strict=True))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "pathological", "column"])
def test_another_seed_gives_another_partition(kind: str) -> None:
    def parts(seed: int) -> list[list[int]]:
        request = PartitionSettings(
            kind,  # type: ignore[arg-type]
            num_clients=None if kind == "column" else 3,
            alpha=1.0 if kind == "dirichlet" else None,
            classes_per_client=2,
            column="site",
            clients_per_value=2,
            seed=seed,
        )
        return [part.tolist() for part in partition(rows(90), request)]

    assert parts(0) != parts(1)


def test_equal_parts_differ_by_one_at_most() -> None:
    sizes = [len(part) for part in partition(rows(31), PartitionSettings("iid", num_clients=4))]
    assert sorted(sizes) == [7, 8, 8, 8]


def test_a_smaller_alpha_is_more_skewed() -> None:
    table = rows(400)

    def skew(alpha: float) -> float:
        parts = partition(table, PartitionSettings("dirichlet", num_clients=5, alpha=alpha))
        counts = partition_table(parts, table.labels, 4)
        return float((counts / counts.sum(axis=1, keepdims=True)).max(axis=1).mean())

    assert skew(0.05) > 0.7
    assert skew(1000.0) < 0.3


@pytest.mark.parametrize(("clients", "per_client"), [(2, 2), (4, 1), (5, 3), (7, 2)])
def test_each_client_has_exactly_its_number_of_classes_and_each_class_a_holder(clients: int, per_client: int) -> None:
    table = rows(80)
    request = PartitionSettings("pathological", num_clients=clients, classes_per_client=per_client)
    counts = partition_table(partition(table, request), table.labels, 4)
    assert (counts > 0).sum(axis=1).tolist() == [per_client] * clients
    assert (counts > 0).any(axis=0).all()


def test_a_column_gives_each_value_its_own_clients() -> None:
    table = rows(60)
    request = PartitionSettings("column", column="site", clients_per_value=2)
    parts = partition(table, request)
    assert client_names(table, request) == ["east 1", "east 2", "north 1", "north 2", "west 1", "west 2"]
    assert [set(table.columns["site"][part]) for part in parts] == [{site} for site in SITES for _ in range(2)]
    assert [len(part) for part in parts] == [10] * 6
    assert client_names(table, PartitionSettings("column", column="site")) == list(SITES)


def test_labels_can_be_skewed_within_a_value() -> None:
    table = rows(300)
    request = PartitionSettings("column", column="site", clients_per_value=3, alpha=0.3)
    parts = partition(table, request)
    assert covers(parts, 300)
    assert [set(table.columns["site"][part]) for part in parts] == [{site} for site in SITES for _ in range(3)]
    assert len({len(part) for part in parts}) > 3


def test_a_limit_keeps_each_clients_proportions() -> None:
    table = rows(400)
    request = PartitionSettings("iid", num_clients=3, per_client_limit=20)
    parts = partition(table, request)
    whole = partition(table, PartitionSettings("iid", num_clients=3))
    assert [len(part) for part in parts] == [20] * 3
    for part, full in zip(parts, whole, strict=True):
        assert set(part) < set(full)
        assert np.abs(np.bincount(table.labels[part]) - np.bincount(table.labels[full]) * 20 / len(full)).max() <= 1
    assert len(spread(table.labels[parts[0]], 500)) == 20


def test_the_table_counts_by_hand() -> None:
    counts = partition_table([np.array([0, 1, 2]), np.array([5])], np.array([1, 1, 0, 0, 0, 3]), 4)
    assert counts.tolist() == [[1, 2, 0, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (PartitionSettings("iid"), "num_clients must be at least 1 for the kind iid, got None"),
        (PartitionSettings("iid", num_clients=0), "num_clients must be at least 1"),
        (PartitionSettings("iid", num_clients=41), r"41 clients of at least 1 .* find 41 rows, got 40; use fewer"),
        (PartitionSettings("iid", num_clients=5, min_examples=9), "must find 45 rows, got 40"),
        (PartitionSettings("iid", num_clients=5, min_examples=0), "must be at least 1, got 0 and 1"),
        (
            PartitionSettings("iid", num_clients=5, min_examples=3, per_client_limit=2),
            "per_client_limit must",
        ),
        (PartitionSettings("dirichlet", num_clients=5), "alpha must be given for the kind dirichlet"),
        (PartitionSettings("dirichlet", num_clients=5, alpha=0.0), "alpha must be above 0, got 0"),
        (PartitionSettings("dirichlet", num_clients=20, alpha=0.01), r"in each of 110 draws .* raise alpha"),
        (PartitionSettings("pathological", num_clients=5), "classes_per_client must be from 1 to 4"),
        (PartitionSettings("pathological", num_clients=5, classes_per_client=5), "must be from 1 to 4, .* got 5"),
        (
            PartitionSettings("pathological", num_clients=3, classes_per_client=1),
            "must reach the 4 .* got 3 x 1",
        ),
        (PartitionSettings("pathological", num_clients=30, classes_per_client=4), "must have a row for each of its 30"),
        (PartitionSettings("column"), "must be one that was kept .site., got ''"),
        (PartitionSettings("column", column="place"), "must be one that was kept .site., got 'place'"),
        (PartitionSettings("column", column="site", num_clients=5), "num_clients must be 3, .* got 5"),
        (PartitionSettings("column", column="site", clients_per_value=12), "at least 12 rows of 'west', got 10"),
    ],
)
def test_what_cannot_be_met_is_refused_with_a_remedy(request_: PartitionSettings, message: str) -> None:
    with pytest.raises(DataError, match=message):
        partition(rows(40), request_)
