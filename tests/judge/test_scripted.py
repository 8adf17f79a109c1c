"""The scripted judge says the same of the same comparison, and mirrors it when the answers swap."""

import asyncio
from typing import Any

import pytest

from align.errors import ConfigError
from align.judge.scripted import compare
from align.judge.settings import Scripted
from align.records import Comparison, Message, Prompt, Verdict


def scripted(prefer: str = "longest", **changes: Any) -> Scripted:
    usual: dict[str, Any] = {
        "text": None, "p": 1.0, "statuses": None, "noise": 0.0, "cost_usd": 0.0
    }  # fmt: skip
    return Scripted(name="scripted", module=None, prefer=prefer, **{**usual, **changes})


def comparison(name: str = "0", first: str = "short", second: str = "much longer") -> Comparison:
    prompt = Prompt(id=name, messages=(Message(role="user", content="?"),))
    return Comparison(prompt=prompt, first=first, second=second)


def judged(settings: Scripted, *comparisons: Comparison) -> list[Verdict]:
    async def all_of_them() -> list[Verdict]:
        return [verdict async for verdict in compare(comparisons, settings=settings)]

    return asyncio.run(all_of_them())


@pytest.mark.parametrize(
    ("prefer", "text", "p_first", "consistent"),
    [
        ("longest", None, 0.0, True),
        ("shortest", None, 1.0, True),
        ("contains", "much", 0.0, True),
        ("contains", "nowhere", 0.5, True),
        ("none", None, 0.5, True),
        ("first", None, 0.5, False),
        ("second", None, 0.5, False),
    ],
)
def test_each_preference_is_what_it_is_called(prefer, text, p_first, consistent):
    (verdict,) = judged(scripted(prefer, text=text), comparison())
    assert (verdict.p_first, verdict.consistent) == (p_first, consistent)
    assert verdict.status == ("tie" if p_first == 0.5 else "ok")


def test_a_judge_of_places_looks_like_one():
    (first,) = judged(scripted("first"), comparison())
    (second,) = judged(scripted("second", p=0.75), comparison())
    assert first.looks == (1.0, 1.0) and second.looks == (0.25, 0.25)


def test_doubt_and_price_are_as_set():
    (verdict,) = judged(scripted(p=0.75, cost_usd=0.01), comparison())
    assert verdict.p_first == 0.25 and verdict.cost == 0.01


def test_failures_and_noise_have_their_shares_and_never_change():
    many = [comparison(str(i)) for i in range(2000)]
    settings = scripted(statuses={"refusal": 0.1, "malformed": 0.05}, noise=0.2)
    verdicts = judged(settings, *many)
    assert verdicts == judged(settings, *many)
    share = {s: sum(v.status == s for v in verdicts) / 2000 for s in ("refusal", "malformed")}
    assert share["refusal"] == pytest.approx(0.1, abs=0.02)
    assert share["malformed"] == pytest.approx(0.05, abs=0.02)
    good = [v for v in verdicts if v.status == "ok"]
    assert sum(v.p_first == 1.0 for v in good) / len(good) == pytest.approx(0.2, abs=0.03)


def test_a_swap_mirrors_every_verdict():
    settings = scripted(statuses={"failed": 0.3}, noise=0.3, p=0.75)
    for number in range(50):
        one = comparison(str(number))
        verdict, mirrored = judged(settings, one, one.swap())
        assert verdict.status == mirrored.status
        if verdict.p_first is not None:
            assert verdict.p_first == 1 - mirrored.p_first


def test_a_lone_surrogate_is_judged_too():
    assert judged(scripted(), comparison(first="\ud800"))[0].status == "ok"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prefer": "best"}, "judge.prefer=best: must be one of longest"),
        ({"prefer": "contains"}, "type judge.text="),
        ({"statuses": {"ok": 0.1}}, "judge.statuses.ok=0.1: no such status; there are"),
        ({"statuses": {"failed": 0.6, "refusal": 0.6}}, "sum of judge.statuses=1.2"),
        ({"p": 0.3}, "judge.p=0.3: must be at least 0.5"),
        ({"noise": 2.0}, "judge.noise=2.0: must be"),
    ],
)
def test_a_script_that_makes_no_sense_is_one_line(changes, says):
    with pytest.raises(ConfigError, match=r"\A[^\n]*\Z") as caught:
        scripted(**{"prefer": "longest", **changes})
    assert says in str(caught.value)
