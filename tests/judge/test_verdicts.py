"""From answers to verdicts, by hand; a swap of the two responses mirrors p and nothing else."""

import random
from dataclasses import replace
from typing import Any

import pytest

from align.config import read_config
from align.errors import JudgeError
from align.judge.answers import OK, Reading
from align.judge.settings import Asking
from align.judge.verdicts import (
    Answer,
    Group,
    beats,
    fitting,
    groups,
    questions,
    verdicts,
    with_dropped,
    without,
)
from align.records import Comparison, Message, Prompt, Verdict
from tests.test_config import composed

PROMPT = Prompt(
    id="p", messages=(Message(role="user", content="?"),), meta={"reference": "42", "n": 3}
)
PAIR = Comparison(prompt=PROMPT, first="one", second="two", first_index=4, second_index=7)


@pytest.fixture(scope="module")
def shipped() -> Asking:
    return read_config(
        composed("recipe=dpo", "judge=openai", "judge.model=gpt-4o-mini", "judge.highest=10")
    ).judge


def hard(label: str, **criteria: str) -> Answer:
    return Answer(reading=Reading(status=OK, label=label, criteria=criteria), tokens=10, cost=1000)


def soft(label: str, **probabilities: float) -> Answer:
    named = {key.lstrip("_"): p for key, p in probabilities.items()}
    return Answer(
        reading=Reading(status=OK, label=label, probabilities=named), tokens=10, cost=1000
    )


def ranking(order: str) -> Answer:
    return Answer(reading=Reading(status=OK, ranking=tuple(order)), tokens=10, cost=1000)


def bad(status: str) -> Answer:
    return Answer(reading=Reading(status=status), tokens=10, cost=1000)


def judged(settings: Asking, *answers: Answer, pair: Comparison = PAIR) -> Verdict:
    (verdict,) = verdicts(Group(comparisons=(pair,)), answers, settings=settings, judge="j")
    return verdict


def mirrored(settings: Asking, verdict: Verdict, *answers: Answer, looks: int = 2) -> None:
    """The swapped pair gets the same answers with the looks exchanged."""
    swapped = [a for i in range(0, len(answers), looks) for a in answers[i : i + looks][::-1]]
    other = judged(settings, *swapped, pair=PAIR.swap())
    assert (other.first, other.second) == (verdict.second, verdict.first)
    assert (other.status, other.consistent) == (verdict.status, verdict.consistent)
    assert other.margin == (None if verdict.margin is None else pytest.approx(verdict.margin))
    levels = {None: None, ">>": "<<", ">": "<", "=": "=", "<": ">", "<<": ">>"}
    assert other.level == {**levels, "both bad": "both bad"}[verdict.level]
    if verdict.p_first is not None:
        assert other.p_first == pytest.approx(1 - verdict.p_first, abs=1e-12)
    for mine, yours in zip(verdict.scores, other.scores[::-1], strict=True):
        assert mine == pytest.approx(yours)


@pytest.mark.parametrize(
    ("answers", "p", "looks", "consistent"),
    [
        ("AB", 1.0, (1.0, 0.0), True),
        ("BA", 0.0, (0.0, 1.0), True),
        ("AA", 0.5, (1.0, 1.0), False),
        ("BB", 0.5, (0.0, 0.0), False),
        (("tie", "tie"), 0.5, (0.5, 0.5), True),
        (("A", "tie"), 0.75, (1.0, 0.5), False),
        (("tie", "A"), 0.25, (0.5, 1.0), False),
        ("ABAB", 1.0, (1.0, 0.0), True),
        ("ABAA", 0.75, (1.0, 0.5), False),  # the swapped look is torn between its two samples
        ("ABABAA", 0.8333333, (1.0, 0.3333333), True),
    ],
)
def test_p_is_the_mean_over_both_orders(shipped, answers, p, looks, consistent):
    settings = replace(shipped, on_disagreement="soft")
    given = [hard(label) for label in answers]
    verdict = judged(settings, *given)
    assert verdict.p_first == pytest.approx(p) and verdict.looks == pytest.approx(looks)
    assert verdict.consistent is consistent and verdict.status == ("tie" if p == 0.5 else "ok")
    assert (verdict.first, verdict.second, verdict.judge) == (4, 7, "j")
    assert (verdict.tokens, verdict.cost) == (10 * len(given), pytest.approx(1e-6 * len(given)))
    mirrored(settings, verdict, *given)


