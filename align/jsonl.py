"""JSONL shards: append-only writing with torn-line repair, reading with file and line in every
error.

Own code rather than `datasets`: its JSON reader infers one schema for all lines, which fills every
row's free `meta` with the keys of all the others.
"""

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from align.errors import DataError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class FromJson(Protocol[T_co]):
    """A record class, seen as the function that reads it."""

    def __call__(self, line: Mapping[str, Any], *, number: int = 0) -> T_co: ...


def parse_line(raw: bytes, *, path: Path, number: int) -> dict[str, Any]:
    """One line as a dict.

    Raises:
        DataError: not UTF-8, not JSON, or not an object; the message starts with file and line.
    """
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError) as error:  # numbers and nestings without end, too
        raise DataError(
            f"{path}:{number}: not a line of JSON ({error}); mend or remove the line"
        ) from error
    if not isinstance(line, dict):
        raise DataError(
            f"{path}:{number}: a JSON {type(line).__name__}, not an object {{…}}; one record a line"
        )
    return line


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, parsed line) of each non-blank line."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.strip():
                yield number, parse_line(raw, path=path, number=number)


def read_records(path: Path, from_json: FromJson[T]) -> Iterator[T]:
    """The records of one file, in order, one at a time.

    Raises:
        DataError: a bad line, named by file and line.
    """
    for number, line in read_lines(path):
        try:
            yield from_json(line, number=number)
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from error


class IndexedRecords(Sequence[T], Generic[T]):
    """The records of a JSONL file, one after the other or by index, with eight bytes of memory per
    record.
    """

    def __init__(self, path: Path, from_json: FromJson[T]) -> None:
        self.path, self.from_json, self.offsets = path, from_json, array("Q")
        with path.open("rb") as file:
            offset = 0
            for raw in file:
                if raw.strip():
                    self.offsets.append(offset)
                offset += len(raw)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        line = parse_line(self.raw(index), path=self.path, number=index + 1)
        return self.from_json(line, number=index + 1)

    def __iter__(self) -> Iterator[T]:
        """In order, the file opened once."""
        for number, (_, line) in enumerate(read_lines(self.path), start=1):
            yield self.from_json(line, number=number)

    def raw(self, index: int) -> bytes:
        """The line as it stands in the file."""
        with self.path.open("rb") as file:
            file.seek(self.offsets[index])
            return file.readline()


def dump_line(record: Mapping[str, Any]) -> bytes:
    # ensure_ascii: a lone surrogate or U+2028 in a model's text can then neither break a line nor
    # the encoding
    return json.dumps(record, ensure_ascii=True, separators=(", ", ": ")).encode() + b"\n"


class JsonlAppender:
    """Appends records durably. Opening it cuts a half-written last line off, and `lines` counts
    what stands.

    Example: `with JsonlAppender(path) as out: out.append([{"id": "1"}])`
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = repair(path)
        self.file = path.open("ab")

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Writes the records as one block and waits until it is on disk."""
        rows = [dump_line(record) for record in records]
        self.file.write(b"".join(rows))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.lines += len(rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.close()


def repair(path: Path) -> int:
    """Cuts a last line without a newline off; returns the number of whole lines."""
    if not path.exists():
        return 0
    whole, count = 0, 0
    with path.open("rb") as file:
        for raw in file:
            if not raw.endswith(b"\n"):
                break
            whole += len(raw)
            count += 1
    if whole < path.stat().st_size:
        os.truncate(path, whole)
    return count


def truncate_lines(path: Path, keep: int) -> None:
    """Keeps the first `keep` lines."""
    with path.open("rb") as file:
        size = sum(len(raw) for raw, _ in zip(file, range(keep), strict=False))
    os.truncate(path, size)
