"""A jury weighs its members by what they are worth, leaves out those that cannot say, and ends as a
whole.
"""

import asyncio
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from align.artifacts import HashCache
from align.config import read_config
from align.errors import ConfigError, JudgeError
from align.judge.jury import compare, opened, pooled, voters
from align.judge.settings import Jury
from align.judge.verdicts import Group, without
from align.records import Comparison, Verdict
from align.shapes import shape
from align.stages.against_people import measure
from align.stages.judged_pairs import JudgedPair
from tests.judge.asking import judge_all, longer, openai_settings, pairs
from tests.judge.fake_server import FakeServer
from tests.judge.test_scripted import comparison, judged, scripted
from tests.test_config import composed


def jury(members: dict[str, Any], **changes: Any) -> Jury:
    usual: dict[str, Any] = {"weights": None, "agreement": None, "vote": "mean", "quorum": None}
    return Jury(name="jury", module=None, members=members, **{**usual, **changes})


def ask(settings: Jury, comparisons: Any) -> list[Verdict]:
    async def all_of_them() -> list[Verdict]:
        return [verdict async for verdict in compare(comparisons, settings=settings)]

    return asyncio.run(all_of_them())


LONG, SHORT, FIRST = scripted("longest"), scripted("shortest"), scripted("first")
SURE = scripted("longest", p=0.99)
UNSURE = scripted("shortest", p=0.6)
OUT = scripted(statuses={"refusal": 1.0})


def test_the_weighted_mean_decides():
    settings = jury({"a": LONG, "b": SHORT}, weights={"a": 1.0, "b": 3.0})
    (verdict,) = ask(settings, [comparison()])
    assert verdict.p_first == 0.75 and verdict.status == "ok"
    assert verdict.judge == settings.judge == "jury(a,b)" and verdict.scores == ()


def test_without_weights_all_count_alike_and_a_draw_is_a_tie():
    (verdict,) = ask(jury({"a": LONG, "b": SHORT}), [comparison()])
    assert verdict.status == "tie" and verdict.p_first == 0.5
    three = jury({"a": LONG, "b": SHORT, "c": SHORT})
    assert ask(three, [comparison()])[0].p_first == pytest.approx(2 / 3)


def test_log_odds_let_a_sure_member_outweigh_two_unsure_ones():
    members = {"a": SURE, "b": UNSURE, "c": UNSURE}
    (mean,) = ask(jury(members), [comparison()])
    (odds,) = ask(jury(members, vote="logodds"), [comparison()])
    assert mean.p_first == pytest.approx((0.01 + 0.6 + 0.6) / 3)
    # ln(0.99 / 0.01) = 4.595, ln(0.6 / 0.4) = 0.405; (0.811 - 4.595) / 3 = -1.261
    assert odds.p_first == pytest.approx(1 / (1 + math.exp(1.261)), abs=1e-3)
    shares = {"a": 0.5, "b": 0.5}
    assert pooled({"a": 1.0, "b": 0.0}, shares, vote="logodds") == 0.5, "certainty is held to 0.99"
    assert pooled({"a": 1.0, "b": 1.0}, shares, vote="logodds") == pytest.approx(0.99)


def agreement(folder: Path, name: str, *, right: int, of: int = 10) -> str:
    """An agreement.json as the command writes it, of a judge that says what people say so often."""
    pairs = [
        JudgedPair(
            id=str(i), prompt="?", first="short", second="much longer",
            human={"people": "second" if i < right else "first", "nobody": None},
            verdict=judged(LONG, comparison(str(i)))[0],
        )
        for i in range(of)
    ]  # fmt: skip
    path = folder / f"{name}.json"
    report = measure(pairs, judge_name=name, seed=0, resamples=100)
    path.write_text(json.dumps(report.to_json()))
    return str(path)


def test_a_weight_is_the_log_odds_of_the_agreement_with_people(tmp_path):
    files = {n: agreement(tmp_path, n, right=r) for n, r in {"a": 9, "b": 7, "c": 10}.items()}
    settings = jury(dict.fromkeys("abc", LONG), agreement=files)
    assert voters(settings) == pytest.approx(
        {"a": math.log(9), "b": math.log(7 / 3), "c": math.log(99)}
    )


