"""Has comparisons judged, and keeps every verdict on disk, in the order asked, so that none is
asked for twice.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from align.errors import JudgeError
from align.jsonl import JsonlAppender, read_records, repair, truncate_lines
from align.judge.ask import key_of, verdicts_of, window_of
from align.judge.settings import Asking
from align.notice import notice
from align.progress import progress_bar
from align.records import OK, TIE, Comparison, Verdict

VERDICTS = "verdicts.jsonl"
BLOCK = 256  # verdicts between two writes: all that SIGKILL can lose


def judge_missing(
    comparisons: Callable[[], Iterable[Comparison]], *, judge: Any, path: Path, title: str
) -> int:
    """Appends the verdicts that `path` does not hold yet; returns how many comparisons there are.

    Args:
        comparisons: gives them anew each time it is called; they are never all in memory.
        judge: the settings of the judge to ask.

    Raises:
        JudgeError: the judge cannot go on, or gives verdicts in another order; what it said before
            is kept.
    """
    repair(path)
    if path.exists():
        whole = whole_prompts(comparisons(), path, window=window_of(judge))
        truncate_lines(path, whole)
    with JsonlAppender(path) as appender:
        missing = Missing(comparisons, path)
        without_reference(missing, judge)
        done = missing.total - len(missing)
        with progress_bar(title, missing.total, unit="comparisons", done=done) as advance:
            asyncio.run(append(missing, judge=judge, appender=appender, advance=advance))
    return missing.total


def whole_prompts(comparisons: Iterable[Comparison], path: Path, *, window: int = 1) -> int:
    """How many of the verdicts are on prompts whose last comparison has one.

    A judge that ranks all answers of a prompt must be asked about all of them or none, so what a
    crash left of a prompt is judged again; a judge with a ledger pays nothing for it.

    Args:
        window: comparisons that the judge looks at together, as `verdicts.windows` has them. What
            is left of such a window is judged again too, for batches put together otherwise differ
            in the last digits.
    """
    verdicts = read_verdicts(path)
    pending = next(verdicts, None)
    whole = seen = size = 0
    for _, group in groupby(comparisons, key=lambda comparison: comparison.prompt.id):
        last = False
        for comparison in group:
            size += 1
            last = pending is not None and is_of(pending, comparison)
            if last:
                seen += 1
                pending = next(verdicts, None)
        if pending is None and not last:
            return whole
        if size >= window:
            whole, size = seen, 0
    return seen if pending is None else seen + 1 + sum(1 for _ in verdicts)


class Missing:
    """The comparisons after the last one that has a verdict; can be gone through more than once."""

    def __init__(self, comparisons: Callable[[], Iterable[Comparison]], path: Path) -> None:
        self.comparisons, self.path = comparisons, path
        self.judged = sum(1 for _ in read_verdicts(path))
        counts = Counter(lacking for lacking, _ in self.all())
        self.count, self.total = counts[True], counts.total()

    def __iter__(self) -> Iterator[Comparison]:
        return (comparison for lacking, comparison in self.all() if lacking)

    def all(self) -> Iterator[tuple[bool, Comparison]]:
        """Every comparison, and whether it is missing.

        Raises:
            JudgeError: there is a verdict that is on none of them.
        """
        verdicts = (v for v, _ in zip(read_verdicts(self.path), range(self.judged), strict=False))
        pending = next(verdicts, None)
        for comparison in self.comparisons():
            lacking = pending is None
            if pending is not None and is_of(pending, comparison):
                pending = next(verdicts, None)
            yield lacking, comparison
        if pending is not None:
            raise JudgeError(
                f"{self.path}: holds a verdict on prompt {pending.id} that nobody asked for, or in "
                "another order; remove the file, and the same command judges anew"
            )

    def __len__(self) -> int:
        return self.count


def is_of(verdict: Verdict, comparison: Comparison) -> bool:
    return (verdict.id, verdict.first, verdict.second) == (
        comparison.prompt.id,
        comparison.first_index,
        comparison.second_index,
    )


@dataclass
class InOrder:
    """Checks that verdicts come in the order of what was asked; some may be left out."""

    asked: Iterator[Comparison]
    judge: Any

    def check(self, verdict: Verdict) -> None:
        """
        Raises:
            JudgeError: none of the comparisons that are left is the verdict's.
        """
        if not any(is_of(verdict, comparison) for comparison in self.asked):
            raise JudgeError(
                f"judge={self.judge.name}: gave a verdict on prompt {verdict.id} (answers "
                f"{verdict.first} and {verdict.second}) that was not asked for, or came after a "
                "later "
                "one; compare() must yield verdicts in the order of its comparisons, with their ids"
            )


async def append(
    comparisons: Missing,
    *,
    judge: Any,
    appender: JsonlAppender,
    advance: Callable[..., None],
) -> None:
    """Asks and writes in blocks; what was answered before an error is written too."""
    order = InOrder(asked=iter(comparisons), judge=judge)
    block: list[Verdict] = []
    failed, cost = 0, 0.0
    try:
        async with contextlib.aclosing(verdicts_of(comparisons, settings=judge)) as found:
            async for verdict in found:
                order.check(verdict)
                block.append(verdict)
                failed, cost = failed + (verdict.status not in (OK, TIE)), cost + verdict.cost
                advance(1, 1, note(failed, cost))
                if len(block) == BLOCK:
                    appender.append(v.to_json() for v in block)
                    block = []
    finally:
        appender.append(v.to_json() for v in block)


def again(counts: Mapping[str, int]) -> str:
    """What to type where the judge failed at some of the comparisons; empty where at none.

    Args:
        counts: of verdicts, by status.
    """
    return "; to ask the failed ones again: retry=true" if counts.get("failed") else ""


def without_reference(comparisons: Iterable[Comparison], judge: Any) -> None:
    """A line where answers are to be judged by a reference that the prompts do not have."""
    first = next(iter(comparisons), None)
    if first is None or not isinstance(judge, Asking) or Path(judge.prompt).stem != "correctness":
        return
    if not isinstance(first.prompt.meta.get(judge.reference), str):
        at = key_of(judge)
        notice(
            f"{at}.prompt=correctness: prompt {first.prompt.id} has no meta.{judge.reference}, so "
            "the judge goes by what it knows itself; name the key of the right answer with "
            f"{at}.reference=KEY"
        )


def note(failed: int, cost: float) -> str:
    """What stands beside the bar: comparisons without a verdict, and what the labels cost, now or
    when they were bought.
    """
    lacking = f"{failed} without a verdict" if failed else ""
    price = f"labels of ${cost:,.{2 if cost >= 10 else 4}f}" if cost else ""
    return ", ".join(part for part in (lacking, price) if part)


def read_verdicts(path: Path) -> Iterator[Verdict]:
    def from_json(line: Any, *, number: int = 0) -> Verdict:
        return Verdict(**{key: value for key, value in line.items() if key != "v"})

    return read_records(path, from_json)


class Said:
    """Goes through a file of verdicts, in step with the comparisons that they are of."""

    def __init__(self, path: Path) -> None:
        self.verdicts = read_verdicts(path)
        self.pending = next(self.verdicts, None)

    def on(self, comparisons: Iterable[Comparison]) -> list[tuple[Comparison, Verdict]]:
        """The next comparisons with their verdicts; those that the judge passed over are left
        out.
        """
        found = []
        for comparison in comparisons:
            if self.pending is not None and is_of(self.pending, comparison):
                found.append((comparison, self.pending))
                self.pending = next(self.verdicts, None)
        return found
