"""How a judge behaves over many verdicts, counted one at a time: does the order sway it, does
length?
"""

from dataclasses import dataclass, field

from align.records import Comparison, Verdict
from align.stats import Interval, wilson


@dataclass
class Share:
    """A share that is counted up; halves count for ties."""

    n: int = 0
    total: float = 0.0

    def add(self, value: float) -> None:
        self.n += 1
        self.total += value

    def interval(self) -> Interval | None:
        return wilson(self.total / self.n, n=self.n) if self.n else None


@dataclass
class Manner:
    """Three habits of a judge.

    Attributes:
        consistent: of the pairs seen in both orders, those where the orders agree.
        first_pick: share of looks that prefer the answer shown first; 0.5 is impartial. Counted by
            pairs, whose two looks depend on each other.
        longer_wins: of the decided pairs of unequal length, those that the longer answer won.
    """

    consistent: Share = field(default_factory=Share)
    first_pick: Share = field(default_factory=Share)
    longer_wins: Share = field(default_factory=Share)

    def add(self, comparison: Comparison, verdict: Verdict) -> None:
        if len(verdict.looks) == 2:
            self.consistent.add(float(verdict.consistent))
            self.first_pick.add(sum(map(preference, verdict.looks)) / 2)
        longer = len(comparison.first) - len(comparison.second)
        if verdict.p_first not in (None, 0.5) and longer:
            self.longer_wins.add(float((verdict.p_first > 0.5) == (longer > 0)))

    def metrics(self) -> dict[str, float]:
        """Flat, with the ends of 95% intervals; nothing for what was not seen."""
        found: dict[str, float] = {}
        for name in ("consistent", "first_pick", "longer_wins"):
            interval = getattr(self, name).interval()
            if interval is not None:
                found |= {
                    f"label/{name}": interval.mean,
                    f"label/{name}_low": interval.low,
                    f"label/{name}_high": interval.high,
                }
        return found

    def sentence(self) -> str:
        """In plain words; empty where nothing was seen."""
        told = {
            "consistent": "decided alike in both orders on {} of pairs",
            "first_pick": "preferred what was shown first in {} of its looks",
            "longer_wins": "preferred the longer answer in {} of decided pairs",
        }
        parts = [
            words.format(f"{interval.mean:.1%}")
            for name, words in told.items()
            if (interval := getattr(self, name).interval()) is not None
        ]
        return f"the judge {', '.join(parts)}" if parts else ""


def preference(look: float) -> float:
    """1 for the answer shown first, 0 for the other, 0.5 for neither."""
    return 0.5 + 0.5 * ((look > 0.5) - (look < 0.5))
