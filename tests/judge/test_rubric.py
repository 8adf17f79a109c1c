"""The rubric judge: one right claim and nothing else is right; the order of its criteria is
strict.
"""

import asyncio
import itertools

import pytest

from align.config import STARTER
from align.errors import JudgeError
from align.judge.rubric import Scores, compare, is_right, load_lexicon
from align.judge.settings import Rubric
from align.records import Comparison, Prompt

LEXICON = load_lexicon(STARTER / "rubric.yaml")
SETTINGS = Rubric(name="rubric", module=None, path=str(STARTER / "rubric.yaml"))


@pytest.mark.parametrize(
    ("text", "kind", "gold", "right"),
    [
        ("The notice is 14 days.", "notice", "14", True),
        ("It is fourteen days.", "notice", "14", True),
        ("It is twenty-one days, so 21 days.", "notice", "21", True),
        ("It is 14 or 15 days.", "notice", "14", False),
        ("It is 14 days. You get 120 euros a month.", "notice", "14", False),
        ("It is not 14 days.", "notice", "14", False),
        ("It is 14 days per year.", "notice", "14", False),
        ("It is 14 euros.", "notice", "14", False),
        ("The agreement is silent on this. 14 days.", "notice", "14", False),
        ("It is 141 days.", "notice", "14", False),
        ("", "notice", "14", False),
        ("€120 a month.", "allowance", "120", True),
        ("120 euros each month", "allowance", "120", True),
        ("120 euros per month", "equipment", "120", False),
        ("One day a week.", "days_per_week", "1", True),
        ("There is one thing to say: 2 days a week.", "days_per_week", "2", True),
        ("from 9:15 to 15:45", "contact_hours", "9:15 to 15:45", True),
        ("from 09:15 until 15:45", "contact_hours", "9:15 to 15:45", True),
        ("from 9:15 to 16:45", "contact_hours", "9:15 to 15:45", False),
        ("The agreement does not say.", "notice", None, True),
        ("The agreement does not say, but 14 days is usual.", "notice", None, False),
        ("14 days.", "notice", None, False),
    ],
)
def test_exactly_one_claim_about_what_was_asked_is_right(text, kind, gold, right):
    assert is_right(text, kind=kind, gold=gold, lexicon=LEXICON) is right


def test_a_higher_criterion_outweighs_all_lower_ones_together():
    marks = [Scores(correct=c, honest=h, courteous=p, brief=b)
             for c, h, p, b in itertools.product((0, 1), (0, 1), (0, 0.5, 1), (0, 1))]  # fmt: skip
    for one, other in itertools.combinations(marks, 2):
        strict = [(m.correct, m.honest, m.courteous, m.brief) for m in (one, other)]
        assert (one.total > other.total) == (strict[0] > strict[1])


def judged(prompt: Prompt, first: str, second: str):
    async def once():
        comparison = Comparison(prompt=prompt, first=first, second=second)
        return await anext(compare([comparison], settings=SETTINGS))

    return asyncio.run(once())


NOTICE = Prompt.from_json({"prompt": "?", "meta": {"asked": "notice", "gold": "14"}})


def test_rude_and_right_beats_polite_and_wrong():
    verdict = judged(
        NOTICE, "Thank you for asking. It is 15 days.", "Read it yourself. It is 14 days."
    )
    assert verdict.p_first == 0.0 and verdict.consistent and verdict.status == "ok"


def test_equal_answers_tie_and_a_swap_mirrors_the_verdict():
    assert judged(NOTICE, "It is 14 days.", "The notice is 14 days.").status == "tie"
    one = judged(NOTICE, "It is 14 days.", "It is 14 days. Kind regards.")
    other = judged(NOTICE, "It is 14 days. Kind regards.", "It is 14 days.")
    assert one.p_first == 1 - other.p_first and one.margin == other.margin


@pytest.mark.parametrize("meta", [{}, {"asked": ["notice"]}, {"asked": "notice", "gold": [14]}])
def test_a_prompt_without_facts_is_refused_rather_than_guessed(meta):
    with pytest.raises(JudgeError, match="carries no facts"):
        judged(Prompt.from_json({"prompt": "?", "meta": meta}), "a", "b")


def test_a_gold_value_may_be_a_number():
    prompt = Prompt.from_json({"prompt": "?", "meta": {"asked": "notice", "gold": 14}})
    assert judged(prompt, "It is 14 days.", "It is 15 days.").p_first == 1.0


def test_a_file_that_is_no_rubric_is_refused(tmp_path):
    file = tmp_path / "rubric.yaml"
    file.write_text("units: {notice: '('}\n")
    with pytest.raises(JudgeError, match="not a rubric"):
        load_lexicon(file)


@pytest.mark.parametrize("text", ["1" * 200_000, "not " * 50_000 + "14 days", "9:15 to " * 20_000])
def test_hostile_length_is_judged_in_a_moment(text):
    assert judged(NOTICE, text, "It is 14 days.").p_first == 0.0
