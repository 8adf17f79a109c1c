"""A judge asked through its module, whoever asks: its stream is ended, and what goes wrong names
its settings where they stand.
"""

from collections.abc import AsyncGenerator, Iterable
from typing import Any

from align.errors import keyed
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
        with keyed(key_of(settings)):
            async for verdict in stream:
                yield verdict
    finally:
        if hasattr(stream, "aclose"):
            await stream.aclose()


def key_of(settings: Any) -> str:
    """Where a judge stands in the configuration, as `align.config` noted."""
    return str(getattr(settings, "_stands_at", "judge"))
