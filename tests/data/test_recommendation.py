"""Ratings as examples: nothing of an example's own moment or future is in it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fedpilot.data import DataSettings, load
from fedpilot.data.recommendation import (
    Interactions,
    RecommendationSettings,
    columns,
    core,
    long_histories,
    movielens,
    parts,
    read_interactions,
)
from fedpilot.errors import DataError

GENRES = ("Comedy", "Drama", "Comedy Drama", "Horror", "Drama", "Horror Comedy", "War")


def written(folder: Path, ratings: Sequence[tuple[int, int, int, int]]) -> Path:
    """A folder as the package has it, with (user, film, stars, time) as its ratings."""
    items = [f"{n}\tFilm {n}\t{1990 + n}\t{genres}" for n, genres in enumerate(GENRES, start=1)]
    lines = ["\t".join(map(str, (user, film, f"{stars}", time))) for user, film, stars, time in ratings]
    (folder / "ml-100k.item").write_text("\n".join(["item_id\ttitle\tyear\tclass", *items]) + "\n")
    (folder / "ml-100k.inter").write_text("\n".join(["user\titem\trating\ttime", *lines]) + "\n")
    return folder


@pytest.fixture
def small(tmp_path: Path) -> Interactions:
    """Six users and seven films, all pairs rated, out of order in the file; each user's films 3 and 4 at one moment."""
    ratings = [
        (user, film, 1 + (user * film) % 5, 1000 * user + 10 * (4 if film == 3 else film))
        for film in range(7, 0, -1)
        for user in range(6, 0, -1)
    ]
    return read_interactions(written(tmp_path, ratings))


def test_ratings_come_oldest_first_whatever_the_files_order(small: Interactions) -> None:
    assert len(small) == 42
    assert (np.diff(small.times) >= 0).all()
    assert small.users.tolist() == sorted(small.users.tolist())  # a thousand seconds apart
    assert [str(small.films[item]) for item in small.items[:2]] == ["Film 1 (1991)", "Film 2 (1992)"]
    assert small.genres.shape == (8, 4)
    assert small.genres[0].sum() == 0


def test_a_history_is_strictly_earlier_and_its_own_users(small: Interactions) -> None:
    for retrieval in ("recent", "genres"):
        histories = long_histories(small, RecommendationSettings(long=3, retrieval=retrieval))  # type: ignore[arg-type]
        for row, history in enumerate(histories):
            there = history[history >= 0]
            assert (small.times[there] < small.times[row]).all()
            assert (small.users[there] == small.users[row]).all()
            assert (np.diff(there) < 0).all()  # newest first
            assert len(there) == min(
                3, int(((small.users == small.users[row]) & (small.times < small.times[row])).sum())
            )


def test_films_of_one_moment_are_not_in_each_others_history(small: Interactions) -> None:
    first = [row for row in range(7) if small.items[row] in (3, 4)]
    histories = long_histories(small, RecommendationSettings(long=5))
    assert [sorted(small.items[h[h >= 0]].tolist()) for h in histories[first]] == [[1, 2], [1, 2]]


def test_genres_choose_the_films_that_share_most_and_of_these_the_newest(small: Interactions) -> None:
    row = 5  # film 6: Horror Comedy; before it 1 Comedy, 2 Drama, 3 Comedy Drama, 4 Horror, 5 Drama
    assert small.items[row] == 6
    chosen = long_histories(small, RecommendationSettings(long=2))[row]
    assert sorted(small.items[chosen].tolist()) == [3, 4]
    recent = long_histories(small, RecommendationSettings(long=2, retrieval="recent"))[row]
    assert small.items[recent].tolist() == [5, 4]


def test_by_time_every_later_part_is_later(small: Interactions) -> None:
    train, validation, test = parts(small, "time")
    assert sorted([*train, *validation, *test]) == list(range(42))
    assert small.times[train].max() < small.times[validation].min()
    assert small.times[validation].max() < small.times[test].min()
    assert (len(train), len(validation), len(test)) == (33, 4, 5)  # 8:1:1, cut between two moments


def test_by_user_every_user_is_tested_on_its_own_future(small: Interactions) -> None:
    train, _, test = parts(small, "user")
    assert set(small.users[test]) == set(small.users)
    for user in set(small.users):
        mine = small.users == user
        assert small.times[train[mine[train]]].max() < small.times[test[mine[test]]].min()


def test_texts_name_the_newest_films_by_what_their_user_thought_of_them(small: Interactions) -> None:
    made = columns(small, np.array([6]), RecommendationSettings(short=3, groups=4))
    # User 1 gave film n 1 + n % 5 stars: film 6 two, 5 one, 4 five; its seventh film is asked for.
    assert made["text"] == ["Film 7 (1997), War. liked: Film 4. disliked: Film 6; Film 5."]
    assert made["prompt"] == [
        "Will this user like the film Film 7 (1997), War? Answer Yes or No. "
        "Liked before: Film 4. Disliked before: Film 6; Film 5."
    ]
    assert (made["answer"], made["label"]) == (["No"], ["no"])
    assert (made["user"], made["group"], made["row"]) == (["user 1"], ["group 1"], ["6"])


def test_a_first_rating_has_no_history(small: Interactions) -> None:
    made = columns(small, np.array([0]), RecommendationSettings())
    assert made["text"] == ["Film 1 (1991), Comedy. liked: none. disliked: none."]


def test_the_core_keeps_dropping_until_all_have_enough() -> None:
    users, items = np.array([1, 1, 2, 2, 3, 3]), np.array([7, 8, 7, 8, 8, 9])
    # Film 9 goes first, then user 3, who has one rating left.
    assert core(users, items, 2).tolist() == [0, 1, 2, 3]


def test_a_line_with_a_missing_cell_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path, [(1, 1, 5, 10)])
    (folder / "ml-100k.inter").write_text("a\tb\tc\td\n1\t1\t5\n")
    with pytest.raises(DataError, match=r"must have 4 cells, got another number in line 2"):
        read_interactions(folder)


@pytest.mark.parametrize(("field", "value"), [("groups", -1), ("short", -1), ("long", 0)])
def test_settings_say_what_they_must_be(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{field} must be at least"):
        RecommendationSettings(**{field: value})  # type: ignore[arg-type]


def test_movielens_is_whole_and_its_test_ratings_are_later_than_its_training_ratings() -> None:
    found = movielens()
    assert (len(found), len(set(found.users)), len(found.films)) == (99_287, 943, 1_350)
    assert round(float(found.clicks.mean()), 4) == 0.5556
    settings = DataSettings("movielens-100k", limit=200, test_limit=60, recommendation=RecommendationSettings(groups=7))
    table = load(settings)
    assert table.validation is not None
    assert (len(table.train), len(table.validation), len(table.test)) == (200, 60, 60)
    train, validation, test = (
        found.times[rows.column("row").astype(int)] for rows in (table.train, table.validation, table.test)
    )
    assert train.max() < validation.min() <= validation.max() < test.min()
    assert table.label_names == ("no", "yes")
    assert set(table.train.column("group")) == {f"group {n}" for n in range(7)}


def test_movielens_brings_its_own_validation_rows() -> None:
    with pytest.raises(DataError, match="validation_fraction must be 0"):
        load(DataSettings("movielens-100k", limit=50, validation_fraction=0.1))