def test_a_member_that_agrees_no_more_than_chance_is_not_even_asked(tmp_path):
    files = {n: agreement(tmp_path, n, right=r) for n, r in {"a": 9, "b": 4}.items()}
    costly = scripted("shortest", cost_usd=1.0)
    (verdict,) = ask(jury({"a": LONG, "b": costly}, agreement=files), [comparison()])
    assert verdict.p_first == 0.0 and verdict.cost == 0.0
    with pytest.raises(ConfigError, match=r"judge\.agreement: no member has a weight above 0"):
        jury({"a": LONG, "b": LONG}, agreement=dict.fromkeys("ab", files["b"]))


def test_who_has_no_verdict_is_left_out_and_too_few_left_give_none():
    members = {"a": OUT, "b": LONG, "c": LONG}
    (verdict,) = ask(jury(members), [comparison()])
    assert verdict.p_first == 0.0, "of three, two are a quorum"
    (verdict,) = ask(jury(members, quorum=3), [comparison()])
    assert (verdict.status, verdict.p_first) == ("failed", None)
    (verdict,) = ask(jury({"a": OUT, "b": OUT, "c": LONG}), [comparison()])
    assert verdict.status == "failed"
    assert ask(jury(members, quorum=1), [comparison()])[0].status == "ok"


def test_a_reason_that_all_share_is_the_jurys():
    assert ask(jury({"a": OUT, "b": OUT}), [comparison()])[0].status == "refusal"
    mixed = {"a": OUT, "b": scripted(statuses={"overflow": 1.0})}
    assert ask(jury(mixed), [comparison()])[0].status == "failed"


def test_consistent_is_what_most_of_the_weight_is():
    members = {"a": LONG, "b": FIRST}
    for weight, consistent in ((2.0, True), (1.0, False), (0.5, False)):
        settings = jury(members, weights={"a": weight, "b": 1.0})
        assert ask(settings, [comparison()])[0].consistent is consistent


def test_cost_is_the_members_together_also_without_a_verdict():
    members = {
        n: scripted(statuses={"failed": f}, cost_usd=0.25) for n, f in (("a", 0.0), ("b", 1.0))
    }
    (verdict,) = ask(jury(members), [comparison()])
    assert verdict.status == "failed" and verdict.cost == 0.5


def test_verdicts_come_in_the_order_asked_from_a_list_and_from_what_is_read_only_once():
    many = [comparison(str(i)) for i in range(100)]
    settings = jury({"a": LONG, "b": scripted("shortest", noise=0.5)})
    verdicts = ask(settings, many)
    assert [v.id for v in verdicts] == [c.prompt.id for c in many]
    assert verdicts == ask(settings, iter(many))


def test_a_jury_sits_in_a_jury():
    inner = jury({"x": LONG, "y": LONG})
    (verdict,) = ask(
        jury({"inner": inner, "c": SHORT}, weights={"inner": 3, "c": 1}), [comparison()]
    )
    assert verdict.p_first == 0.25 and verdict.judge == "jury(c,inner)"


def test_a_jury_settles_what_another_judge_escalates():
    async def settled() -> list[Verdict]:
        inner = jury({"x": LONG, "y": LONG})
        async with opened(jury({"a": inner, "b": SHORT, "c": SHORT})) as bench:
            return await bench.settle(Group(comparisons=(comparison(), comparison("1"))))

    verdicts = asyncio.run(settled())
    assert [(v.id, round(v.p_first or 0, 3)) for v in verdicts] == [("0", 0.667), ("1", 0.667)]