def test_probabilities_go_before_the_label_that_was_drawn(shipped):
    """Given order: 0.6 + 0.2 / 2 = 0.7; swapped: 0.1 + 0.1 / 2 = 0.15; p = (0.7 + 0.85) / 2."""
    answers = soft("B", A=0.6, B=0.2, tie=0.2), soft("A", A=0.1, B=0.8, tie=0.1)
    verdict = judged(shipped, *answers)
    assert verdict.p_first == pytest.approx(0.775) and verdict.looks == pytest.approx((0.7, 0.15))
    assert verdict.consistent and verdict.status == "ok"
    mirrored(shipped, verdict, *answers)


def test_a_judge_of_places_ties_exactly_whatever_its_probability(shipped):
    settings = replace(shipped, on_disagreement="soft")
    for thousandth in range(1001):
        look = soft("A", A=thousandth / 1000, B=1 - thousandth / 1000)
        verdict = judged(settings, look, look)
        assert (verdict.status, verdict.p_first) == ("tie", 0.5)
        assert verdict.consistent == (thousandth == 500)


@pytest.mark.parametrize(
    ("rule", "status", "p"),
    [("tie", "tie", 0.5), ("drop", "disagreement", None), ("soft", "ok", 0.6),
     ("escalate", "ok", 0.6)],
)  # fmt: skip
def test_what_becomes_of_a_disagreement(shipped, rule, status, p):
    """0.9 for the first, then 0.3 for it: (0.9 + 0.3) / 2."""
    settings = replace(shipped, on_disagreement="soft")
    object.__setattr__(settings, "on_disagreement", rule)
    answers = soft("A", A=0.9, B=0.1), soft("A", A=0.7, B=0.3)
    verdict = judged(settings, *answers)
    assert verdict.status == status and not verdict.consistent
    assert verdict.p_first == (None if p is None else pytest.approx(p))
    assert verdict.looks == pytest.approx((0.9, 0.7))
    mirrored(settings, verdict, *answers)


@pytest.mark.parametrize(
    ("labels", "p", "margin", "level"),
    [
        ("15", 1.0, 2.0, ">>"),
        ("14", 1.0, 1.5, ">>"),
        ("24", 1.0, 1.0, ">"),
        ("42", 0.0, 1.0, "<"),
        ("41", 0.0, 1.5, "<<"),
        ("51", 0.0, 2.0, "<<"),
        ("33", 0.5, 0.0, "="),
        ("00", 0.5, 0.0, "both bad"),
        ("03", 0.5, 0.0, "="),
        ("23", 0.75, 0.5, ">"),
        ("32", 0.25, 0.5, "<"),
        ("11", 0.5, 0.0, "="),
        ("12", 0.5, 0.0, "="),  # +2 and -1, but either response won once
        ("13", 0.75, 1.0, ">"),
        ("1515", 1.0, 2.0, ">>"),
        ("1524", 1.0, 1.5, ">>"),
    ],
)
def test_levels_and_margins_of_the_five_point_scale(shipped, labels, p, margin, level):
    settings = replace(shipped, scale="five", on_disagreement="soft")
    answers = [hard(label) for label in labels]
    verdict = judged(settings, *answers)
    assert (verdict.p_first, verdict.margin, verdict.level) == (p, margin, level)
    mirrored(settings, verdict, *answers)


def test_a_margin_is_that_of_the_preferred_response(shipped):
    """The second wins (0.4 : 0.6), though by levels the first leads (2 x 0.4 - 0.6 = 0.2)."""
    settings = replace(shipped, scale="five")
    answers = soft("4", _1=0.4, _4=0.6), soft("2", _5=0.4, _2=0.6)
    verdict = judged(settings, *answers)
    assert verdict.p_first == pytest.approx(0.4)
    assert (verdict.margin, verdict.level) == (0.0, "=")
    mirrored(settings, verdict, *answers)
    answers = soft("2", _1=0.5, _2=0.3, _3=0.2), soft("4", _4=0.5, _5=0.5)
    verdict = judged(settings, *answers)  # (2 x 0.5 + 0.3 + 1.5) / 2, p = (0.9 + 1) / 2
    assert (verdict.p_first, verdict.margin, verdict.level) == (
        pytest.approx(0.95), pytest.approx(1.4), ">",
    )  # fmt: skip


@pytest.mark.parametrize(("rule", "level"), [("tie", "="), ("drop", None)])
def test_a_disagreement_has_no_level_of_its_own(shipped, rule, level):
    settings = replace(shipped, scale="five", on_disagreement=rule)
    verdict = judged(settings, hard("1"), hard("3"))
    assert (verdict.level, verdict.margin) == (level, None)


