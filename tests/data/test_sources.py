import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fedpilot.data import DataSettings, Table, load, load_inputs
from fedpilot.data.files import read_file
from fedpilot.data.sampling import spread, strata
from fedpilot.data.tables import Rows
from fedpilot.errors import DataError

HEADER = ("text", "label", "site")


def cells(number: int) -> list[tuple[str, str, str]]:
    """Rows of two classes, three to one, and two sites, half and half."""
    return [(f"text {k}", "yes" if k % 4 == 0 else "no", "north" if k % 2 else "south") for k in range(number)]


def write_csv(path: Path, rows: Sequence[Sequence[str]], header: Sequence[str] = HEADER) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file, dialect="excel-tab" if path.suffix == ".tsv" else "excel").writerows([header, *rows])
    return str(path)


def write_any(path: Path, rows: Sequence[Sequence[str]]) -> str:
    records = [dict(zip(HEADER, row, strict=True)) for row in rows]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        write_csv(path, rows)
    return str(path)


def texts(table: Table) -> tuple[list[str], list[str]]:
    return list(table.train.texts), list(table.test.texts)


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_table(suffix: str, tmp_path: Path) -> None:
    source = write_any(tmp_path / f"data{suffix}", cells(20))
    table = load(DataSettings(source, columns=("site",), test_fraction=0.25))
    assert table.label_names == ("no", "yes")
    assert (len(table.train), len(table.test)) == (15, 5)
    number = [int(text.split()[1]) for text in table.train.texts]
    assert table.train.labels.tolist() == [int(k % 4 == 0) for k in number]
    assert table.train.columns["site"].tolist() == ["north" if k % 2 else "south" for k in number]


def test_columns_go_by_any_name_and_cells_may_hold_commas_and_lines(tmp_path: Path) -> None:
    rows = [("one, two\nthree", "3"), ("four", "12"), ("five", "3"), ("six", "12")]
    source = write_csv(tmp_path / "data.csv", rows, header=("question", "intent"))
    table = load(DataSettings(source, text="question", label="intent", test_fraction=0.5))
    assert "one, two\nthree" in [*table.train.texts, *table.test.texts]
    # Numbers are in the order of numbers: as strings 12 would stand before 3.
    assert table.label_names == ("3", "12")


def test_a_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\na,x\nb,y\nc,x\nd,y\n")
    assert len(load(DataSettings(str(path), test_fraction=0.5)).train) == 2


def test_a_test_file_is_taken_whole(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "train.csv", cells(8))
    test = write_csv(tmp_path / "test.csv", cells(4))
    table = load(DataSettings(source, test=test))
    assert (len(table.train), len(table.test)) == (8, 4)


