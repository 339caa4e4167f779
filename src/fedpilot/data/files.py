"""Reading tables from files and from the hub, with errors that name the file, the row and the remedy."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from fedpilot.data.packaged import Columns, Raw
from fedpilot.data.tables import DataSettings
from fedpilot.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")


def read_file(path: Path) -> Columns:
    """A table's columns; values are strings but for JSON Lines and Parquet, which have types.

    Raises:
        DataError: The file is missing, of another kind, empty, not UTF-8, or has a row that does not parse.
    """
    if not path.is_file():
        raise DataError(f"data file must exist, got {path}; check the path, which is relative to where you are")
    if path.suffix not in SUFFIXES:
        raise DataError(f"data file must end in {', '.join(SUFFIXES)}, got {path.name}")
    with path.open("rb") as file:
        if path.suffix != ".parquet" and file.read(4) == b"PK\x03\x04":
            raise DataError(f"{path} must be text, got a spreadsheet or an archive; save the sheet as .csv")
    try:
        columns = _parquet(path) if path.suffix == ".parquet" else _columns(path, _records(path))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} must be UTF-8, got byte 0x{error.object[error.start]:02x} at {error.start}; save it as UTF-8"
        ) from error
    except csv.Error as error:
        raise DataError(f"{path} must be a table of cells, got: {error}; save it as .jsonl or .parquet") from error
    if not columns or not len(next(iter(columns.values()))):
        raise DataError(f"{path} must hold at least one row, got none")
    return columns


def _records(path: Path) -> Iterator[Mapping[str, object]]:
    # utf-8-sig drops the mark that spreadsheet programs put at the start.
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix != ".jsonl":
            yield from csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else _separator(file))
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _json_object(path, number, line)


def _separator(file: TextIO) -> str:
    """What stands between the columns of the first line, where there is no comma: spreadsheets follow the country."""
    header = file.readline()
    file.seek(0)
    return "," if "," in header else next((mark for mark in ";\t|" if mark in header), ",")


def _json_object(path: Path, number: int, line: str) -> Mapping[str, object]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        what = f"an error at column {error.colno}: {error.msg}"
        raise DataError(f"line {number} of {path} must be JSON, got {what}") from error
    if not isinstance(record, dict):
        raise DataError(f"line {number} of {path} must be a JSON object, got {type(record).__name__}")
    return record


def _columns(path: Path, records: Iterator[Mapping[str, object]]) -> Columns:
    columns: dict[str, list[object]] = {}
    for number, record in enumerate(records, start=1):
        if None in record:
            advice = "put quotes around cells with commas"
            raise DataError(f"row {number} of {path} must have as many cells as the header, got more; {advice}")
        for name in record:
            if name not in columns:
                columns[name] = [None] * (number - 1)
        for name, values in columns.items():
            values.append(record.get(name))
    return columns


def _parquet(path: Path) -> Columns:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path} must be a Parquet file, got: {str(error).splitlines()[0]}") from error
    return {name: table.column(name).to_pylist() for name in table.column_names}


def read_hub(settings: DataSettings) -> Raw:
    """What ``datasets.load_dataset`` gives for a hub id or a local folder.

    Raises:
        DataError: It cannot be reached, or has no such configuration or split.
    """

    import datasets

    def split(name: str) -> "Dataset":
        try:
            return datasets.load_dataset(settings.source, settings.config, split=name)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise DataError(
                f"data source {settings.source!r} ({name}) must be a packaged name, a file, or a folder or hub id that "
                f"can be loaded, got: {said[0]}; check the name, go online, or download it and name the folder"
            ) from error

    train = split(settings.split)
    test = None if settings.test is None else _plain(split(settings.test), settings)
    feature = train.features.get(settings.label)
    names = tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    return Raw(_plain(train, settings), test, names)


def _plain(dataset: "Dataset", settings: DataSettings) -> Columns:
    """Columns as Python values, with classes by name."""
    columns: dict[str, list[object]] = {name: list(dataset[name]) for name in dataset.column_names}
    names = getattr(dataset.features.get(settings.label), "names", None)
    if names is not None:
        # The hub marks a missing class with -1.
        columns[settings.label] = [names[index] if index >= 0 else None for index in dataset[settings.label]]
    return columns
