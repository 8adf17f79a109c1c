"""From two looks at a pair, one in each order, to one verdict."""

from collections.abc import Mapping

from align.records import OK, TIE, Comparison, Verdict

ROUNDING = 1e-9  # what sums of probabilities may be off by


def over_both_orders(
    comparison: Comparison,
    *,
    p_first: float,
    p_first_swapped: float,
    judge: str,
    margin: float | None = None,
    scores: tuple[Mapping[str, float], ...] = (),
) -> Verdict:
    """One verdict from the probability of the first-shown answer in the given order and in the
    swapped one.

        p = (p_first + 1 - p_first_swapped) / 2

    so a judge that only ever picks the first place ends at a tie. Consistent: both looks lean the
    same way, or both lean nowhere.
    """
    p = 0.5 + (p_first - p_first_swapped) / 2
    tied = leaning(p) == 0
    return Verdict(
        id=comparison.prompt.id,
        first=comparison.first_index,
        second=comparison.second_index,
        status=TIE if tied else OK,
        p_first=0.5 if tied else p,
        consistent=leaning(p_first) == -leaning(p_first_swapped),
        judge=judge,
        looks=(p_first, p_first_swapped),
        margin=margin,
        scores=scores,
    )


def leaning(p: float) -> int:
    """1 towards the first answer, -1 towards the second, 0 where p is a half but for rounding."""
    return (p - 0.5 > ROUNDING) - (p - 0.5 < -ROUNDING)
