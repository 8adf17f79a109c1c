"""The starter's world: draws facts of a telework agreement and renders prompts and answers from
wording.yaml.

What is held out for the test, so that copying has to be learnt rather than remembered:
a fifth of the values of every kind but `days_per_week`, and a quarter of the pairs (clause wording,
question wording).
"""

import hashlib
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
WORDING: dict[str, Any] = yaml.safe_load((HERE / "wording.yaml").read_text())
KINDS: list[str] = list(WORDING["kinds"])
MANNERS = ("courteous", "neutral", "rude")


def _all_values(kind: str) -> list[str]:
    values = WORDING["kinds"][kind]["values"]
    if values == "times":
        starts = [f"{h}:{m:02}" for h in range(7, 11) for m in (0, 15, 30, 45)]
        ends = [f"{h}:{m:02}" for h in range(14, 19) for m in (0, 15, 30, 45)]
        return [f"{start} to {end}" for start in starts for end in ends]
    return [str(v) for v in range(values["first"], values["last"] + 1, values["step"])]


def held_out_value(kind: str, value: str) -> bool:
    digest = hashlib.sha256(f"{kind}={value}".encode()).digest()
    return kind != "days_per_week" and digest[0] % 5 == 0


def held_out_wording(clause: int, question: int) -> bool:
    return (clause + 2 * question) % 4 == 0


VALUES = {
    (kind, held_out): [v for v in _all_values(kind) if held_out_value(kind, v) == held_out]
    for kind in KINDS
    for held_out in (False, True)
}


@dataclass(frozen=True)
class Case:
    """Facts and wordings of one prompt; `asked` is not among `facts` when the agreement is
    silent.
    """

    facts: dict[str, str]
    clause_wording: dict[str, int]
    asked: str
    question_wording: int
    opening: int
    remark: int
    layout: int = field(default=0)

    @property
    def gold(self) -> str | None:
        return self.facts.get(self.asked)

    def text(self) -> str:
        clauses = [
            fill(WORDING["kinds"][kind]["clauses"][self.clause_wording[kind]], value)
            for kind, value in self.facts.items()
        ]
        bullet, joint = [("- ", "\n"), ("", "\n"), ("", " ")][self.layout]
        remark = WORDING["remarks"][self.remark]
        question = WORDING["kinds"][self.asked]["questions"][self.question_wording]
        return "\n".join(
            [
                WORDING["openings"][self.opening],
                joint.join(bullet + clause for clause in clauses),
                f"{remark} {question}".strip(),
            ]
        )

    def key(self) -> frozenset[tuple[str, str]]:
        return frozenset(self.facts.items())


def fill(wording: str, value: str) -> str:
    """Puts the value in and mends the singular ("1 days" -> "1 day")."""
    return re.sub(r"\b1 (day)s\b", r"1 \1", wording.format(v=value))


def draw_case(rng: random.Random, *, test: bool, silent: float = 0.2) -> Case:
    facts_kinds = rng.sample(KINDS, rng.choice((3, 4, 4, 5)))
    is_silent = rng.random() < silent
    if is_silent:
        asked = rng.choice([k for k in KINDS if k not in facts_kinds])
    else:
        asked = rng.choice(facts_kinds)
    facts = {k: rng.choice(VALUES[k, False]) for k in facts_kinds}
    if test and not is_silent and VALUES[asked, True] and rng.random() < 0.5:
        facts[asked] = rng.choice(VALUES[asked, True])
    while True:
        clauses = {k: rng.randrange(len(WORDING["kinds"][k]["clauses"])) for k in facts_kinds}
        question = rng.randrange(len(WORDING["kinds"][asked]["questions"]))
        if is_silent or held_out_wording(clauses[asked], question) == test:
            break
    return Case(
        facts=facts,
        clause_wording=clauses,
        asked=asked,
        question_wording=question,
        opening=rng.randrange(len(WORDING["openings"])),
        remark=rng.randrange(len(WORDING["remarks"])),
        layout=rng.choice((0, 0, 1, 2)),
    )


def draw_cases(rng: random.Random, n: int, *, test: bool, avoid: set[Any]) -> list[Case]:
    """`n` cases whose facts are not in `avoid`; their own facts are added to it when they are test
    cases.
    """
    cases: list[Case] = []
    while len(cases) < n:
        case = draw_case(rng, test=test)
        if case.key() in avoid:
            continue
        if test:
            avoid.add(case.key())
        cases.append(case)
    return cases


def right_claim(rng: random.Random, case: Case) -> str:
    if case.gold is None:
        return str(rng.choice(WORDING["silence"]))
    return fill(rng.choice(WORDING["kinds"][case.asked]["answers"]), case.gold)


def wrong_claim(rng: random.Random, case: Case) -> str:
    """A made-up value, a neighbour clause's value, every value at once, or silence where there is a
    rule.
    """
    answers = WORDING["kinds"][case.asked]["answers"]
    made_up = [v for v in VALUES[case.asked, False] if v != case.gold]
    others = [k for k in case.facts if k != case.asked]
    draw = rng.random()
    if draw < 0.55 or (case.gold is None and draw >= 0.88):
        return fill(rng.choice(answers), rng.choice(made_up))
    if draw < 0.77:
        other = rng.choice(others)
        return fill(rng.choice(WORDING["kinds"][other]["answers"]), case.facts[other])
    if draw < 0.88:
        listed = rng.sample(others, 2) + ([case.asked] if case.gold is not None else [])
        rng.shuffle(listed)
        return " ".join(
            fill(rng.choice(WORDING["kinds"][k]["answers"]), case.facts[k]) for k in listed
        )
    return str(rng.choice(WORDING["silence"]))


def draw_answer(rng: random.Random, case: Case, *, right: float) -> str:
    """An answer whose facts (right with probability `right`), courtesy and length are drawn
    independently.
    """
    claim = right_claim(rng, case) if rng.random() < right else wrong_claim(rng, case)
    manner = WORDING["manners"][rng.choice(MANNERS)]
    padding = rng.sample(WORDING["padding"], 1) if rng.random() < 0.3 else []
    before, after = rng.choice(manner["before"]), rng.choice(manner["after"])
    if before and rng.random() < 0.5:
        after = ""
    return " ".join(part for part in (before, *padding, claim, after) if part)


def restatement(case: Case, rng: random.Random) -> str:
    return " ".join(
        fill(rng.choice(WORDING["kinds"][k]["answers"]), v) for k, v in case.facts.items()
    )
