"""Writes prompts.jsonl (training) and test.jsonl (held out): `python
data/starter/build_prompts.py`, a second.
"""

import json
import random
from typing import Any

from domain import HERE, Case, draw_cases, held_out_value

SEED = 20260101
TEST, TRAIN = 400, 1600


def test_cases() -> list[Case]:
    return draw_cases(random.Random(SEED), TEST, test=True, avoid=set())


def train_cases(avoid: set[Any]) -> list[Case]:
    return draw_cases(random.Random(SEED + 1), TRAIN, test=False, avoid=avoid)


def record(identifier: str, case: Case) -> dict[str, Any]:
    wordings = [case.clause_wording.get(case.asked), case.question_wording]
    return {
        "v": 1,
        "id": identifier,
        "messages": [{"role": "user", "content": case.text()}],
        "meta": {
            "asked": case.asked,
            "facts": case.facts,
            "gold": case.gold,
            "wordings": wordings,
            "unseen_value": case.gold is not None and held_out_value(case.asked, case.gold),
        },
    }


def main() -> None:
    test = test_cases()
    train = train_cases({case.key() for case in test})
    for name, cases in (("prompts", train), ("test", test)):
        lines = [json.dumps(record(f"{name}-{i:04}", case)) + "\n" for i, case in enumerate(cases)]
        (HERE / f"{name}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