def test_criteria_are_told_for_first_and_second(shipped):
    """Honesty goes to the first in both looks, tone to the place shown first."""
    settings = replace(shipped, criteria=["honesty", "tone", "wit"])
    answers = (
        hard("A", honesty="A", tone="A", wit="tie"),
        hard("B", honesty="B", tone="A", wit="A"),
    )
    verdict = judged(settings, *answers)
    assert verdict.scores == (
        {"honesty": 1.0, "tone": 0.5, "wit": 0.25}, {"honesty": 0.0, "tone": 0.5, "wit": 0.75},
    )  # fmt: skip
    assert verdict.p_first == 1.0 and verdict.margin is None
    mirrored(settings, verdict, *answers)


@pytest.mark.parametrize("kind", ["pairwise", "listwise", "scalar"])
@pytest.mark.parametrize(
    ("statuses", "gravest"),
    [
        (["malformed"], "malformed"),
        (["malformed", "refusal"], "refusal"),
        (["overflow", "malformed"], "overflow"),
        (["refusal", "failed"], "failed"),
        (["new to us"], "failed"),
    ],
)
def test_one_failed_look_fails_the_whole_gravest_first(shipped, kind, statuses, gravest):
    settings = replace(shipped, kind=kind)
    good = {"pairwise": hard("A"), "listwise": ranking("AB"), "scalar": hard("7")}[kind]
    answers = [*map(bad, statuses), *[good] * (4 - len(statuses))]
    verdict = judged(settings, *answers)
    assert (verdict.status, verdict.p_first, verdict.consistent) == (gravest, None, False)
    assert verdict.tokens == 40 and verdict.cost == pytest.approx(4e-6)


def three(*pairs: tuple[int, int]) -> Group:
    """Responses 0, 1 and 2 of a prompt, compared in pairs."""
    texts = ("zero", "one", "two")
    return Group(
        comparisons=tuple(
            Comparison(
                prompt=PROMPT, first=texts[a], second=texts[b], first_index=a, second_index=b
            )
            for a, b in pairs
        )
    )


def test_pairs_out_of_rankings_know_which_was_shown_first(shipped):
    """Shown as 0 1 2, then as 2 1 0, so B > A > C and B > C > A both say 1 > 0 > 2."""
    settings = replace(shipped, kind="listwise")
    group = three((0, 1), (0, 2), (1, 2), (2, 0))
    found = verdicts(group, [ranking("BAC"), ranking("BCA")], settings=settings, judge="j")
    assert [v.p_first for v in found] == [0.0, 1.0, 1.0, 0.0]
    # p of whichever was shown first: 0 before 1 in the listing from the front, 1 before 0 from the
    # back; the last pair's first response is shown first from the back.
    assert [v.looks for v in found] == [(0.0, 1.0), (1.0, 0.0), (1.0, 0.0), (0.0, 1.0)]
    assert all(v.consistent and v.status == "ok" for v in found)
    assert [v.tokens for v in found] == [20, 0, 0, 0], "paid for once"
    assert sum(v.cost for v in found) == pytest.approx(2e-6)


def test_a_ranking_by_place_is_a_tie_for_every_pair(shipped):
    settings = replace(shipped, kind="listwise", on_disagreement="soft")
    found = verdicts(
        three((0, 1), (2, 0)), [ranking("ABC"), ranking("ABC")], settings=settings, judge="j"
    )
    assert [(v.status, v.p_first, v.consistent) for v in found] == [("tie", 0.5, False)] * 2
    assert [v.looks for v in found] == [(1.0, 1.0)] * 2


def test_rankings_of_several_samples_are_averaged(shipped):
    settings = replace(shipped, kind="listwise", on_disagreement="soft")
    answers = [ranking("ABC"), ranking("CBA"), ranking("BAC"), ranking("CBA")]
    (verdict,) = verdicts(three((0, 1)), answers[:2], settings=settings, judge="j")[:1]
    assert verdict.p_first == 1.0
    group = three((0, 1), (1, 2))
    found = verdicts(group, answers, settings=settings, judge="j")
    assert [v.p_first for v in found] == [0.75, 1.0]
    assert found[0].looks == (0.5, 0.0)


