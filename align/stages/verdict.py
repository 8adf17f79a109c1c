"""What the measurements say in one honest sentence, and how numbers are written."""

from collections.abc import Mapping
from dataclasses import dataclass

from align.stats import Interval

BETTER, WORSE, UNCLEAR, UNJUDGED = "better", "worse", "unclear", "unjudged"
STARTED_FROM = "against the model it started from"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`kind` is better, worse, unclear or unjudged; `sentence` stands first wherever it is told."""

    kind: str
    sentence: str


def percent(rate: float, *, decimals: int = 1) -> str:
    return f"{100 * rate:.{decimals}f}%"


def bounds(interval: Interval) -> str:
    """The ends of an interval of rates: "79.9–87.0"."""
    return f"{100 * interval.low:.1f}–{100 * interval.high:.1f}"


def number(value: float) -> str:
    """Thousands grouped, and no more digits than one reads: 1,600, 33.4, 0.0123."""
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"


def measured(metrics: Mapping[str, float], key: str, *, n: float) -> Interval | None:
    """A rate over `n` prompts with the interval that the evaluation gave it, None where it gave
    none.
    """
    ends = [metrics.get(f"evaluate/{key}{end}") for end in ("", "_low", "_high")]
    rate, low, high = ends
    if rate is None or low is None or high is None:
        return None
    return Interval(mean=rate, low=low, high=high, n=int(n))


def overall(metrics: Mapping[str, float]) -> Interval | None:
    """The measured win rate, None where no verdict was usable or no judge was asked."""
    judged = metrics.get("evaluate/n_judged", metrics.get("evaluate/n", 0))
    return measured(metrics, "win_rate", n=judged)


def verdict(metrics: Mapping[str, float], *, judge: str | None) -> Verdict:
    """The sentence that the interval allows: a win or a loss only where it leaves 50% out.

    Args:
        metrics: flat, `evaluate/…`.
        judge: the evaluation's, None where there was none.
    """
    rate = overall(metrics)
    if rate is None:
        return Verdict(kind=UNJUDGED, sentence=_unjudged(metrics, judge=judge))
    told = f"{percent(rate.mean)} ({bounds(rate)}) of {rate.n:,} held-out prompts"
    if rate.low > 0.5:
        kind, sentence = BETTER, f"The tuned model wins {told} {STARTED_FROM}"
    elif rate.high < 0.5:
        kind, sentence = WORSE, f"The tuned model got worse: it wins only {told} {STARTED_FROM}"
    else:
        kind = UNCLEAR
        sentence = (
            f"No clear difference: the tuned model wins {told} {STARTED_FROM}, "
            "and that interval includes 50%"
        )
    return Verdict(kind=kind, sentence=sentence + _correct(metrics, kind=kind) + ".")


def _correct(metrics: Mapping[str, float], *, kind: str) -> str:
    """What became of the correct answers, with a "but" where it contradicts the win rate."""
    if not {"evaluate/correct_before", "evaluate/correct_after"} <= metrics.keys():
        return ""
    before, after = metrics["evaluate/correct_before"], metrics["evaluate/correct_after"]
    old, new = percent(before, decimals=0), percent(after, decimals=0)
    if old == new:
        return f"; correct answers stayed at {new}"
    against = (kind == BETTER and after < before) or (kind == WORSE and after > before)
    moved = "rose" if after > before else "fell"
    return f"; {'but ' if against else ''}correct answers {moved} from {old} to {new}"


def _unjudged(metrics: Mapping[str, float], *, judge: str | None) -> str:
    why = (
        "no judge compared the answers"
        if judge is None
        else f"the judge ({judge}) gave no usable verdict"
    )
    known = []
    if "evaluate/held_out_accuracy" in metrics:
        known.append(
            f"ranks {percent(metrics['evaluate/held_out_accuracy'])} of held-out preferences right"
        )
    if "evaluate/kl" in metrics:
        chance = " (an estimate, below 0 by chance)" if metrics["evaluate/kl"] < 0 else ""
        known.append(
            f"stands {number(metrics['evaluate/kl'])} nats an answer from the model it started "
            f"from{chance}"
        )
    also = f" The tuned model {' and '.join(known)}." if known else ""
    return f"There is no win rate: {why}, so whether the answers got better was not measured.{also}"
