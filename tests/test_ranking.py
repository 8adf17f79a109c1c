"""What scores of pairs are worth: hand-worked numbers."""

import numpy
import pytest

from align.ranking import (
    calibration,
    clustered_mean,
    length_correlation,
    longer_wins,
    ranked_right,
)


def test_a_tie_of_scores_is_half_right() -> None:
    assert ranked_right([2.0, 0.0, -1.0]).tolist() == [1.0, 0.5, 0.0]


def test_pairs_of_one_prompt_are_resampled_together() -> None:
    """100 copies of 10 prompts know no more than the 10 prompts."""
    draw = numpy.random.default_rng(0)
    right = draw.integers(0, 2, 10).astype(float)
    groups = [f"p{i}" for i in range(10)]
    few = clustered_mean(right, groups, seed=0)
    many = clustered_mean(numpy.repeat(right, 100), [g for g in groups for _ in range(100)], seed=0)
    assert (few.mean, few.low, few.high, few.n) == (many.mean, many.low, many.high, many.n)
    alone = clustered_mean(numpy.repeat(right, 100), [str(i) for i in range(1000)], seed=0)
    assert alone.high - alone.low < (many.high - many.low) / 5


def test_the_mean_is_over_pairs_not_over_prompts() -> None:
    found = clustered_mean([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"], seed=0)
    assert found.mean == 0.75 and found.n == 2


def test_many_pairs_of_one_prompt_are_no_certainty() -> None:
    found = clustered_mean([1.0] * 5 + [0.0], ["a"] * 6, seed=0)
    assert found.n == 1 and found.low < 0.2 and found.high > 0.95


def test_all_right_is_not_certain() -> None:
    found = clustered_mean([1.0] * 6, list("aabbcc"), seed=0)
    assert found.mean == found.high == 1.0 and 0.4 < found.low < 0.5, "Wilson's of 3"


def test_calibration_by_hand() -> None:
    """sigmoid(ln 4) = 0.8; two such pairs of which one is right are off by 0.3, a pair of equal
    scores that is a tie by nothing.
    """
    four = numpy.log(4)
    found = calibration([four, -four, 0.0], [1.0, 1.0, 0.5])
    assert [(b.n, round(b.predicted, 6), b.judged) for b in found.bins] == [
        (1, 0.5, 0.5),
        (2, 0.8, 0.5),
    ]
    assert found.error == pytest.approx(2 / 3 * 0.3)


def test_which_answer_is_called_chosen_does_not_matter_to_calibration() -> None:
    draw = numpy.random.default_rng(1)
    d, p = draw.normal(size=50), draw.uniform(size=50)
    assert calibration(d, p).error == pytest.approx(calibration(-d, 1 - p).error)


def test_length_correlation_is_of_differences_in_either_order() -> None:
    longer = numpy.array([1.0, 5.0, -3.0, 2.0])
    assert length_correlation(longer * 2, longer) == pytest.approx(1)
    assert length_correlation(-longer, longer) == pytest.approx(-1)
    draw = numpy.random.default_rng(2)
    d, turned = draw.normal(size=4), numpy.array([1, -1, -1, 1])
    found = length_correlation(d, longer)
    assert found == pytest.approx(length_correlation(d * turned, longer * turned))
    assert length_correlation(d, longer * 0) == 0.0


def test_longer_wins_counts_pairs_of_unequal_length() -> None:
    assert longer_wins([1.0, 1.0, 0.0, 1.0], [3, -3, -1, 0]) == pytest.approx(2 / 3)
    assert longer_wins([1.0], [0]) is None
