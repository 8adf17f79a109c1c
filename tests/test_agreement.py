"""Agreement beyond chance and bias: hand-worked numbers and properties."""

import random
import warnings

import numpy as np
import pytest

from align.agreement import agreement, longer_wins, position
from align.records import Verdict

TWO, THREE = ("first", "second"), ("first", "second", "tie")


def spread(counts: list[list[int]], classes: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Two raters' labels that give this table."""
    pairs = [
        (classes[i], classes[j])
        for i, row in enumerate(counts)
        for j, count in enumerate(row)
        for _ in range(count)
    ]
    return [a for a, _ in pairs], [b for _, b in pairs]


def looked(first: float, swapped: float) -> Verdict:
    p = (first + 1 - swapped) / 2
    return Verdict(
        id="0", first=0, second=1, status="tie" if p == 0.5 else "ok", p_first=p,
        consistent=(first > 0.5) == (swapped < 0.5), judge="fake", looks=(first, swapped),
    )  # fmt: skip


def test_kappa_of_the_textbook_table() -> None:
    # 20 + 15 of 50 agree: 0.7. By chance 25/50 * 30/50 + 25/50 * 20/50 = 0.5. So 0.2 / 0.5.
    a, b = spread([[20, 5], [10, 15]], TWO)
    found = agreement(a, b, classes=TWO, seed=0)
    assert found.agreement.mean == 0.7 and found.n == 50
    assert found.confusion == ((20, 5), (10, 15)) and found.classes == TWO
    assert found.kappa is not None and found.kappa.mean == pytest.approx(0.4)


def test_kappa_of_three_classes_worked_by_hand() -> None:
    # 7 of 10 agree. Rows 4, 3, 3; columns 4, 4, 2: by chance (16 + 12 + 6) / 100. So 0.36 / 0.66.
    a, b = spread([[3, 1, 0], [1, 2, 0], [0, 1, 2]], THREE)
    found = agreement(a, b, classes=THREE, seed=0)
    assert found.kappa is not None and found.kappa.mean == pytest.approx(6 / 11)


def test_the_interval_of_kappa_is_the_textbook_one_for_many_items() -> None:
    # Fleiss, Cohen and Everitt 1969 at p_o = 0.7, p_e = 0.5 with even margins:
    # the standard error of kappa is 2 * sqrt(0.7 * 0.3 / n) = 0.0458 at n = 400.
    a, b = spread([[140, 60], [60, 140]], TWO)
    found = agreement(a, b, classes=TWO, seed=1, resamples=5000)
    assert found.kappa is not None and found.kappa.mean == pytest.approx(0.4)
    assert found.kappa.low == pytest.approx(0.4 - 1.96 * 0.0458, abs=0.01)
    assert found.kappa.high == pytest.approx(0.4 + 1.96 * 0.0458, abs=0.01)
    assert found.agreement.low == pytest.approx(0.7 - 1.96 * 0.0229, abs=0.006)


def test_drawing_the_table_again_equals_drawing_the_items_again() -> None:
    draw = random.Random(3)
    a = [draw.choice(THREE) for _ in range(60)]
    b = [x if draw.random() < 0.5 else draw.choice(THREE) for x in a]
    found = agreement(a, b, classes=THREE, seed=0, resamples=4000)
    kappas = []
    for _ in range(4000):
        rows = [draw.randrange(60) for _ in range(60)]
        same = sum(a[i] == b[i] for i in rows) / 60
        chance = sum(
            sum(a[i] == c for i in rows) * sum(b[i] == c for i in rows) for c in THREE
        ) / 3600  # fmt: skip
        kappas.append((same - chance) / (1 - chance))
    assert found.kappa is not None
    ends = [found.kappa.low, found.kappa.high]
    assert ends == pytest.approx(np.quantile(kappas, [0.025, 0.975]), abs=0.02)


def test_raters_may_change_places_and_items_their_order() -> None:
    a, b = spread([[9, 2, 1], [3, 8, 1], [0, 2, 4]], THREE)
    one, other = agreement(a, b, classes=THREE, seed=0), agreement(b, a, classes=THREE, seed=0)
    assert one.kappa and other.kappa and one.kappa.mean == pytest.approx(other.kappa.mean)
    order = list(range(len(a)))
    random.Random(0).shuffle(order)
    mixed = agreement([a[i] for i in order], [b[i] for i in order], classes=THREE, seed=0)
    assert mixed == one


def test_a_class_that_nobody_uses_changes_no_kappa() -> None:
    a, b = spread([[20, 5], [10, 15]], TWO)
    two, three = (agreement(a, b, classes=classes, seed=0) for classes in (TWO, THREE))
    assert two.kappa and three.kappa and two.kappa.mean == pytest.approx(three.kappa.mean)


def test_one_label_everywhere_leaves_kappa_undefined_with_a_reason_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = agreement(["first"] * 5, ["first"] * 5, classes=TWO, seed=0)
    assert found.kappa is None and found.undefined is not None and "'first'" in found.undefined
    assert found.agreement.mean == 1 and found.agreement.low < 0.7


def test_one_rater_without_variation_is_worth_chance() -> None:
    found = agreement(["first"] * 6, ["first", "second"] * 3, classes=TWO, seed=0)
    assert found.kappa is not None and found.kappa.mean == 0


@pytest.mark.parametrize("table", [[[2, 0], [0, 2]], [[0, 2], [2, 0]], [[0, 1], [0, 0]]])
def test_a_few_items_that_all_agree_or_all_differ_claim_no_certainty(table) -> None:
    a, b = spread(table, TWO)
    found = agreement(a, b, classes=TWO, seed=0)
    assert found.kappa is not None
    assert found.kappa.low <= found.kappa.mean <= found.kappa.high
    assert found.kappa.high - found.kappa.low > 0.4
    assert found.agreement.high - found.agreement.low > 0.4


def test_same_seed_same_intervals_and_another_seed_others() -> None:
    a, b = spread([[20, 5], [10, 15]], TWO)
    assert agreement(a, b, classes=TWO, seed=2) == agreement(a, b, classes=TWO, seed=2)
    assert agreement(a, b, classes=TWO, seed=2) != agreement(a, b, classes=TWO, seed=3)


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [([], [], "0 labels"), (["first"], [], "1 labels and 0"), (["x"], ["first"], r"\['x'\]")],
)
def test_labels_that_cannot_be_compared_are_refused(a, b, told) -> None:
    with pytest.raises(ValueError, match=told):
        agreement(a, b, classes=TWO, seed=0)


