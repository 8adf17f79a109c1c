"""Reads a source into records: every line is checked here, once, and later stages read plain
JSONL.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from align.artifacts import write_json
from align.errors import DataError
from align.jsonl import dump_line
from align.named import named_module
from align.records import Preference, Prompt, Record
from align.split import prompt_key
from align.stages.settings import ReadStage


def run(settings: ReadStage, inputs: dict[str, Path], out: Path) -> None:
    """Writes prompts.jsonl or preferences.jsonl, and counts.json.

    Raises:
        DataError: a bad line, an id used for two prompts, or nothing to read.
    """
    source = settings.source
    module = named_module("align.sources", source.name, source.module)
    given = source.test_path if settings.test else source.path
    assert given is not None
    # The test file holds prompts, whatever the source provides for training.
    if settings.test:
        from align.sources.prompts import read
    else:
        read = module.read
    kind = Prompt if settings.test else module.PROVIDES
    name = f"{kind.__name__.lower()}s"
    records = checked(read(Path(given), settings=source), kind=kind, path=given)
    count = write(islice(records, settings.limit), out / f"{name}.jsonl")
    if count == 0:
        raise DataError(f"{given}: no {name} in it; give a file with at least one")
    write_json(out / "counts.json", {name: count})


def checked(records: Iterable[Record], *, kind: type[Record], path: str) -> Iterator[Record]:
    """The records, each id standing for one prompt; pairs of a prompt may share theirs.

    Raises:
        DataError: see above.
    """
    seen: dict[str, str] = {}
    for number, record in enumerate(records, start=1):
        key = prompt_key(record.messages)
        if seen.get(record.id, key) != key or (record.id in seen and kind is not Preference):
            raise DataError(
                f"{path}: record {number}: the id {record.id!r} was used before; give every prompt "
                "an id of its own, or none"
            )
        seen[record.id] = key
        yield record


def write(records: Iterable[Record], path: Path) -> int:
    """Writes the file anew (reading is quick, so it does not resume) and returns its number of
    lines.
    """
    count = 0
    with path.open("wb") as file:
        for record in records:
            file.write(dump_line(record.to_json()))
            count += 1
    return count
