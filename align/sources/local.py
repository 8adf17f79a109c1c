"""Reads local JSONL, JSON-lines-like and parquet files as dicts, each with the place that an error
can name.
"""

from collections.abc import Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

from align.errors import DataError
from align.jsonl import FromJson, read_lines

T = TypeVar("T")


def rows(path: Path) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """(place, number from 1, row) of every row of a .jsonl, .json-lines or .parquet file.

    Raises:
        DataError: another kind of file, or a line that is not JSON.
    """
    if path.suffix == ".parquet":
        yield from parquet_rows(path)
    elif path.suffix in (".jsonl", ".ndjson", ".json"):
        for number, line in read_lines(path):
            yield f"{path}:{number}", number, line
    else:
        raise DataError(f"{path}: neither .jsonl nor .parquet; convert it to one of them")


def parquet_rows(path: Path) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    import pyarrow.lib
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.lib.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file ({error})") from error
    number = 0
    for batch in file.iter_batches():
        for row in batch.to_pylist():
            number += 1
            place = f"{path}, row {number}"
            yield place, number, {key: as_json(value, place, key) for key, value in row.items()}


def as_json(value: Any, place: str, column: str) -> Any:
    """A parquet value as JSON has it: times as ISO 8601, decimals as their digits.

    Raises:
        DataError: bytes, which are no text.
    """
    if isinstance(value, dict):
        return {key: as_json(part, place, column) for key, part in value.items()}
    if isinstance(value, list):
        return [as_json(part, place, column) for part in value]
    if isinstance(value, bytes):
        raise DataError(f"{place}: column {column!r} holds bytes; leave it out of the file")
    if isinstance(value, date | time):
        return value.isoformat()
    return str(value) if isinstance(value, Decimal | timedelta) else value


def records(path: Path, from_json: FromJson[T]) -> Iterator[T]:
    """The records of a local file, one at a time.

    Raises:
        DataError: a bad row, with its place.
    """
    for place, number, row in rows(path):
        try:
            yield from_json(row, number=number)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
