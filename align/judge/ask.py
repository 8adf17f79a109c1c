"""A judge asked through its module, whoever asks: its stream is ended, and what goes wrong names
its settings where they stand.
"""

import contextlib
import traceback
from collections.abc import AsyncGenerator, Iterable, Iterator
from typing import Any

from align.errors import AlignError, JudgeError, keyed
from align.judge.settings import Jury
from align.named import named_module
from align.records import Comparison, Verdict


async def verdicts_of(
    comparisons: Iterable[Comparison], *, settings: Any
) -> AsyncGenerator[Verdict, None]:
    """What the judge of these settings says, in its order. Close it where it is left early
    (`contextlib.aclosing`): answers that are under way are then waited for, not cut off.
    """
    module = named_module("align.judge", settings.name, settings.module)
    stream = aiter(module.compare(comparisons, settings=settings))
    try:
        with keyed(key_of(settings)), told_in_a_line(settings):
            async for verdict in stream:
                yield verdict
    finally:
        if hasattr(stream, "aclose"):
            await stream.aclose()


def window_of(settings: Any) -> int:
    """How many comparisons a judge looks at together, so that its file may only be cut between
    them: its module's WINDOW, 1 where it has none; of a jury, the most of its members.
    """
    if isinstance(settings, Jury):
        return max(map(window_of, settings.members.values()))
    module = named_module("align.judge", settings.name, settings.module)
    return int(getattr(module, "WINDOW", 1))


@contextlib.contextmanager
def told_in_a_line(settings: Any) -> Iterator[None]:
    """An error in the program of a user's judge, with its place.

    Raises:
        JudgeError: there was one.
    """
    try:
        yield
    except AlignError:
        raise
    except Exception as error:
        if settings.module is None:
            raise
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{last.filename}:{last.lineno}"
        raise JudgeError(
            f"{key_of(settings)}.module={settings.module}: its compare() failed at {place} "
            f"({type(error).__name__}: {error}); what it said before is kept, mend it and type the "
            "same command"
        ) from error


def key_of(settings: Any) -> str:
    """Where a judge stands in the configuration, as `align.config` noted."""
    return str(getattr(settings, "_stands_at", "judge"))