def test_images_are_found_beside_their_table(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    rows = []
    for number in range(6):
        Image.new("L", (3, 4), number).save(tmp_path / "pictures" / f"{number}.png")
        rows.append((f"pictures/{number}.png", "ab"[number % 2]))
    source = write_csv(tmp_path / "data.csv", rows, header=("image", "label"))
    table = load(DataSettings(source, task="image-classification", test_fraction=0.34))
    assert len(table.train.images) == 4
    assert len(table.train.texts) == 0
    (tmp_path / "pictures" / "3.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"every image must be a readable file, got 1 that are not: .*3\.png"):
        load(DataSettings(source, task="image-classification"))
    with pytest.raises(DataError, match=r"images of .* must be paths or decoded images"):
        load(DataSettings(write_numbers(tmp_path), task="image-classification"))


def write_numbers(folder: Path) -> str:
    path = folder / "numbers.jsonl"
    path.write_text('{"image": 1, "label": "a"}\n{"image": 2, "label": "b"}\n')
    return str(path)


def test_a_language_model_needs_no_classes_and_takes_prompts(tmp_path: Path) -> None:
    rows = [(f"headline {k}", f"body {k}") for k in range(5)]
    source = write_csv(tmp_path / "data.csv", rows, header=("headline", "body"))
    table = load(DataSettings(source, task="causal-lm", text="headline", prompt="body"))
    assert table.label_names == ()
    assert table.train.labels.tolist() == [0] * 4
    assert [text.replace("headline", "body") for text in table.train.texts] == list(table.train.prompts)


def test_a_local_folder_is_loaded_as_the_hub_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg", "none"])}
    )
    whole = datasets.Dataset.from_dict({"text": list("abcdef"), "label": [0, 1, 0, 1, 0, 1]}, features=features)
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(source: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((source, config, split))
        return whole

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    table = load(DataSettings("someone/reviews", config="en", test="validation"))
    assert asked == [("someone/reviews", "en", "train"), ("someone/reviews", "en", "validation")]
    # The hub's own order of classes, and its class without rows, are kept.
    assert table.label_names == ("pos", "neg", "none")
    assert table.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert texts(table) == (list("abcdef"), list("abcdef"))


# --- what is refused ----------------------------------------------------------------------------------------------


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data file must exist, got .*nowhere\.csv"):
        load(DataSettings(str(tmp_path / "nowhere.csv")))


def test_a_missing_test_file_is_refused(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "train.csv", cells(8))
    with pytest.raises(DataError, match=r"data file must exist, got .*nowhere\.csv"):
        load(DataSettings(source, test=str(tmp_path / "nowhere.csv")))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match=r"must end in \.csv, \.tsv, \.jsonl, \.parquet, got data\.xlsx"):
        load(DataSettings(str(tmp_path / "data.xlsx")))


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_a_table_is_read_with_whatever_a_spreadsheet_puts_between_columns(mark: str, tmp_path: Path) -> None:
    rows = [["a text", "label"], ['"fine; really, | good"', "good"]]
    (tmp_path / "data.csv").write_text("\ufeff" + "\n".join(mark.join(row) for row in rows) + "\n", encoding="utf-8")
    assert read_file(tmp_path / "data.csv") == {"a text": ["fine; really, | good"], "label": ["good"]}


def test_a_semicolon_in_a_header_with_commas_is_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("text;raw,label\nfine,good\n")
    assert read_file(tmp_path / "data.csv") == {"text;raw": ["fine"], "label": ["good"]}


def test_a_spreadsheet_with_the_name_of_a_table_says_how_to_save_it(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_bytes(b"PK\x03\x04\x14\x00")
    with pytest.raises(DataError, match=r"must be text, got a spreadsheet or an archive; save the sheet as \.csv"):
        read_file(tmp_path / "data.csv")


def test_columns_stand_in_the_order_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("zeta,alpha,mu,beta\n1,2,3,4\n")
    assert list(read_file(tmp_path / "data.csv")) == ["zeta", "alpha", "mu", "beta"]


def test_a_missing_column_lists_those_that_are_there(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "data.csv", cells(8))
    for settings in (
        DataSettings(source, text="words"),
        DataSettings(source, label="words"),
        DataSettings(source, columns=("words",)),
    ):
        with pytest.raises(DataError, match="must have a column 'words', got the columns label, site, text"):
            load(settings)


@pytest.mark.parametrize(("name", "content"), [("a.csv", ""), ("a.csv", "text,label\n"), ("a.jsonl", "\n\n")])
def test_an_empty_file_is_refused(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match="must hold at least one row, got none"):
        load(DataSettings(str(tmp_path / name)))


def test_empty_texts_are_counted_and_their_rows_named(tmp_path: Path) -> None:
    rows = cells(20)
    for number in (2, 4, 6, 8, 10, 12):
        rows[number] = ("  ", "no", "north")
    source = write_csv(tmp_path / "data.csv", rows)
    with pytest.raises(
        DataError, match=r"column 'text' .* got 6 empty of 20 \(rows 3, 5, 7, 9, 11, \.\.\.\); remove those rows"
    ):
        load(DataSettings(source))


def test_missing_classes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b"}\n{"text": "c", "label": NaN}\n')
    with pytest.raises(DataError, match=r"column 'label' .* got 2 empty of 3 \(rows 2, 3\)"):
        load(DataSettings(str(tmp_path / "data.jsonl")))


def test_a_class_that_only_the_test_rows_have_is_refused(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "train.csv", cells(8))
    test = write_csv(tmp_path / "test.csv", [("text", "maybe", "north")])
    with pytest.raises(DataError, match=r"every class of .*test\.csv must be in the training rows, got 'maybe'"):
        load(DataSettings(source, test=test))


def test_a_limit_that_loses_a_class_is_refused(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "train.csv", cells(40))
    with pytest.raises(DataError, match="every class of the test rows must be in the training rows"):
        load(DataSettings(source, limit=1))


def test_a_single_class_is_refused(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "data.csv", [("a", "x", "n"), ("b", "x", "n"), ("c", "x", "n")])
    with pytest.raises(DataError, match="must have at least two classes, got only 'x'"):
        load(DataSettings(source))


def test_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_bytes("text,label\nKöln,x\nRom,y\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"must be UTF-8, got byte 0xf6 at 12; save it as UTF-8"):
        load(DataSettings(str(tmp_path / "data.csv")))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\na,x\nb,y,z\n", "row 2 of .* must have as many cells as the header"),
        ("a.jsonl", '{"text": "a"}\n{"text": b}\n', "line 2 of .* must be JSON, got an error at column 10"),
        ("a.jsonl", '["a", "b"]\n', "line 1 of .* must be a JSON object, got list"),
        ("a.parquet", "text,label\n", "must be a Parquet file"),
        ("a.csv", "text,label\n" + "a" * 200_000 + ",x\n", "must be a table of cells, got: field larger"),
    ],
)
def test_broken_files_are_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load(DataSettings(str(tmp_path / name)))


def test_a_hub_that_is_out_of_reach_is_told_from_a_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nlong traceback")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(
        DataError, match=r"'vadder' \(train\) .* got: Couldn't reach the hub; check the name, go online"
    ):
        load(DataSettings("vadder"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (DataSettings("vader", test_fraction=0.0), "test_fraction must be above 0 and below 1"),
        (DataSettings("vader", limit=0), "limit must be at least 1"),
        (DataSettings("vader", prompt="text"), "prompt must be left out for sequence-classification"),
        (DataSettings("vader", test="test.csv"), "test must be left out for the packaged source 'vader'"),
        (DataSettings("vader", task="image-classification"), "must have a column 'image', got the columns domain"),
    ],
)
def test_wrong_settings_are_refused(settings: DataSettings, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(settings)


def test_a_column_that_was_not_kept_is_refused() -> None:
    with pytest.raises(DataError, match=r"must be one that was kept \(none\), got 'site'; name it"):
        Rows(np.array([0])).column("site")


# --- splitting ----------------------------------------------------------------------------------------------------


def test_the_held_out_rows_follow_from_the_seed_and_keep_proportions(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "data.csv", cells(400))
    table = load(DataSettings(source, columns=("site",)))
    assert texts(table) == texts(load(DataSettings(source, columns=("site",))))
    assert texts(table) != texts(load(DataSettings(source, columns=("site",), seed=1)))
    assert sorted(table.train.texts + table.test.texts) == sorted(text for text, _, _ in cells(400))
    # One row of each class is kept for training before the rest is divided.
    assert np.bincount(table.test.labels).tolist() == pytest.approx([60, 20], abs=1)
    assert (table.test.columns["site"] == "north").sum() == pytest.approx(40, abs=1)


def test_a_rare_class_stays_in_training(tmp_path: Path) -> None:
    rows = [*cells(12), ("rare", "once", "north")]
    table = load(DataSettings(write_csv(tmp_path / "data.csv", rows), test_fraction=0.7))
    assert "rare" in table.train.texts


def test_limits_keep_proportions(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "data.csv", cells(400))
    table = load(DataSettings(source, limit=40, test_limit=8))
    assert np.bincount(table.train.labels).tolist() == [30, 10]
    assert np.bincount(table.test.labels).tolist() == [6, 2]


def test_too_few_rows_to_hold_any_out_are_refused(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "data.csv", cells(2))
    with pytest.raises(DataError, match="test_fraction must leave rows on both sides"):
        load(DataSettings(source))


@given(groups=st.lists(st.integers(0, 4), min_size=1, max_size=60), count=st.integers(0, 70))
def test_spread_takes_each_group_in_proportion(groups: list[int], count: int) -> None:
    array = np.array(groups)
    chosen = spread(array, count)
    expected = min(count, len(groups))
    assert len(set(chosen.tolist())) == len(chosen) == expected
    for group in set(groups):
        share = (array == group).sum() * expected / len(groups)
        assert abs((array[chosen] == group).sum() - share) <= 1


def test_columns_of_ids_do_not_make_groups() -> None:
    ids = np.array([str(number) for number in range(12)])
    sites = np.array(["a", "b"] * 6)
    rows = Rows(np.zeros(12, dtype=np.int64), columns={"id": ids, "site": sites})
    assert strata(rows).tolist() == [0, 1] * 6


# --- validation rows -------------------------------------------------------------------------------------------------


def test_validation_rows_come_from_the_training_rows_in_proportion(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "data.csv", cells(80))
    whole = load(DataSettings(path, test_fraction=0.25, columns=("site",)))
    table = load(DataSettings(path, test_fraction=0.25, columns=("site",), validation_fraction=0.2))
    assert table.validation is not None
    assert (len(table.train), len(table.validation), len(table.test)) == (48, 12, 20)
    assert sorted([*table.train.texts, *table.validation.texts]) == sorted(whole.train.texts)
    assert list(table.test.texts) == list(whole.test.texts)  # the test set is the same with and without
    assert np.bincount(table.validation.labels).tolist() == [9, 3]
    assert whole.validation is None


def test_validation_rows_follow_from_the_seed_alone(tmp_path: Path) -> None:
    path, test = write_csv(tmp_path / "data.csv", cells(80)), write_csv(tmp_path / "test.csv", cells(8))

    def chosen(**changes: int) -> list[str]:
        validation = load(DataSettings(path, test=test, validation_fraction=0.2, **changes)).validation  # type: ignore[arg-type]
        assert validation is not None
        return list(validation.texts)

    assert chosen() == chosen() != chosen(seed=1)
    limited = load(DataSettings(path, test=test, validation_fraction=0.2, limit=40))
    assert limited.validation is not None
    assert (len(limited.train), len(limited.validation)) == (32, 8)


def test_every_class_keeps_a_training_row_when_most_are_held_out(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "data.csv", cells(20))
    table = load(DataSettings(path, test=path, validation_fraction=0.85))
    assert set(table.train.labels.tolist()) == {0, 1}


def test_public_rows_come_from_the_training_rows_after_the_validation_rows(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "data.csv", cells(80))
    whole = load(DataSettings(path, test_fraction=0.25, validation_fraction=0.2))
    table = load(DataSettings(path, test_fraction=0.25, validation_fraction=0.2, public_fraction=0.25))
    assert whole.public is None
    assert whole.validation is not None
    assert table.public is not None
    assert table.validation is not None
    assert (len(table.train), len(table.public)) == (36, 12)
    assert sorted([*table.train.texts, *table.public.texts]) == sorted(whole.train.texts)
    assert list(table.validation.texts) == list(whole.validation.texts)
    assert list(table.test.texts) == list(whole.test.texts)
    assert np.bincount(table.public.labels).tolist() == [9, 3]


def test_inputs_are_read_whether_a_source_has_classes_or_not(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "public.csv", [[f"line {k}"] for k in range(9)], ["words"])
    rows = load_inputs(DataSettings(path, text="words"))
    assert list(rows.texts) == [f"line {k}" for k in range(9)]
    assert rows.labels.tolist() == [0] * 9
    some = load_inputs(DataSettings(path, text="words", limit=4))
    assert len(some) == 4
    assert set(some.texts) < set(rows.texts)
    with pytest.raises(DataError, match="must have a column 'text', got the columns words"):
        load_inputs(DataSettings(path))


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_validation_fraction_that_leaves_nothing_is_refused(tmp_path: Path, fraction: float) -> None:
    path = write_csv(tmp_path / "data.csv", cells(20))
    with pytest.raises(DataError, match="validation_fraction must be 0 or more and below 1"):
        load(DataSettings(path, validation_fraction=fraction))


def test_a_validation_fraction_that_rounds_to_no_row_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "data.csv", cells(20))
    with pytest.raises(DataError, match=r"validation_fraction must leave rows on both sides, got 0\.01 of 16 rows"):
        load(DataSettings(path, validation_fraction=0.01))
