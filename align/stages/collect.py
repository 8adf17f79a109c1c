"""Takes in candidates that somebody else made; what is wrong with a row is told, and the rest goes
on.
"""

import hashlib
import sqlite3
from pathlib import Path

from align.artifacts import write_json
from align.errors import DataError
from align.jsonl import dump_line
from align.notice import notice
from align.records import Candidate
from align.sources.tables import table_rows
from align.stages.settings import CollectStage

MOST_TOLD = 10


class Ids:
    """The ids of a file of any length: on disk, for a million of them would double what a
    labelling holds in memory.
    """

    def __init__(self) -> None:
        self.database = sqlite3.connect("", isolation_level=None)  # a temporary file of its own
        self.database.execute("CREATE TABLE taken (id BLOB PRIMARY KEY) WITHOUT ROWID")
        self.database.execute("BEGIN")

    def take(self, id: str) -> bool:
        """Takes an id; False where it is taken."""
        name = hashlib.blake2b(id.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        found = self.database.execute("INSERT OR IGNORE INTO taken VALUES (?)", (name,))
        return found.rowcount == 1


def run(settings: CollectStage, inputs: dict[str, Path], out: Path) -> None:
    """Writes candidates.jsonl, refused.jsonl (place and reason of each bad row) and counts.json.

    Raises:
        DataError: the file cannot be read, or no row of it can.
    """
    path, ids = Path(settings.path), Ids()
    good = bad = 0
    with (out / "candidates.jsonl").open("wb") as file, (out / "refused.jsonl").open("wb") as ill:
        for place, number, row in table_rows(path):
            try:
                if isinstance(row, DataError):
                    raise row
                candidate = Candidate.from_json(row, number=number)
                line = dump_line(candidate.to_json())
                if not ids.take(candidate.id):
                    raise DataError(
                        f"the id {candidate.id[:40]!r} was used before; give every prompt an id of "
                        "its own, or none"
                    )
            except (DataError, TypeError, ValueError, OverflowError, RecursionError) as error:
                why = str(error).removeprefix(f"{place}: ")
                ill.write(dump_line({"place": place, "why": why}))
                bad += 1
                if bad <= MOST_TOLD:
                    notice(f"{place}: {why}; left out")
                continue
            file.write(line)
            good += 1
    if bad > MOST_TOLD:
        notice(f"{path}: {bad - MOST_TOLD} more rows left out (refused.jsonl)")
    if not good:
        raise DataError(
            f'{path}: no row has candidates; a row is {{"prompt": "…", "responses": ["…", "…"]}}'
        )
    write_json(out / "counts.json", {"candidates": good, "refused": bad})
