"""A judge's habits: does the order sway it, does length?"""

from align.records import Comparison, Prompt, Verdict
from align.stages.manner import Manner

PROMPT = Prompt.from_json({"id": "a", "prompt": "?"})


def seen(*rows: tuple[str, str, tuple[float, ...], float | None, bool]) -> Manner:
    manner = Manner()
    for first, second, looks, p, consistent in rows:
        status = "refusal" if p is None else "tie" if p == 0.5 else "ok"
        verdict = Verdict(
            id="a", first=0, second=1, status=status, p_first=p, consistent=consistent, judge="j",
            looks=looks,
        )  # fmt: skip
        manner.add(Comparison(prompt=PROMPT, first=first, second=second), verdict)
    return manner


def test_a_judge_of_the_first_place_is_found_out():
    manner = seen(("x", "yy", (1.0, 1.0), 0.5, False), ("x", "yy", (0.9, 0.6), 0.65, False))
    assert manner.metrics()["label/first_pick"] == 1.0
    assert manner.metrics()["label/consistent"] == 0.0


def test_ties_are_half_a_pick_and_decide_nothing_about_length():
    manner = seen(("x", "yy", (0.5, 0.5), 0.5, True), ("x", "yy", (0.0, 1.0), 0.0, True))
    assert manner.metrics()["label/first_pick"] == 0.5
    assert manner.metrics()["label/longer_wins"] == 1.0 and manner.longer_wins.n == 1


def test_two_looks_at_one_pair_are_no_two_witnesses():
    manner = seen(*[("x", "yy", (1.0, 1.0), 0.5, False)] * 7)
    assert manner.first_pick.n == 7


def test_what_was_not_seen_is_not_told():
    manner = seen(("x", "y", (), 1.0, True), ("x", "y", (), None, False))
    assert manner.metrics() == {} and manner.sentence() == ""


def test_the_sentence_says_all_three_in_percent():
    manner = seen(("x", "yy", (1.0, 0.0), 1.0, True), ("xx", "y", (1.0, 0.0), 1.0, True))
    assert manner.sentence() == (
        "the judge decided alike in both orders on 100.0% of pairs, preferred what was shown first "
        "in 50.0% of its looks, preferred the longer answer in 50.0% of decided pairs"
    )