def test_marks_without_probabilities_are_compared(shipped):
    settings = replace(shipped, kind="scalar")  # 1 to 10
    verdict = judged(settings, hard("10"), hard("7"))
    assert (verdict.p_first, verdict.margin, verdict.status) == (1.0, 3.0, "ok")
    assert verdict.looks == () and verdict.consistent
    assert verdict.scores == ({"score": 1.0}, {"score": pytest.approx(6 / 9)})
    mirrored(settings, verdict, hard("10"), hard("7"))
    assert judged(settings, hard("7"), hard("7")).status == "tie"
    two_of_three = [hard(m) for m in ("8", "6", "5", "6", "8", "7")]  # won, lost, won
    assert judged(settings, *two_of_three).p_first == pytest.approx(2 / 3)
    assert judged(settings, *two_of_three).margin == pytest.approx(21 / 3 - 19 / 3)


def test_p_from_two_distributions_over_three_marks(shipped):
    """P(x > y): 2 > 1: 0.3 x 0.5, 3 > 1: 0.5 x 0.5, 3 > 2: 0.5 x 0.3, in all 0.55;
    P(x = y): 0.2 x 0.5 + 0.3 x 0.3 + 0.5 x 0.2 = 0.29; p = 0.55 + 0.145. Means: 2.3 and 1.7.
    """
    settings = replace(shipped, kind="scalar", lowest=1, highest=3)
    answers = soft("1", _1=0.2, _2=0.3, _3=0.5), soft("3", _1=0.5, _2=0.3, _3=0.2)
    verdict = judged(settings, *answers)
    assert verdict.p_first == pytest.approx(0.695) and verdict.margin == pytest.approx(0.6)
    assert verdict.scores == ({"score": pytest.approx(0.65)}, {"score": pytest.approx(0.35)})
    mirrored(settings, verdict, *answers)


def test_a_mark_that_wins_more_often_but_not_on_average_has_no_margin(shipped):
    """2 beats {3: 0.4, 1: 0.6} with 0.6, though 2 - 1.8 = 0.2; against {9: 0.4} the mean loses."""
    settings = replace(shipped, kind="scalar")
    verdict = judged(settings, hard("2"), soft("1", _9=0.4, _1=0.6))
    assert verdict.p_first == pytest.approx(0.6) and verdict.margin == 0.0


def test_equal_distributions_tie_exactly():
    for number in range(200):
        weights = [(number * k * k) % 17 + 0.1 for k in range(1, 11)]
        shares = {str(k): w / sum(weights) for k, w in enumerate(weights, 1)}
        reading = Reading(status=OK, label="1", probabilities=shares)
        assert beats(reading, reading) == 0.5


def test_criteria_of_marks_are_shares_of_the_scale(shipped):
    settings = replace(shipped, kind="scalar", criteria=["tone"])
    verdict = judged(settings, hard("10", tone="1"), hard("1", tone="10"))
    assert verdict.scores == ({"tone": 0.0, "score": 1.0}, {"tone": 1.0, "score": 0.0})


@pytest.mark.parametrize(
    ("kind", "samples", "shown"),
    [
        ("pairwise", 1, [["one", "two"], ["two", "one"]]),
        ("pairwise", 2, [["one", "two"], ["two", "one"]] * 2),
        ("listwise", 1, [["one", "two"], ["two", "one"]]),
        ("scalar", 1, [["one"], ["two"]]),
        ("scalar", 3, [["one"], ["two"]] * 3),
    ],
)
def test_what_is_asked(shipped, kind, samples, shown):
    asked = questions(
        Group(comparisons=(PAIR,)), settings=replace(shipped, kind=kind), samples=samples
    )
    assert [list(q.material.responses) for q in asked] == shown
    assert [q.sample for q in asked] == [s for s in range(samples) for _ in range(2)]
    assert {q.material.reference for q in asked} == {"42"} and {q.form.kind for q in asked} == {
        kind
    }


def test_only_a_text_is_a_reference(shipped):
    for name in ("n", "none"):
        asked = questions(Group(comparisons=(PAIR,)), settings=replace(shipped, reference=name))
        assert asked[0].material.reference is None


def test_a_ranking_is_asked_forwards_and_backwards_of_every_response_once(shipped):
    settings = replace(shipped, kind="listwise")
    asked = questions(three((0, 1), (0, 2), (1, 2)), settings=settings)
    assert [q.material.responses for q in asked] == [
        ["zero", "one", "two"], ["two", "one", "zero"],
    ]  # fmt: skip
    assert asked[0].form.labels == ("A", "B", "C")


