"""What measurements are worth: rates with intervals, and a win rate that length cannot buy.

Pure functions: arrays in, named results out; the same seed gives the same interval.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
Z = 1.959963984540054  # the normal quantile that leaves 2.5% on each side
RESAMPLED_AT_ONCE = 4_000_000  # numbers held while resampling: 32 MB
RIDGE = 0.01  # weight of the squared length coefficient against the summed log-loss


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95% interval. Example: `Interval(mean=0.835, low=0.799, high=0.870, n=400)`.

    Attributes:
        mean: of the n values.
        low, high: the ends of the interval; low <= mean <= high.
        n: how many values (prompts) it rests on.
    """

    mean: float
    low: float
    high: float
    n: int


def win_rate(p: ArrayLike, *, seed: int, resamples: int = 2000) -> Interval:
    """How often the new policy's answer is better, with a percentile bootstrap over prompts.

        rate = 1/N * sum_i p_i
        interval = 2.5% and 97.5% quantile of the rate over resampled prompts

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, ch. 13 (percentiles).

    Args:
        p: [N], probability that the new answer is the better one, 0 to 1; a tie is 0.5.
        seed: of the resampling.
        resamples: how many times the prompts are drawn again.

    Raises:
        ValueError: no values, or values outside of 0 to 1.
    """
    values = _finite(p, name="p")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(
            f"p reaches from {values.min():g} to {values.max():g}; probabilities lie in 0 to 1"
        )
    return mean_interval(values, seed=seed, resamples=resamples)


def mean_interval(x: ArrayLike, *, seed: int, resamples: int = 2000) -> Interval:
    """The mean of any number per prompt (right or wrong, a length) with a percentile bootstrap.

    Values that are all the same leave the bootstrap nothing to vary, and it would claim certainty
    after a single prompt. Rates then get the Wilson interval; numbers outside of 0 to 1 no width.

    Args:
        x: [N], one number a prompt.
        seed, resamples: as in `win_rate`.

    Raises:
        ValueError: no values, or one that is not finite.
    """
    values = _finite(x, name="x")
    mean, n = float(values.mean()), values.size
    if values.min() == values.max():
        mean = float(values[0])
        return (
            wilson(mean, n=n) if 0 <= mean <= 1 else Interval(mean=mean, low=mean, high=mean, n=n)
        )
    # scipy.stats takes a second to import; the settings and the planner never need it.
    from scipy.stats import bootstrap

    drawn = bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, RESAMPLED_AT_ONCE // n),
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = drawn.confidence_interval
    return Interval(mean=mean, low=min(float(low), mean), high=max(float(high), mean), n=n)


def wilson(rate: float, *, n: int) -> Interval:
    """The score interval of a rate of which only the mean and the count are known.

        (rate + z^2/2n +- z * sqrt(rate * (1 - rate) / n + z^2/4n^2)) / (1 + z^2/n),    z = 1.96

    Source: Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference.
    It is meant for yes and no; values in between, ties for instance, vary less, so for them it is
    too wide rather than too narrow.

    Args:
        rate: 0 to 1.
        n: how many trials it is the mean of.

    Raises:
        ValueError: no trials, or a rate outside of 0 to 1.
    """
    if n < 1 or not 0 <= rate <= 1:
        raise ValueError(
            f"rate={rate}, n={n}: the rate must lie in 0 to 1 and rest on at least one trial"
        )
    centre = rate + Z**2 / (2 * n)
    spread = Z * float(np.sqrt(rate * (1 - rate) / n + Z**2 / (4 * n**2)))
    scale = 1 + Z**2 / n
    low, high = (centre - spread) / scale, (centre + spread) / scale
    return Interval(mean=rate, low=max(0.0, min(low, rate)), high=min(1.0, max(high, rate)), n=n)


def length_controlled(
    p: ArrayLike, *, length_after: ArrayLike, length_before: ArrayLike
) -> Interval:
    """The win rate at equal length, after length-controlled AlpacaEval, with an interval.

        d_i = length_after_i - length_before_i,    x_i = tanh(d_i / std(d))
        P(new answer wins) = sigmoid(a + b * x_i),    result = sigmoid(a), the prediction at d = 0

    Source: Dubois et al. 2024, Length-Controlled AlpacaEval, section 3.
    Deviations: the paper also fits how hard each instruction is, which takes many models on the
    same instructions; with two models there is no such term. The interval is ours, from the fit
    (the sandwich estimate of the variance of a).

    Args:
        p: [N], as in `win_rate`.
        length_after, length_before: [N], of the two answers, both in tokens or in another unit.

    Raises:
        ValueError: no values, or arrays of different lengths.
    """
    values = _finite(p, name="p")
    after, before = (
        _finite(length_after, name="length_after"),
        _finite(length_before, name="length_before"),
    )
    if not values.shape == after.shape == before.shape:
        raise ValueError(
            f"{values.size} probabilities, {after.size} and {before.size} lengths; "
            "it needs one of each a prompt"
        )
    difference = after - before
    spread = float(difference.std())
    rate = float(values.mean())
    # Nothing to control for, or nothing to fit: the plain rate, as exact as it can be.
    if spread == 0 or values.min() == values.max():
        return wilson(rate, n=values.size)
    x = np.tanh(difference / spread)
    intercept, slope = _logistic(x, values)
    error = _intercept_error(x, values, intercept=intercept, slope=slope)
    low, mean, high = _sigmoid(np.array([intercept - Z * error, intercept, intercept + Z * error]))
    return Interval(mean=float(mean), low=float(low), high=float(high), n=values.size)


def _logistic(x: Floats, p: Floats) -> tuple[float, float]:
    """Intercept and slope for soft labels: each row once as a win, weight p, once as a loss."""
    from sklearn.linear_model import LogisticRegression

    fit = LogisticRegression(C=1 / RIDGE, tol=1e-8, max_iter=1000)
    fit.fit(
        np.concatenate([x, x])[:, None],
        np.repeat([1, 0], x.size),
        sample_weight=np.concatenate([p, 1 - p]),
    )
    return float(fit.intercept_[0]), float(fit.coef_[0, 0])


def _intercept_error(x: Floats, p: Floats, *, intercept: float, slope: float) -> float:
    """Standard error of the intercept: H^-1 (sum of squared scores) H^-1, fit for soft labels."""
    design = np.stack([np.ones_like(x), x], axis=1)
    fitted = _sigmoid(intercept + slope * x)
    hessian = design.T @ (design * (fitted * (1 - fitted))[:, None]) + np.diag([0.0, RIDGE])
    scores = design * (p - fitted)[:, None]
    inverse = np.linalg.pinv(hessian)
    return float(np.sqrt((inverse @ (scores.T @ scores) @ inverse)[0, 0]))


def _sigmoid(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(x / 2))


def _finite(x: ArrayLike, *, name: str) -> Floats:
    values = np.asarray(x, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(
            f"{name} has shape {values.shape}; it needs one number a prompt, "
            "and at least one prompt"
        )
    if not np.isfinite(values).all():
        raise ValueError(
            f"{name} holds {int((~np.isfinite(values)).sum())} values that are no finite numbers"
        )
    return values