@dataclass(frozen=True)
class Own:
    """Settings of a judge of one's own."""

    name: str
    module: str
    behaviour: str

    @property
    def judge(self) -> str:
        return self.name


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A judge of one's own, which writes down what becomes of it."""
    module = ModuleType("own_judge")
    events: list[str] = []

    async def compare(comparisons: Any, *, settings: Own) -> Any:
        try:
            for number, asked in enumerate(comparisons):
                if settings.behaviour == "fails" and number == 3:
                    raise JudgeError("own: broke")
                if settings.behaviour == "slow" and number == 3:
                    await asyncio.sleep(60)
                if settings.behaviour == "skips" and number % 2:
                    continue
                await asyncio.sleep(0)
                yield without(
                    asked.swap() if settings.behaviour == "confused" else asked,
                    status="refusal", judge="own",
                )  # fmt: skip
            await asyncio.sleep(0)
            events.append(f"{settings.behaviour} finished")
        finally:
            events.append(f"{settings.behaviour} closed")

    module.compare = compare
    module.events = events
    monkeypatch.setitem(sys.modules, "own_judge", module)
    yield module


def of_own(behaviour: str) -> Own:
    return Own(name="own", module="own_judge", behaviour=behaviour)


def test_when_one_fails_all_are_closed_and_what_was_said_before_is_kept(own):
    settings = jury({"a": of_own("fails"), "b": of_own("slow"), "c": LONG})
    said: list[Verdict] = []

    async def listen() -> None:
        async for verdict in compare([comparison(str(i)) for i in range(9)], settings=settings):
            said.append(verdict)

    with pytest.raises(JudgeError, match="own: broke"):
        asyncio.run(asyncio.wait_for(listen(), timeout=5))
    assert [v.id for v in said] == ["0", "1", "2"]
    assert sorted(own.events) == ["fails closed", "slow closed"]


def test_members_end_their_work_before_the_jury_does(own):
    ask(jury({"a": of_own("calm"), "b": LONG}), [comparison()])
    assert own.events == ["calm finished", "calm closed"]


def test_a_listener_who_leaves_early_closes_all(own):
    async def first_only() -> None:
        stream = compare(
            [comparison(str(i)) for i in range(9)], settings=jury({"a": of_own("calm"), "b": LONG})
        )
        await anext(stream)
        await stream.aclose()

    asyncio.run(first_only())
    assert own.events == ["calm closed"]


def test_a_member_may_pass_comparisons_over(own):
    settings = jury({"a": of_own("skips"), "b": LONG, "c": LONG})
    verdicts = ask(settings, [comparison(str(i)) for i in range(5)])
    assert [v.p_first for v in verdicts] == [0.0] * 5


def test_a_member_that_answers_something_else_is_named(own):
    with pytest.raises(JudgeError, match=r"judge\.members\.a: gave a verdict on prompt 0 that was"):
        ask(jury({"a": of_own("confused"), "b": LONG}), [comparison()])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"members": {"a": LONG}}, r"judge.members=['a']: a jury has at least two"),
        ({"members": {}}, "judge.members=[]: a jury has at least two; type +judge@judge.members"),
        ({"members": {"a": LONG, "b": None}}, "judge.members.b=none: is no judge"),
        ({"weights": {"a": 1, "x": 1}}, "judge.weights.x: no member is called so; members are a"),
        ({"weights": {"a": 1}}, "judge.weights: has none for b; type +judge.weights.b=VALUE"),
        ({"weights": {"a": 0, "b": 0}}, "judge.weights: no member has a weight above 0 (a 0, b 0)"),
        ({"weights": {"a": -1, "b": 2}}, "judge.weights.a=-1: must be at least 0"),
        ({"weights": {"a": math.nan, "b": 2}}, "judge.weights.a=nan: must be at least 0"),
        ({"weights": {"a": math.inf, "b": 2}}, "judge.weights.a=inf: must be at least 0 and"),
        ({"weights": {"a": 1, "b": 1}, "agreement": {"a": "x", "b": "y"}}, "give one of them"),
        ({"agreement": {"a": "nowhere", "b": "nowhere"}}, "judge.agreement.a=nowhere: no such"),
        ({"agreement": {"a": __file__, "b": __file__}}, "no report of an agreement"),
        ({"vote": "loudest"}, "judge.vote=loudest: must be one of mean, logodds"),
        ({"quorum": 3}, "judge.quorum=3: must be at least 1 and at most 2"),
        ({"quorum": 2, "weights": {"a": 1, "b": 0}}, "judge.quorum=2: must be at least 1"),
    ],
)  # fmt: skip
def test_a_jury_that_cannot_sit_is_one_line(changes, says):
    with pytest.raises(ConfigError, match=r"\A[^\n]*\Z") as caught:
        jury(**{"members": {"a": LONG, "b": SHORT}, **changes})
    assert says in str(caught.value)


