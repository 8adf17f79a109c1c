"""Losses on pairs, against numbers worked by hand."""

import math

import pytest
import torch

from align.algorithms.dpo_loss import (
    LOSSES,
    PairLogprobs,
    hard_labels,
    hinge_loss,
    ipo_loss,
    sigmoid_loss,
    soft_label,
)


def pair(
    chosen_ratio: float,
    rejected_ratio: float,
    *,
    lengths: tuple[int, int] = (1, 1),
    margin: float = 0.0,
) -> PairLogprobs:
    """One pair whose log-ratios are as given; the reference's own log-probabilities are -7 and
    -5.
    """
    return PairLogprobs(
        policy_chosen=torch.tensor([chosen_ratio - 7.0], dtype=torch.float64, requires_grad=True),
        policy_rejected=torch.tensor(
            [rejected_ratio - 5.0], dtype=torch.float64, requires_grad=True
        ),
        reference_chosen=torch.tensor([-7.0], dtype=torch.float64),
        reference_rejected=torch.tensor([-5.0], dtype=torch.float64),
        chosen_length=torch.tensor([float(lengths[0])]),
        rejected_length=torch.tensor([float(lengths[1])]),
        margin=torch.tensor([margin], dtype=torch.float64),
    )


SURE = torch.tensor([1.0], dtype=torch.float64)


def test_sigmoid_at_a_margin_of_log_3_is_log_of_4_thirds() -> None:
    """beta 0.5 and log-ratios log 3 and -log 3: the policy thinks 3 to 1, sigmoid(log 3) = 3/4."""
    loss = sigmoid_loss(pair(math.log(3), -math.log(3)), beta=0.5, q=SURE)
    assert loss.item() == pytest.approx(math.log(4 / 3), abs=1e-12)


def test_sigmoid_with_smoothing_of_a_quarter() -> None:
    """q = 3/4 at sigmoid(m) = 3/4: the entropy of (3/4, 1/4), 2 log 2 - 3/4 log 3, the least there
    is.
    """
    q = soft_label(SURE, label_smoothing=0.25)
    pairs = pair(math.log(3), -math.log(3))
    loss = sigmoid_loss(pairs, beta=0.5, q=q)
    assert loss.item() == pytest.approx(2 * math.log(2) - 0.75 * math.log(3), abs=1e-12)
    loss.backward()
    assert pairs.policy_chosen.grad is not None
    assert pairs.policy_chosen.grad.item() == pytest.approx(0, abs=1e-12)


def test_a_lead_as_large_as_offset_times_margin_is_only_even() -> None:
    """beta 0.5, log-ratios 2 and -2, so m = 2; a margin of 4 at offset 0.5 asks for just that."""
    loss = sigmoid_loss(pair(2, -2, margin=4.0), beta=0.5, q=SURE, offset=0.5)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-12)


def test_an_offset_asks_nothing_where_the_judge_gave_no_margin() -> None:
    plain = sigmoid_loss(pair(2, -2), beta=0.5, q=SURE)
    assert sigmoid_loss(pair(2, -2), beta=0.5, q=SURE, offset=0.5).item() == plain.item()


def test_soft_labels_are_smoothed() -> None:
    """A judge sure to 0.9 whose labels flip one time in five: 0.9 x 0.8 + 0.1 x 0.2 = 0.74."""
    assert soft_label(torch.tensor([0.9]), label_smoothing=0.2).item() == pytest.approx(0.74)


def test_ipo_is_squared_distance_of_mean_ratios_to_its_target() -> None:
    """Ratios 6 over 3 tokens and -2 over 2: h = 2 + 1 = 3; beta 0.25 wants 2: (3 - 2)^2 = 1."""
    assert ipo_loss(pair(6, -2, lengths=(3, 2)), beta=0.25, q=SURE).item() == pytest.approx(1)


def test_a_tie_is_no_preference_with_hard_labels_either() -> None:
    assert hard_labels(torch.tensor([0.5, 0.51, 1.0])).tolist() == [0.5, 1.0, 1.0]


def test_ipo_with_a_soft_label_wants_a_smaller_gap() -> None:
    """q = 3/4: 3/4 (h - 2)^2 + 1/4 (h + 2)^2 = h^2 - 2 h + 4, least at h = 1, where it is 3."""
    q = torch.tensor([0.75], dtype=torch.float64)
    pairs = pair(1, 0)
    loss = ipo_loss(pairs, beta=0.25, q=q)
    loss.backward()
    assert loss.item() == pytest.approx(3)
    assert pairs.policy_chosen.grad is not None
    assert pairs.policy_chosen.grad.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.0, 1.0), (1.0, 0.5), (2.0, 0.0), (5.0, 0.0), (-2.0, 2.0)]
)
def test_hinge_is_idle_beyond_a_margin_of_one(ratio: float, expected: float) -> None:
    assert hinge_loss(pair(ratio, 0), beta=0.5, q=SURE).item() == pytest.approx(expected)


@pytest.mark.parametrize("name", LOSSES)
def test_a_tie_pulls_nowhere_at_no_margin(name: str) -> None:
    pairs = pair(0, 0)
    LOSSES[name](pairs, beta=0.3, q=torch.tensor([0.5], dtype=torch.float64)).sum().backward()
    for side in (pairs.policy_chosen, pairs.policy_rejected):
        assert side.grad is not None
        assert side.grad.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_swapping_the_answers_and_the_label_changes_nothing(name: str) -> None:
    there = LOSSES[name](pair(1.5, -0.5, lengths=(3, 2)), beta=0.4, q=0.8 * SURE)
    swapped = PairLogprobs(
        policy_chosen=torch.tensor([-5.5]),
        policy_rejected=torch.tensor([-5.5]),
        reference_chosen=torch.tensor([-5.0]),
        reference_rejected=torch.tensor([-7.0]),
        chosen_length=torch.tensor([2.0]),
        rejected_length=torch.tensor([3.0]),
        margin=torch.tensor([0.0]),
    )
    back = LOSSES[name](swapped, beta=0.4, q=0.2 * SURE)
    assert there.item() == pytest.approx(back.item(), abs=1e-6)


def test_a_margin_of_ten_thousand_is_still_finite() -> None:
    assert sigmoid_loss(pair(-1e4, 1e4), beta=1.0, q=SURE).item() == pytest.approx(2e4)
