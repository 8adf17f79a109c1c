"""What a ledger holds is believed only where an answer of the form can have led to it."""

from dataclasses import replace

import pytest

from align.judge.entries import Judgment
from align.judge.estimate import estimate
from align.judge.forms import listwise, pairwise
from align.judge.request import Capability, able_of, sound
from tests.judge.asking import judge_all, openai_settings, pairs
from tests.judge.fake_server import FakeServer

FORM = pairwise(scale="three", criteria=("tone",))
GOOD = {"label": "A", "criteria": {"tone": "B"}, "probabilities": {"A": 0.75, "B": 0.25}}


def held(**answer: object) -> Judgment:
    return Judgment(status="ok", answer={"status": "ok", **answer}, parser=1, tokens=0, cost=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"label": ["A"]},
        {"label": {"A": 1}},
        {"label": None},
        {"criteria": ["x"]},
        {"criteria": {"tone": ["A"]}},
        {"criteria": "tone"},
        {"criteria": 5},
        {"probabilities": {"A": 1.0, "B": 1.0, "tie": 1.0}},
        {"probabilities": {"A": 0.5}},
        {"probabilities": {"A": True}},
        {"probabilities": {"A": float("nan")}},
        {"probabilities": ["A"]},
        {"probabilities": 1},
        {"ranking": 5},
        {"status": ["ok"]},
    ],
)
def test_a_foreign_judgment_of_another_shape_is_none(changes):
    assert sound(held(**GOOD), FORM) is not None
    assert sound(held(**{**GOOD, **changes}), FORM) is None


def test_a_foreign_ranking_of_another_shape_is_none():
    assert sound(held(ranking=["B", "A"]), listwise(2)) is not None
    for ranking in ([["A"], "B"], [1, "A"], {"A": 1}, "A", 7):
        assert sound(held(ranking=ranking), listwise(2)) is None


def test_the_settings_narrow_what_an_endpoint_can_do(tmp_path):
    found = Capability(mode="json_schema", logprobs=True, limit="max_tokens", temperature=True)
    plain = openai_settings(tmp_path, temperature=0.0)
    assert able_of(plain, found) == found
    less = openai_settings(tmp_path, answer="line", logprobs=False, temperature=None)
    wanted = replace(found, mode="line", logprobs=False, temperature=False)
    assert able_of(less, found) == wanted
    assert not able_of(plain, replace(found, logprobs=False)).logprobs


@pytest.mark.parametrize(
    "changes", [{"logprobs": False}, {"temperature": None}, {"answer": "line"}]
)
def test_what_was_answered_is_known_to_the_estimate_whatever_was_wanted(tmp_path, changes):
    with FakeServer(tmp_path) as server:
        settings = openai_settings(tmp_path, server.url, **changes)
        judge_all(pairs(3), settings)
    found = estimate(pairs(3), settings=settings)
    assert (found.requests, found.known, found.cost) == (6, 6, 0)


def test_what_is_too_long_and_dropped_is_not_estimated(tmp_path):
    settings = openai_settings(tmp_path, on_overflow="drop", max_chars=100)
    long = replace(pairs(1)[0], first="x" * 101)
    found = estimate([*pairs(2), long], settings=settings)
    assert (found.comparisons, found.requests) == (3, 4)
