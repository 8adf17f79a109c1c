"""Rates and intervals: hand-worked numbers and properties."""

import numpy as np
import pytest

from align.stats import (
    Interval,
    length_controlled,
    mean_interval,
    wilson,
    win_rate,
)


def test_rate_of_wins_losses_and_ties_worked_by_hand() -> None:
    interval = win_rate([1, 1, 0.5, 0], seed=0)
    assert interval.mean == 0.625 and interval.n == 4
    assert 0 <= interval.low < 0.625 < interval.high <= 1


def test_same_seed_same_interval_and_another_seed_another_one() -> None:
    p = np.random.default_rng(1).random(50)
    assert win_rate(p, seed=3) == win_rate(p, seed=3)
    assert win_rate(p, seed=3) != win_rate(p, seed=4)


def test_swapping_the_policies_mirrors_the_interval() -> None:
    p = np.random.default_rng(2).choice([0, 0.5, 1], size=80)
    ours, theirs = win_rate(p, seed=5), win_rate(1 - p, seed=5)
    mirrored = [1 - theirs.mean, 1 - theirs.high, 1 - theirs.low]
    assert [ours.mean, ours.low, ours.high] == pytest.approx(mirrored)


def test_bootstrap_interval_of_many_prompts_is_the_normal_one() -> None:
    # 300 wins, 100 losses: standard error sqrt(0.75 * 0.25 / 400) = 0.02165, so 0.75 +- 0.0424
    interval = win_rate([1] * 300 + [0] * 100, seed=0, resamples=5000)
    assert interval.low == pytest.approx(0.7076, abs=0.004)
    assert interval.high == pytest.approx(0.7924, abs=0.004)


def test_the_interval_covers_the_truth_in_about_95_of_100_experiments() -> None:
    rng = np.random.default_rng(7)
    covered = 0
    for experiment in range(400):
        p = rng.choice([0, 0.5, 1], size=200, p=[0.3, 0.1, 0.6])  # true rate 0.65
        interval = win_rate(p, seed=experiment, resamples=500)
        covered += interval.low <= 0.65 <= interval.high
    assert 0.92 <= covered / 400 <= 0.975


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_values_without_variation_claim_no_certainty(value: float) -> None:
    few, many = win_rate([value] * 5, seed=0), win_rate([value] * 500, seed=0)
    for interval in (few, many):
        assert interval.mean == value and 0 <= interval.low <= value <= interval.high <= 1
    assert few.high - few.low > 10 * (many.high - many.low) * 0.5 > 0


def test_one_prompt_is_enough_for_an_interval_but_not_for_a_claim() -> None:
    interval = win_rate([1.0], seed=0)
    assert interval.low < 0.5 < interval.high == 1


@pytest.mark.parametrize("bad", [[], [float("nan")], [1.2], [-0.1, 0.5], [[0.5]]])
def test_no_prompts_and_no_probabilities_are_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError):
        win_rate(bad, seed=0)


def test_mean_interval_takes_numbers_beyond_rates() -> None:
    assert mean_interval([7, 7, 7], seed=0) == Interval(mean=7, low=7, high=7, n=3)
    lengths = mean_interval([10, 20, 30, 40], seed=0)
    assert lengths.mean == 25 and 10 <= lengths.low < 25 < lengths.high <= 40


def test_many_prompts_do_not_need_much_memory() -> None:
    interval = mean_interval(np.arange(200_000) % 2, seed=0, resamples=100)
    assert interval.mean == 0.5 and interval.high - interval.low < 0.01


def test_wilson_interval_worked_by_hand() -> None:
    # 8 of 10, z^2 = 3.8415: (0.8 + 0.19207 +- 1.96 * sqrt(0.016 + 0.0096036)) / 1.38415
    interval = wilson(0.8, n=10)
    assert interval.low == pytest.approx(0.4902, abs=1e-4)
    assert interval.high == pytest.approx(0.9433, abs=1e-4)


def test_a_pure_effect_of_length_is_removed() -> None:
    rng = np.random.default_rng(3)
    before = rng.integers(20, 60, size=3000)
    after = before + rng.normal(15, 20, size=3000)
    x = np.tanh((after - before) / (after - before).std())
    p = rng.random(3000) < 1 / (1 + np.exp(-2.5 * x))  # at equal length the two would be even
    lengths = {"length_after": after, "length_before": before}
    assert np.mean(p) > 0.65
    assert length_controlled(p, **lengths).mean == pytest.approx(0.5, abs=0.03)


def test_an_advantage_at_equal_length_is_found_under_a_length_effect() -> None:
    rng = np.random.default_rng(4)
    difference = rng.normal(10, 20, size=4000)
    x = np.tanh(difference / difference.std())
    p = 1 / (1 + np.exp(-(0.8473 + 2 * x)))  # sigmoid(0.8473) = 0.7
    rate = length_controlled(p, length_after=difference, length_before=np.zeros(4000)).mean
    assert rate == pytest.approx(0.7, abs=0.005)


def test_without_an_effect_of_length_the_plain_rate_remains() -> None:
    # each length difference comes with the same two wins and one loss
    difference = np.repeat([-30.0, -5.0, 0.0, 5.0, 30.0], 3)
    p = np.tile([1.0, 1.0, 0.0], 5)
    rate = length_controlled(p, length_after=difference, length_before=np.zeros(15)).mean
    assert rate == pytest.approx(2 / 3, abs=1e-4)


def test_swapping_the_policies_mirrors_the_length_controlled_rate() -> None:
    rng = np.random.default_rng(5)
    p, after, before = rng.random(200), rng.integers(5, 90, 200), rng.integers(5, 60, 200)
    ours = length_controlled(p, length_after=after, length_before=before)
    theirs = length_controlled(1 - p, length_after=before, length_before=after)
    assert ours.mean == pytest.approx(1 - theirs.mean, abs=1e-5)
    assert ours.low == pytest.approx(1 - theirs.high, abs=1e-5)


def test_the_length_controlled_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(6)
    covered = 0
    for _ in range(150):
        difference = rng.normal(10, 20, size=300)
        chance = 1 / (1 + np.exp(-(0.4055 + np.tanh(difference / 20))))  # sigmoid(0.4055) = 0.6
        p = rng.random(300) < chance
        interval = length_controlled(p, length_after=difference, length_before=np.zeros(300))
        covered += interval.low <= 0.6 <= interval.high
    assert 0.88 <= covered / 150 <= 1


@pytest.mark.parametrize(
    ("p", "after", "expected"),
    [
        ([1, 1, 1], [9, 5, 7], 1.0),
        ([0, 0, 0], [9, 5, 7], 0.0),
        ([1, 0, 0.5], [4, 4, 4], 0.5),
        ([0.5, 0.5, 0.5], [9, 5, 7], 0.5),
        ([0.25], [9], 0.25),
    ],
)
def test_nothing_to_control_for_leaves_the_plain_rate(
    p: list[float], after: list[int], expected: float
) -> None:
    assert length_controlled(p, length_after=after, length_before=[4] * len(p)).mean == expected


def test_longer_always_wins_stays_finite() -> None:
    difference = np.array([-8.0, -4.0, -2.0, 2.0, 4.0, 8.0])
    rate = length_controlled(
        difference > 0, length_after=difference, length_before=np.zeros(6)
    ).mean
    assert rate == pytest.approx(0.5, abs=0.01)


def test_lengths_of_other_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match="3 probabilities, 2 and 3 lengths"):
        length_controlled([1, 0, 1], length_after=[1, 2], length_before=[1, 2, 3])
