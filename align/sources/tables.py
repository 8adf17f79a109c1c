"""Reads tables as people keep them (JSON lines, a JSON list, CSV, parquet), a row at a time.

Unlike `local.rows`, a bad row does not end the file: it comes as the `DataError` that says why.
"""

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from align.errors import DataError
from align.jsonl import parse_line
from align.sources.local import parquet_rows

Row = Mapping[str, Any]
TableRow = tuple[str, int, Row | DataError]


def table_rows(path: Path) -> Iterator[TableRow]:
    """(place, number from 1, row or what is wrong with it) of every row.

    Raises:
        DataError: no such file, another kind of file, or one that is broken as a whole.
    """
    readers: dict[str, Callable[[Path], Iterator[TableRow]]] = {
        ".parquet": parquet_rows,
        ".csv": csv_rows,
        ".json": json_rows,
        ".jsonl": line_rows,
        ".ndjson": line_rows,
    }
    if path.suffix not in readers:
        raise DataError(f"{path}: none of {', '.join(sorted(readers))}; convert it to one of them")
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the path of an existing one")
    yield from readers[path.suffix](path)


def line_rows(path: Path) -> Iterator[TableRow]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            row: Row | DataError
            try:
                row = parse_line(raw, path=path, number=number)
            except DataError as error:
                row = error
            yield f"{path}:{number}", number, row


def json_rows(path: Path) -> Iterator[TableRow]:
    """A list of objects, or an object a line."""
    with path.open("rb") as file:
        is_list = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if not is_list:
        yield from line_rows(path)
        return
    try:
        rows = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a list of JSON objects ({error}); mend the file") from error
    for number, row in enumerate(rows, start=1):
        kind = type(row).__name__
        fit = row if isinstance(row, dict) else DataError(f"a JSON {kind}, not an object {{…}}")
        yield f"{path}, row {number}", number, fit


def csv_rows(path: Path) -> Iterator[TableRow]:
    """The first line names the columns."""
    csv.field_size_limit(sys.maxsize)  # of the process; 128 KiB, the default, is a long answer
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        number = 0
        while True:
            number += 1
            row: Row | DataError
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                row = DataError(f"not CSV ({error})")
            except UnicodeDecodeError as error:
                raise DataError(f"{path}: not UTF-8 ({error}); save it as UTF-8") from error
            else:
                if None in row or None in row.values():
                    row = DataError("has another number of fields than the first line")
            yield f"{path}, row {number}", number, row
