"""How far two raters agree beyond chance, and what a judge leans to besides the answers' worth.

Pure functions: labels and verdicts in, named results out; the same seed gives the same interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from align.records import Verdict
from align.stats import LEVEL, Floats, Interval, mean_interval, wilson

Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What two raters of the same items have in common.

    Attributes:
        n: items that both labelled.
        classes: [K], what either could say.
        confusion: [K, K], items by the first rater's label (rows) and the second's (columns).
        agreement: share of the items with the same label.
        kappa: the same beyond chance, None where it is not defined; `undefined` then says why.
    """

    n: int
    classes: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...]
    agreement: Interval
    kappa: Interval | None
    undefined: str | None = None


@dataclass(frozen=True, kw_only=True)
class Position:
    """How a judge's verdicts depend on the place of an answer.

    Attributes:
        n: pairs that it saw in both orders.
        consistent: share of them decided alike in both.
        first_pick_rate: share of looks that preferred the answer shown first, a tie half; a judge
            that is consistent everywhere is at 0.5.
        always_first, always_second: pairs in which both looks preferred that *place*.
    """

    n: int
    consistent: Interval
    first_pick_rate: Interval
    always_first: int
    always_second: int


def agreement(
    a: Sequence[str],
    b: Sequence[str],
    *,
    classes: Sequence[str],
    seed: int,
    resamples: int = 2000,
) -> Agreement:
    """Share of equal labels and Cohen's kappa (unweighted), with percentile bootstraps over items.

        observed = 1/N * sum_k n_kk,    expected = 1/N^2 * sum_k n_k. * n_.k
        kappa = (observed - expected) / (1 - expected)

    Source: Cohen 1960, A Coefficient of Agreement for Nominal Scales, equation 1. Drawing items
    again is drawing the K x K table from a multinomial, so no item is touched twice.
    Deviations: where all items agree, or none, resampling has too little to vary and would claim
    certainty after a single item. Both intervals then come from Wilson's for the agreement, kappa
    at the chance agreement that was observed. Resamples in which kappa is not defined are left out.

    Args:
        a, b: [N], labels of the first and of the second rater.
        classes: [K], all labels that either may have.
        seed, resamples: of the bootstrap.

    Returns:
        The result; `kappa` is None where both raters gave one and the same label to every item,
        because 1 - expected is then 0.

    Raises:
        ValueError: no items, not one label each, or a label that is no class.
    """
    table = confusion(a, b, classes=classes)
    n = len(a)
    share = int(np.trace(table)) / n
    drawn = np.random.default_rng(seed).multinomial(n, table.ravel() / n, size=resamples)
    tables = drawn.reshape(resamples, *table.shape)
    alike = share in (0, 1)
    equal = wilson(share, n=n) if alike else _around(share, _observed(tables), n=n)
    found: dict[str, Any] = {
        "n": n,
        "classes": tuple(classes),
        "confusion": tuple(tuple(int(count) for count in row) for row in table),
        "agreement": equal,
    }
    if np.isnan(_kappas(table[None])[0]):
        why = f"both said {a[0]!r} of every item, so chance alone explains the agreement"
        return Agreement(**found, kappa=None, undefined=why)
    # scikit-learn takes a second to import; the settings and the planner never need it.
    from sklearn.metrics import cohen_kappa_score

    kappa = float(cohen_kappa_score(a, b, labels=list(classes)))
    if alike:
        expected = _expected(table)
        low, high = ((end - expected) / (1 - expected) for end in (equal.low, equal.high))
        interval = Interval(mean=kappa, low=min(low, kappa), high=max(high, kappa), n=n)
    else:
        interval = _around(kappa, _kappas(tables), n=n)
    return Agreement(**found, kappa=interval)


