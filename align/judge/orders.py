"""From two looks at a pair, one in each order, to one verdict."""

from collections.abc import Mapping

from align.records import OK, TIE, Comparison, Verdict


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

    p = (p_first + 1 - p_first_swapped) / 2, so a judge that only ever picks the first place ends at
    a tie. Consistent: both looks lean the same way, or both lean nowhere.
    """
    p = (p_first + 1.0 - p_first_swapped) / 2
    leaning, leaning_swapped = p_first - 0.5, 0.5 - p_first_swapped
    return Verdict(
        id=comparison.prompt.id,
        first=comparison.first_index,
        second=comparison.second_index,
        status=TIE if p == 0.5 else OK,
        p_first=p,
        consistent=(leaning > 0) == (leaning_swapped > 0)
        and (leaning < 0) == (leaning_swapped < 0),
        judge=judge,
        looks=(p_first, p_first_swapped),
        margin=margin,
        scores=scores,
    )
