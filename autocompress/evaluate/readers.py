"""Files to rows. Text, JSON Lines and CSV with the standard library alone."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autocompress.core.errors import DataError, nearest

Row = Mapping[str, Any]


def read_text(path: Path) -> str:
    """The whole file as UTF-8 (a byte order mark is skipped).

    Raises:
        DataError: missing, empty, unreadable or not UTF-8.
    """
    data = _read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"Text must be UTF-8, but {str(path)!r} holds the byte {data[error.start]:#04x} at "
            f"offset {error.start}. Convert it, e.g. iconv -f latin1 -t utf-8 {path.name} > "
            f"utf8-{path.name}."
        ) from error


def read_rows(path: Path) -> list[Row]:
    """Rows of a .jsonl, .csv or .parquet file.

    Raises:
        DataError: the file is missing, empty, malformed, or of another kind.
    """
    reader = ROW_READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"Cannot read {path.name!r}: a data file ends in .txt, .md, "
            f"{', '.join(ROW_READERS)}. {nearest(path.suffix, SUFFIXES)}"
        )
    rows = reader(path)
    if not rows:
        raise DataError(f"The data file {str(path)!r} is empty: it has no rows. Give it some.")
    return rows


def missing_file(path: Path) -> DataError:
    """The error for a file that is not there, with the nearest names beside it."""
    folder = path.parent
    if not folder.is_dir():
        return DataError(
            f"The data file {str(path)!r} does not exist, nor does its folder {str(folder)!r}."
        )
    siblings = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
    return DataError(f"The data file {str(path)!r} does not exist. {nearest(path.name, siblings)}")


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise missing_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    if not data:
        raise DataError(f"The data file {str(path)!r} is empty (0 bytes). Give it some text.")
    return data


def _read_jsonl(path: Path) -> list[Row]:
    rows: list[Row] = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"Each line of a .jsonl file is one JSON object, but line {number} of "
                f"{str(path)!r} is not JSON: {error.msg} at column {error.colno}."
            ) from error
        if not isinstance(row, dict):
            raise DataError(
                f"Each line of a .jsonl file is one JSON object, but line {number} of "
                f'{str(path)!r} is a {type(row).__name__}. Write it as {{"text": ...}}.'
            )
        rows.append(row)
    return rows


def _read_csv(path: Path) -> list[Row]:
    lines = read_text(path).splitlines(keepends=True)
    with _unlimited_fields():
        try:
            rows: list[Row] = list(csv.DictReader(lines, strict=True))
        except csv.Error as error:
            raise DataError(f"{str(path)!r} is not a CSV file with a header: {error}.") from error
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values():
            raise DataError(
                f"Each row of a CSV file has as many fields as its header, but row {number} of "
                f"{str(path)!r} has not. Quote fields that hold a comma or a line break."
            )
    return rows


@contextmanager
def _unlimited_fields() -> Iterator[None]:
    """Lift csv's limit of 128 KiB a field, which documents exceed."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_parquet(path: Path) -> list[Row]:
    _read_head(path)
    import pyarrow as arrow  # type: ignore[import-untyped]  # ships no type hints
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (arrow.ArrowException, OSError) as error:
        raise DataError(
            f"{str(path)!r} is not a readable Parquet file: {str(error).splitlines()[0]}"
        ) from error
    rows: list[Row] = table.to_pylist()
    return rows


def _read_head(path: Path) -> None:
    if not path.is_file():
        raise missing_file(path)
    if path.stat().st_size == 0:
        raise DataError(f"The data file {str(path)!r} is empty (0 bytes).")


ROW_READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, *ROW_READERS)
