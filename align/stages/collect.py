"""Takes in candidates that somebody else made; what is wrong with a row is told, and the rest goes
on.
"""

from pathlib import Path

from align.artifacts import write_json
from align.errors import DataError
from align.jsonl import dump_line
from align.notice import notice
from align.records import Candidate
from align.sources.tables import table_rows
from align.stages.settings import CollectStage

MOST_TOLD = 10


def run(settings: CollectStage, inputs: dict[str, Path], out: Path) -> None:
    """Writes candidates.jsonl, refused.jsonl (place and reason of each bad row) and counts.json.

    Raises:
        DataError: the file cannot be read, or no row of it can.
    """
    path = Path(settings.path)
    good = bad = 0
    with (out / "candidates.jsonl").open("wb") as file, (out / "refused.jsonl").open("wb") as ill:
        for place, number, row in table_rows(path):
            try:
                if isinstance(row, DataError):
                    raise row
                line = dump_line(Candidate.from_json(row, number=number).to_json())
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
