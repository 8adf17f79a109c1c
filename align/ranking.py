"""What the scores of pairs are worth: how many they rank right, how sure they may be, and what
length buys.

Pure functions: arrays in, named results out; the same seed gives the same interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from align.stats import Floats, Interval, wilson

MOST_BINS, LEAST_BINS = 10, 3
LEAST_PROMPTS = 10
PAIRS_A_BIN = 20  # on average; fewer, and a bin's share is mostly chance


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Pairs of like confidence.

    Attributes:
        predicted: mean probability that the model gives to the answer which it scores higher.
        judged: mean probability that the judge gives to the same answer.
        n: how many pairs.
    """

    predicted: float
    judged: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """`error`: by how much confidence and judgment differ, over all pairs (ECE)."""

    bins: Sequence[Bin]
    error: float


def clustered_mean(
    x: ArrayLike, groups: Sequence[str], *, seed: int, resamples: int = 2000
) -> Interval:
    """The mean of a rate over pairs with a percentile bootstrap over prompts, whose pairs belong
    together.

        rate = sum_g sum_i x_gi / sum_g n_g,    interval: its quantiles over resampled prompts g

    Source: Efron and Tibshirani 1993, ch. 8 (resample what is independent) and 13 (percentiles).

    Of fewer than ten prompts, or where all values are the same, Wilson's interval of that many.

    Args:
        x: [N], one number a pair, 0 to 1.
        groups: N names of prompts.

    Raises:
        ValueError: no values.
    """
    values = np.asarray(x, dtype=np.float64)
    if not values.size:
        raise ValueError("no pairs; it needs at least one")
    known = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    index = np.array([known[name] for name in groups])
    sums, counts = np.bincount(index, values), np.bincount(index).astype(np.float64)
    mean, n = float(values.mean()), len(known)
    # Too little to resample, and it would claim certainty.
    if n < LEAST_PROMPTS or values.min() == values.max():
        return wilson(mean, n=n)
    rng = np.random.default_rng(seed)
    drawn = np.empty(resamples)
    for i in range(resamples):  # one at a time: a million prompts would fill the memory
        chosen = rng.integers(n, size=n)
        drawn[i] = sums[chosen].sum() / counts[chosen].sum()
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(mean=mean, low=min(float(low), mean), high=max(float(high), mean), n=n)


def ranked_right(difference: ArrayLike) -> Floats:
    """[N], 1 where chosen stands above rejected, 0.5 where they stand alike."""
    d = np.asarray(difference, dtype=np.float64)
    return 0.5 + 0.5 * np.sign(d)


def calibration(difference: ArrayLike, p: ArrayLike) -> Calibration:
    """Whether a model that is sure at 80% is right in 80%.

        c = sigmoid(|d|),    j = p where d >= 0, else 1 - p
        ECE = sum over bins of c: n / N * |mean c - mean j|

    Source: Guo et al. 2017, arXiv:1706.04599, section 2, with the judge's probability in the place
    of right or wrong. Folded at one half: which answer is called chosen is the label itself, so
    bins of sigmoid(d) as it stands would tell nothing. Ten bins of one width, fewer where the pairs
    are few.

    Args:
        difference: [N], score of chosen minus score of rejected.
        p: [N], the judge's probability that chosen is better.
    """
    d, judged = np.asarray(difference, dtype=np.float64), np.asarray(p, dtype=np.float64)
    confidence = 1 / (1 + np.exp(-np.abs(d)))
    agreed = np.where(d >= 0, judged, 1 - judged)
    count = min(MOST_BINS, max(LEAST_BINS, len(d) // PAIRS_A_BIN))
    place = np.minimum(((confidence - 0.5) * 2 * count).astype(int), count - 1)
    bins = [
        Bin(
            predicted=float(confidence[place == i].mean()),
            judged=float(agreed[place == i].mean()),
            n=int((place == i).sum()),
        )
        for i in range(count)
        if (place == i).any()
    ]
    error = sum(found.n * abs(found.predicted - found.judged) for found in bins) / len(d)
    return Calibration(bins=bins, error=error)


def length_correlation(difference: ArrayLike, length_difference: ArrayLike) -> float:
    """Spearman's rank correlation of the difference in score and the difference in length between
    the two answers of a pair, so that prompts of long answers do not count; 0 where either never
    differs.

    Each pair is counted in both orders: it must not matter which answer is called chosen.

    Args:
        difference, length_difference: [N], of chosen minus rejected.
    """
    from scipy.stats import rankdata

    d = np.asarray(difference, dtype=np.float64)
    length = np.asarray(length_difference, dtype=np.float64)
    a, b = rankdata(np.concatenate([d, -d])), rankdata(np.concatenate([length, -length]))
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def longer_wins(p: ArrayLike, length_difference: ArrayLike) -> float | None:
    """How often the longer answer is preferred, over pairs of unequal length; None without any.

    Args:
        p: [N], that chosen is better.
        length_difference: [N], of chosen minus rejected.
    """
    values = np.asarray(p, dtype=np.float64)
    length = np.asarray(length_difference, dtype=np.float64)
    unequal = length != 0
    if not unequal.any():
        return None
    return float(np.where(length > 0, values, 1 - values)[unequal].mean())