def test_members_are_composed_on_the_command_line_and_agreement_counts_by_content(tmp_path):
    file = agreement(tmp_path, "a", right=9)
    words = ["recipe=dpo", "judge=jury", "+judge@judge.members.a=scripted",
             "judge.members.a.prefer=first", "+judge@judge.members.b=rubric",
             f"judge.agreement={{a: {file}, b: {file}}}"]  # fmt: skip
    config = read_config(composed(*words))
    assert config.judge.members["a"].prefer == "first" and config.judge.judge == "jury(a,b)"
    hashes = HashCache(tmp_path / "hashes.json")
    before = shape(config.judge, hashes)
    assert json.dumps(before) and file not in json.dumps(before)
    agreement(tmp_path, "a", right=7)
    assert shape(config.judge, hashes) != before
    weighed = composed(*words[:5], "judge.weights={a: 2, b: 1}")
    assert read_config(weighed).judge.weights == {"a": 2.0, "b": 1.0}


def test_a_swap_mirrors_the_jury():
    settings = jury({"a": SURE, "b": UNSURE}, vote="logodds")
    one: Comparison = comparison()
    verdict, mirrored = ask(settings, [one, one.swap()])
    assert verdict.p_first == pytest.approx(1 - mirrored.p_first)


def test_two_endpoints_and_a_script_judge_side_by_side(tmp_path):
    """One ledger, in which each member has its own account, so that nothing is asked twice."""
    many = pairs(60)
    with FakeServer(tmp_path, latency=0.05) as slow, FakeServer(tmp_path) as quick:
        members = {
            "slow": replace(openai_settings(tmp_path, slow.url), identity="slow"),
            "quick": replace(openai_settings(tmp_path, quick.url), identity="quick"),
            "script": scripted("longest"),
        }
        verdicts = ask(jury(members), many)
        first = [server.stats()["received"] for server in (slow, quick)]
        again = ask(jury(members), many)
        assert [server.stats()["received"] for server in (slow, quick)] == first, "nothing twice"
    assert [v.p_first > 0.5 for v in verdicts] == [bool(longer(pair)) for pair in many]
    assert [v.id for v in verdicts] == [pair.prompt.id for pair in many]
    assert all(v.cost > 0 and v.tokens > 0 for v in verdicts) and again == verdicts


def test_a_refused_key_ends_the_whole_jury_in_one_line(tmp_path):
    with FakeServer(tmp_path, faults={"401": 1.0}) as closed, FakeServer(tmp_path) as open_:
        members = {
            "a": replace(openai_settings(tmp_path, closed.url), identity="a"),
            "b": replace(openai_settings(tmp_path, open_.url), identity="b"),
        }
        with pytest.raises(JudgeError, match=r"\A[^\n]*\Z"):
            ask(jury(members), pairs(60))


def test_an_endpoint_escalates_to_a_jury(tmp_path):
    """A judge of places disagrees with itself on every pair, so the jury has the word."""
    with FakeServer(tmp_path, answer="first") as server:
        settings = openai_settings(tmp_path, server.url)
        escalate = jury({"a": LONG, "b": scripted("longest", cost_usd=1.0)})
        settings = replace(settings, on_disagreement="escalate", escalate=escalate)
        many = pairs(6)
        verdicts = judge_all(many, settings)
    assert [v.p_first for v in verdicts] == [longer(pair) for pair in many]
    assert {v.judge for v in verdicts} == {"jury(a,b)"} and all(v.cost > 1.0 for v in verdicts)