def confusion(a: Sequence[str], b: Sequence[str], *, classes: Sequence[str]) -> Counts:
    """[K, K], how many items the first rater put into class i and the second into class j.

    Raises:
        ValueError: no items, not one label each, or a label that is no class.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} labels and {len(b)}; it needs one of each an item, and an item")
    place = {name: i for i, name in enumerate(classes)}
    if unknown := ({*a, *b} - place.keys()):
        raise ValueError(f"labels {sorted(map(str, unknown))} are none of {list(classes)}")
    table = np.zeros((len(place), len(place)), dtype=np.int64)
    np.add.at(table, ([place[label] for label in a], [place[label] for label in b]), 1)
    return table


def position(verdicts: Sequence[Verdict], *, seed: int, resamples: int = 2000) -> Position:
    """Whether the place of an answer decides, over the verdicts that rest on two looks.

        consistent = 1/N * sum_i [both orders of pair i end alike]
        first_pick_rate = 1/2N * sum_i sum_look [first preferred] + 1/2 [neither preferred]

    Source: Zheng et al. 2023, Judging LLM-as-a-Judge, section 3.3 and table 2 (position bias).
    Deviation: they count a pair as biased where it is inconsistent; the rate also shows to which
    side, and takes judges that give probabilities.

    Args:
        verdicts: [N] and any without two looks, which are left out.
        seed, resamples: of the bootstrap, over pairs.

    Raises:
        ValueError: no verdict has two looks.
    """
    seen = [verdict for verdict in verdicts if len(verdict.looks) == 2]
    if not seen:
        raise ValueError("no verdict has two looks, so nothing tells what another order changes")
    looks = np.array([verdict.looks for verdict in seen], dtype=np.float64)  # [N, 2]
    picks = np.where(looks == 0.5, 0.5, looks > 0.5)
    return Position(
        n=len(seen),
        consistent=mean_interval(
            [float(verdict.consistent) for verdict in seen], seed=seed, resamples=resamples
        ),
        first_pick_rate=mean_interval(picks.mean(axis=1), seed=seed, resamples=resamples),
        always_first=int((picks == 1).all(axis=1).sum()),
        always_second=int((picks == 0).all(axis=1).sum()),
    )


def longer_wins(
    p_first: ArrayLike,
    len_first: ArrayLike,
    len_second: ArrayLike,
    *,
    seed: int,
    resamples: int = 2000,
) -> Interval:
    """How often the longer answer won, over decided pairs of unequal length.

        rate = 1/N * sum_i [p_i > 1/2] = [len_first_i > len_second_i]

    Source: Saito et al. 2023, Verbosity Bias in Preference Labeling by Large Language Models.
    The rate alone is no bias, since longer answers may be the better ones; compare it with that of
    people on the same pairs.

    Args:
        p_first: [N], probability that the first answer is better; 0.5 is a tie and left out.
        len_first, len_second: [N], of the two answers, in any one unit.
        seed, resamples: of the bootstrap, over pairs.

    Raises:
        ValueError: arrays of different lengths, or no decided pair of unequal length.
    """
    p, first, second = (np.asarray(x, dtype=np.float64) for x in (p_first, len_first, len_second))
    if not p.shape == first.shape == second.shape:
        raise ValueError(
            f"{p.size} probabilities, {first.size} and {second.size} lengths; "
            "it needs one of each a pair"
        )
    counts = (p != 0.5) & (first != second)
    if not counts.any():
        raise ValueError("no decided pair of unequal length, so length had nothing to win")
    won = (p > 0.5) == (first > second)
    return mean_interval(won[counts].astype(np.float64), seed=seed, resamples=resamples)


def _around(value: float, drawn: Floats, *, n: int) -> Interval:
    """The percentile interval of what was drawn, widened to hold the value itself."""
    low, high = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean=value, low=min(float(low), value), high=max(float(high), value), n=n)


def _observed(tables: Counts) -> Floats:
    """[R] shares of equal labels, from [R, K, K] counts."""
    shares: Floats = np.trace(tables, axis1=1, axis2=2) / tables.sum(axis=(1, 2))
    return shares


def _expected(table: Counts) -> float:
    return float((table.sum(axis=0) * table.sum(axis=1)).sum()) / float(table.sum()) ** 2


def _kappas(tables: Counts) -> Floats:
    """[R] from [R, K, K] counts, in whole numbers up to the division; NaN where not defined."""
    n = tables.sum(axis=(1, 2))
    by_chance = (tables.sum(axis=1) * tables.sum(axis=2)).sum(axis=1)
    above = n * np.trace(tables, axis1=1, axis2=2) - by_chance
    room = n * n - by_chance
    kappas: Floats = np.divide(above, room, out=np.full(n.shape, np.nan), where=room != 0)
    return kappas
