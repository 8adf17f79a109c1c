"""A judge that follows a script: for tests of what stands around a judge, and for dry runs.

What it says depends on the comparison alone. Chance is a hash of the prompt and the two texts, the
same in whatever order and however often it is asked.
"""

import hashlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace

from align.artifacts import canonical_json
from align.judge.orders import over_both_orders
from align.judge.settings import Scripted
from align.judge.verdicts import without
from align.records import Comparison, Verdict


async def compare(
    comparisons: Iterable[Comparison], *, settings: Scripted
) -> AsyncIterator[Verdict]:
    """One verdict a comparison, in order; it looks in both orders."""
    for comparison in comparisons:
        yield replace(verdict(comparison, settings=settings), cost=settings.cost_usd)


def verdict(comparison: Comparison, *, settings: Scripted) -> Verdict:
    """What the script says of one comparison."""
    status = drawn_status(comparison, settings=settings)
    if status is not None:
        return without(comparison, status=status, judge=settings.judge)
    swapped = comparison.swap()
    return over_both_orders(
        comparison,
        p_first=look(comparison, settings=settings),
        p_first_swapped=look(swapped, settings=settings),
        judge=settings.judge,
    )


def look(shown: Comparison, *, settings: Scripted) -> float:
    """Probability that the answer shown first is the better one, in this order."""
    first, second = marks(shown, settings=settings)
    p = 0.5 if first == second else settings.p if first > second else 1 - settings.p
    return 1 - p if draw(shown, "noise") < settings.noise else p


def marks(shown: Comparison, *, settings: Scripted) -> tuple[float, float]:
    """What the script sees in the answer shown first and in the other one; more is better."""
    first, second = shown.first, shown.second
    match settings.prefer:
        case "longest":
            return len(first), len(second)
        case "shortest":
            return -len(first), -len(second)
        case "first":
            return 1, 0
        case "second":
            return 0, 1
        case "contains":
            assert settings.text is not None
            return settings.text in first, settings.text in second
    return 0, 0


def drawn_status(comparison: Comparison, *, settings: Scripted) -> str | None:
    """The failure that the comparison meets, None where it gets a verdict."""
    left = draw(comparison, "status")
    for status, share in sorted((settings.statuses or {}).items()):
        left -= share
        if left < 0:
            return status
    return None


def draw(comparison: Comparison, purpose: str) -> float:
    """A number in [0, 1) that belongs to the comparison, whichever answer stands first."""
    told = [
        purpose,
        comparison.prompt.id,
        [[m.role, m.content] for m in comparison.prompt.messages],
        sorted([comparison.first, comparison.second]),
    ]
    digest = hashlib.sha256(canonical_json(told).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48
