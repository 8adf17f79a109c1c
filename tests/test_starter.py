"""The starter kit: what its prompts promise, checked from their text alone, and that nothing leaks
into the test.
"""

import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from align.config import STARTER

sys.path.insert(0, str(Path(__file__).parent.parent / "data" / "starter"))

# How a reader tells the clauses apart: written for this test, not taken from the generator.
SUBJECTS = {
    "days_per_week": r"(days?|ceiling).*\bweek|week.*\bdays?|weekly",
    "notice": r"in advance|notice|applies|ahead of the first|advance|days early|lead time",
    "allowance": r"bills|euros.*month|month.*euros|€.*month|EUR.*month|running costs",
    "contact_hours": r"\d:\d\d",
    "seniority": r"service|newcomers|seniority|employment|have been here|after hiring",
    "equipment": r"one-off|furniture|equip|chair",
    "duration": r"valid|term of|expires|renewed|at a time|in force",
    "on_site": r"on site|presence|in person|come in|together at the office|in-person",
    "distance": r"kilomet|\bkm\b",
    "abroad": r"country|abroad|foreign",
    "reply": r"working days",
    "ending": r"weeks",
}
QUESTIONS = {
    "days_per_week": r"week",
    "notice": r"apply|request|application|ask for telework",
    "allowance": r"month|running costs",
    "contact_hours": r"reachable|contact hours|call|phone|messages",
    "seniority": r"eligible|seniority|qualify|service|employed first",
    "equipment": r"equip|desk|chair|furniture",
    "duration": r"valid|expire|term|renew|permission last|in force",
    "on_site": r"come in|presen|in-person|in person|attendance",
    "distance": r"far (from|away)|distance|radius|kilomet",
    "abroad": r"abroad|country",
    "reply": r"manager|reply|decision|supervisor",
    "ending": r"end\b|terminat|withdraw|stop telework|end it",
}
# Where two subjects share words, the more telling one is looked for first.
ORDER = [
    "contact_hours", "distance", "reply", "abroad", "equipment", "ending", "on_site", "seniority",
    "duration", "notice", "allowance", "days_per_week",
]  # fmt: skip
VALUE = r"\d{1,2}:\d\d to \d{1,2}:\d\d|\d+"


def subject(text: str, patterns: dict[str, str]) -> str:
    return next(kind for kind in ORDER if re.search(patterns[kind], text, re.IGNORECASE))


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (STARTER / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def train() -> list[dict]:
    return rows("prompts.jsonl")


@pytest.fixture(scope="module")
def test() -> list[dict]:
    return rows("test.jsonl")


def facts_from_text(text: str) -> tuple[dict[str, str], str]:
    """The facts by clause, and what the question asks, read by the patterns above."""
    _, body, question = text.split("\n", 1)[0], *text.split("\n", 1)[1].rsplit("\n", 1)
    clauses = [c for c in re.split(r"\n|(?<=[a-z\d€)])\. (?=[A-Z\d])", body) if c.strip()]
    facts = {}
    for clause in clauses:
        found = re.findall(VALUE, clause)
        assert len(found) == 1, clause
        facts[subject(clause, SUBJECTS)] = found[0]
    return facts, subject(re.split(r"(?<=\.) ", question)[-1], QUESTIONS)


def test_the_gold_facts_can_be_read_from_the_text(train, test):
    for row in train + test:
        facts, asked = facts_from_text(row["messages"][0]["content"])
        assert facts == row["meta"]["facts"], row
        assert asked == row["meta"]["asked"], row
        assert facts.get(asked) == row["meta"]["gold"]


def test_no_test_combination_of_wordings_and_no_tuple_of_facts_occurs_in_training(train, test):
    def combinations(rows):
        return {(r["meta"]["asked"], *r["meta"]["wordings"]) for r in rows if r["meta"]["gold"]}

    def tuples(rows):
        return {frozenset(r["meta"]["facts"].items()) for r in rows}

    assert combinations(test) and not combinations(test) & combinations(train)
    assert not tuples(test) & tuples(train)


def test_a_quarter_of_the_test_answers_uses_a_number_never_seen_beside_that_clause(train, test):
    seen = {(kind, value) for r in train for kind, value in r["meta"]["facts"].items()}
    unseen = [
        r for r in test if r["meta"]["gold"] and (r["meta"]["asked"], r["meta"]["gold"]) not in seen
    ]
    assert len(unseen) >= len(test) / 4
    marked = [r for r in test if r["meta"]["unseen_value"]]
    assert len(marked) >= len(test) / 4, "by construction, not by the luck of this training sample"
    assert not [r for r in train if r["meta"]["unseen_value"]]


def test_the_base_models_lessons_keep_clear_of_the_test():
    from domain import draw_case, draw_cases, held_out_value, held_out_wording

    rng, avoid = random.Random(0), set()
    held = draw_cases(rng, 50, test=True, avoid=avoid)
    assert all(
        c.gold is None or held_out_wording(c.clause_wording[c.asked], c.question_wording)
        for c in held
    )
    for _ in range(500):
        case = draw_case(rng, test=False)
        assert not any(held_out_value(kind, value) for kind, value in case.facts.items())
        assert case.gold is None or not held_out_wording(
            case.clause_wording[case.asked], case.question_wording
        )


def test_facts_and_manners_of_the_demonstrations_are_independent():
    from domain import draw_answer, draw_case

    from align.judge.rubric import load_lexicon, score
    from align.records import Message, Prompt

    rng, lexicon = random.Random(1), load_lexicon(STARTER / "rubric.yaml")
    counts: Counter = Counter()
    for i in range(3000):
        case = draw_case(rng, test=False)
        meta = {"asked": case.asked, "gold": case.gold}
        prompt = Prompt(id=str(i), messages=(Message(role="user", content=case.text()),), meta=meta)
        marks = score(prompt, draw_answer(rng, case, right=0.42), lexicon=lexicon)
        counts[marks.correct, marks.courteous] += 1
    rates = {m: counts[1.0, m] / (counts[1.0, m] + counts[0.0, m]) for m in (0.0, 0.5, 1.0)}
    assert max(rates.values()) - min(rates.values()) < 0.08, rates


def test_prompts_are_varied(train, test):
    assert len({r["messages"][0]["content"] for r in train + test}) == len(train) + len(test)
    assert len(test) >= 300
    silent = sum(r["meta"]["gold"] is None for r in test) / len(test)
    assert 0.1 < silent < 0.3
    asked = Counter(r["meta"]["asked"] for r in test)
    assert len(asked) == 12 and min(asked.values()) >= 10