# Bias


def test_a_judge_that_only_looks_at_the_place_is_found_out() -> None:
    found = position([looked(1, 1)] * 4 + [looked(0, 0)], seed=0)
    assert found.consistent.mean == 0 and found.first_pick_rate.mean == 0.8
    assert (found.always_first, found.always_second) == (4, 1)


def test_a_consistent_judge_picks_the_first_place_in_half_of_its_looks() -> None:
    found = position([looked(1, 0)] * 9 + [looked(0, 1)], seed=0)
    assert found.first_pick_rate.mean == 0.5 and found.consistent.mean == 1
    assert found.consistent.low < 0.9  # ten pairs are no proof
    assert found.always_first == found.always_second == 0


def test_a_look_without_preference_counts_half() -> None:
    # Looks: 1 and 0.5, 0.9 and 0.1: picks 1 + 0.5 + 1 + 0 of 4.
    assert position([looked(1, 0.5), looked(0.9, 0.1)], seed=0).first_pick_rate.mean == 0.625


def test_verdicts_without_two_looks_do_not_count() -> None:
    blind = Verdict(id="1", first=0, second=1, status="ok", p_first=1, consistent=False, judge="")
    assert position([looked(1, 0), blind], seed=0).n == 1
    with pytest.raises(ValueError, match="two looks"):
        position([blind], seed=0)


def test_the_longer_answer_wins_over_decided_pairs_of_unequal_length() -> None:
    # Longer won, longer lost, equal length, tie, longer (second) won: 2 of 3.
    found = longer_wins([1, 1, 1, 0.5, 0.2], [9, 2, 5, 9, 1], [3, 4, 5, 1, 7], seed=0)
    assert found.mean == pytest.approx(2 / 3) and found.n == 3


def test_lengths_that_decide_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="no decided pair"):
        longer_wins([0.5, 1], [3, 4], [1, 4], seed=0)
    with pytest.raises(ValueError, match="one of each"):
        longer_wins([1], [3, 4], [1], seed=0)