def test_more_responses_than_letters_is_one_line(shipped):
    many = [Comparison(prompt=PROMPT, first=str(i), second=str(i + 1), first_index=i,
                       second_index=i + 1) for i in range(26)]  # fmt: skip
    settings = replace(shipped, kind="listwise")
    assert len(questions(Group(comparisons=tuple(many[:25])), settings=settings)) == 2
    with pytest.raises(JudgeError, match=r"prompt p has 27 responses and a ranking takes 26; type"):
        questions(Group(comparisons=tuple(many)), settings=settings)


def pair(name: str, a: int = 0, b: int = 1, **texts: Any) -> Comparison:
    prompt = Prompt(id=name, messages=(Message(role="user", content=name),))
    given = {"first": f"{name}{a}", "second": f"{name}{b}", **texts}
    return Comparison(prompt=prompt, first_index=a, second_index=b, **given)


def grouped(settings: Asking, *comparisons: Comparison) -> list[int]:
    found = list(groups(iter(comparisons), settings=settings))
    assert [c for group in found for c in group.comparisons] == list(comparisons)
    return [len(group.comparisons) for group in found]


def test_neighbours_that_share_a_prompt_are_ranked_together(shipped):
    settings = replace(shipped, kind="listwise")
    row = [pair("a"), pair("a", 0, 2), pair("a", 1, 2), pair("b"), pair("a"), pair("a", 1, 2)]
    assert grouped(settings, *row) == [3, 1, 2]
    assert grouped(shipped, *row) == [1] * 6, "pairs stand alone"
    assert grouped(settings) == []


def test_a_response_is_given_its_mark_once_and_a_failed_one_fails_only_its_own_pairs(shipped):
    settings = replace(shipped, kind="scalar")
    group = three((0, 1), (2, 1), (0, 2))
    assert grouped(settings, *group.comparisons) == [3]
    asked = questions(group, settings=settings)
    assert [q.material.responses for q in asked] == [["zero"], ["one"], ["two"]]
    found = verdicts(group, [hard("7"), hard("5"), bad("refusal")], settings=settings, judge="j")
    assert [v.status for v in found] == ["ok", "refusal", "refusal"]
    assert [v.tokens for v in found] == [30, 0, 0], "paid for once"
    found = verdicts(group, [hard("7"), hard("5"), hard("6")], settings=settings, judge="j")
    assert [(v.p_first, v.margin) for v in found] == [(1.0, 2), (1.0, 1), (1.0, 1)]


@pytest.mark.parametrize(
    ("kind", "kept"), [("pairwise", [(0, 2)]), ("scalar", [(0, 2)]), ("listwise", [])]
)
def test_what_is_too_long_takes_only_its_own_pairs_along_but_a_whole_ranking(shipped, kind, kept):
    settings = replace(shipped, kind=kind, on_overflow="drop", max_chars=100)
    texts = ["short", "x" * 101, "brief"]
    group = Group(
        comparisons=tuple(
            pair("p", a, b, first=texts[a], second=texts[b]) for a, b in ((0, 1), (0, 2), (2, 1))
        )
    )
    fit = fitting(group, settings=settings)
    assert [(c.first_index, c.second_index) for c in fit.comparisons] == kept
    assert fitting(group, settings=replace(settings, on_overflow="truncate")) == group
    told = [replace(without(c, status="failed", judge="j"), tokens=1) for c in fit.comparisons]
    whole = with_dropped(group, fit, told, judge="j")
    assert [(v.first, v.second) for v in whole] == [(0, 1), (0, 2), (2, 1)]
    assert [v.status for v in whole] == ["overflow", "failed" if kept else "overflow", "overflow"]


def test_marks_with_probabilities_of_every_size_make_a_verdict(shipped):
    settings, draw = replace(shipped, kind="scalar"), random.Random(0)
    for _ in range(500):
        sides = []
        for lowest, highest in ((1, 4), (6, 10)):
            shares = [draw.random() for _ in range(lowest, highest + 1)]
            likely = {str(lowest + i): s / sum(shares) for i, s in enumerate(shares)}
            sides.append(Answer(reading=Reading(status="ok", label="1", probabilities=likely)))
        (verdict,) = verdicts(three((0, 1)), [*sides, hard("1")][:2], settings=settings, judge="j")
        assert 0 <= verdict.p_first < 1e-9


def test_another_text_under_a_known_number_is_another_ranking(shipped):
    settings = replace(shipped, kind="listwise")
    assert grouped(settings, pair("a"), pair("a", second="other"), pair("a", 0, 2)) == [1, 2]
