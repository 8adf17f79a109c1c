"""Has comparisons judged, and keeps every verdict on disk, so that none is asked for twice."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from align.jsonl import JsonlAppender, read_records
from align.named import named_module
from align.progress import progress_bar
from align.records import Comparison, Verdict

VERDICTS = "verdicts.jsonl"
BLOCK = 256  # verdicts between two writes: all that SIGKILL can lose


def judge_missing(
    comparisons: Callable[[], Iterable[Comparison]], *, judge: Any, path: Path, title: str
) -> None:
    """Appends the verdicts that `path` does not hold yet.

    Args:
        comparisons: gives them anew each time it is called; they are never all in memory.
        judge: the settings of the judge to ask.
    """
    with JsonlAppender(path) as appender:
        judged = {(v.id, v.first, v.second) for v in read_verdicts(path)}

        def missing() -> Iterator[Comparison]:
            for c in comparisons():
                if (c.prompt.id, c.first_index, c.second_index) not in judged:
                    yield c

        total = len(judged) + sum(1 for _ in missing())
        with progress_bar(title, total, unit="comparisons", done=len(judged)) as advance:
            asyncio.run(append(missing(), judge=judge, appender=appender, advance=advance))


async def append(
    comparisons: Iterable[Comparison],
    *,
    judge: Any,
    appender: JsonlAppender,
    advance: Callable[[int, int], None],
) -> None:
    """Asks and writes in blocks; what was answered before an error is written too."""
    module = named_module("align.judge", judge.name, judge.module)
    block: list[Verdict] = []
    try:
        async for verdict in module.compare(comparisons, settings=judge):
            block.append(verdict)
            advance(1, 1)
            if len(block) == BLOCK:
                appender.append(v.to_json() for v in block)
                block = []
    finally:
        appender.append(v.to_json() for v in block)


def read_verdicts(path: Path) -> Iterator[Verdict]:
    def from_json(line: Any, *, number: int = 0) -> Verdict:
        return Verdict(**{key: value for key, value in line.items() if key != "v"})

    return read_records(path, from_json)
