"""Probabilities come from the token at the verdict, or not at all."""

import json
import math
from typing import Any

import pytest

from align.judge import forms
from align.judge.answers import OK, read

TWO, THREE = forms.pairwise(scale="two"), forms.pairwise(scale="three")
MARK, TO_FIVE = forms.scalar(lowest=1, highest=10), forms.scalar(lowest=1, highest=5)


def entry(text: str, top: dict[str, float] | None = None, **more: Any) -> dict[str, Any]:
    """A token that was sampled with the probability that `top` gives it, else with 1."""
    shares = top or {}
    found: dict[str, Any] = {"token": text, "logprob": log(shares.get(text, 1.0)), **more}
    if top is not None:
        found["top_logprobs"] = [{"token": t, "logprob": log(p)} for t, p in top.items()]
    return found


def log(p: float) -> float:
    return math.log(p) if p else -9999.0


def probabilities(content: str, entries: Any, form: forms.Form = TWO) -> dict[str, float]:
    choice = {"message": {"content": content}, "logprobs": {"content": entries}}
    reading = read({"choices": [choice]}, form)
    assert reading.status == OK
    return dict(reading.probabilities)


AB = {"A": 0.3, "B": 0.1, "C": 0.6}  # renormalised over A and B: 3/4 and 1/4
QUARTERS = {"A": pytest.approx(0.75), "B": pytest.approx(0.25)}


def top(before: str = "", after: str = "") -> dict[str, float]:
    return {f"{before}{text}{after}": p for text, p in AB.items()}


@pytest.mark.parametrize(
    ("content", "entries"),
    [
        ("A", [entry("A", top())]),
        ("A", [entry(" A", top(" "))]),  # the endpoint took the space off
        ("A", [entry("A", top()), entry("<|im_end|>")]),
        ("A", [entry("A", top()), entry("</s>"), entry("\n")]),
        ("Verdict: A", [entry("Verdict"), entry(":"), entry(" A", top(" "))]),
        ("Verdict: A", [entry("Verdict:"), entry(" "), entry("A", top())]),
        ("Verdict: Response A", [entry("Verdict:"), entry(" Response"), entry(" A", top(" "))]),
        ("Verdict: Assistant A", [entry("Verdict: Assistant"), entry(" A", top(" "))]),
        ("Verdict: A\nA is", [entry("Verdict:"), entry(" A", top(" ")), entry("\nA is")]),
        ("Verdict: A\nyes", [entry("Verdict:"), entry(" A", top(" ")), entry("\n"), entry("yes")]),
        ("**Verdict:** A", [entry("**"), entry("Verdict"), entry(":**"), entry(" A", top(" "))]),
        ('{"verdict": "A"}', [entry('{"'), entry("verdict"), entry('":'), entry(' "'),
                              entry("A", top()), entry('"}')]),
        ('{"verdict": "A"}', [entry('{"verdict":'), entry(' "A', top(' "')), entry('"}')]),
        ('{"verdict": "A"}', [entry('{"verdict": "'), entry('A"', top("", '"')), entry("}")]),
        ('{"verdict": "A"}', [entry('{"verdict": "'), entry('A"}', top("", '"}'))]),
        ('{"verdict":"A"}', [entry('{"verdict":'), entry('"A"', top('"', '"')), entry("}")]),
        ('{"reason": "A leads", "verdict": "A"}',
         [entry('{"reason": "'), entry("A", {"A": 0.5, "B": 0.5}), entry(' leads", "verdict": "'),
          entry("A", top()), entry('"}')]),
        # The endpoint took the thinking off.
        ("Verdict: A", [entry("<think>"), entry("B", {"B": 1.0}), entry("</think>"), entry("\n\n"),
                        entry("Verdict:"), entry(" A", top(" "))]),
        ("<think>B</think>Verdict: A", [entry("<think>"), entry("B", {"B": 1.0}),
                                        entry("</think>Verdict:"), entry(" A", top(" "))]),
        ("Verdict: A", [entry("\ufffd"), entry("Verdict:"), entry(" A", top(" "))]),
        ("Verdict: A\né", [entry("Verdict:"), entry(" A", top(" ")),
                           entry("\ufffd", bytes=[10, 0xC3]), entry("\ufffd", bytes=[0xA9])]),
        ("Verdict: A", [entry(""), entry("Verdict:"), entry(" A", top(" ")), entry("")]),
    ],
)  # fmt: skip
def test_the_token_at_the_verdict_is_found_however_the_text_is_split(content, entries):
    assert probabilities(content, entries) == QUARTERS


def test_renormalisation_by_hand():
    """0.5 + 0.1 for A in two spellings, 0.2 for B, 0.05 + 0.05 for tie: of 0.9 in all."""
    shares = {" A": 0.5, " a": 0.1, " B": 0.2, " tie": 0.05, " t": 0.05, " the": 0.1}
    found = probabilities("Verdict: A", [entry("Verdict:"), entry(" A", shares)], THREE)
    assert found == {"A": pytest.approx(6 / 9), "B": pytest.approx(2 / 9),
                     "tie": pytest.approx(1 / 9)}  # fmt: skip


def test_a_label_in_pieces_counts_by_its_beginning():
    pieces = [entry('{"verdict": "'), entry("t", {"t": 0.6, "A": 0.3, "B": 0.1}), entry("ie"),
              entry('"}')]  # fmt: skip
    found = probabilities('{"verdict": "tie"}', pieces, THREE)
    assert found == {"A": pytest.approx(0.3), "B": pytest.approx(0.1), "tie": pytest.approx(0.6)}


def test_the_probabilities_count_even_where_the_less_likely_label_was_drawn():
    choice = {"message": {"content": "B"}, "logprobs": {"content": [entry("B", top())]}}
    reading = read({"choices": [choice]}, TWO)
    assert reading.label == "B" and reading.probabilities == QUARTERS


def test_the_written_token_counts_once_and_even_where_the_list_lacks_it():
    assert probabilities("A", [entry("A", {"A": 0.5, "B": 0.5})]) == {"A": 0.5, "B": 0.5}
    absent = entry("A", {"B": 0.2})
    absent["logprob"] = math.log(0.6)
    assert probabilities("A", [absent]) == QUARTERS


def test_what_is_not_in_the_list_at_all_weighs_nothing():
    assert probabilities("A", [entry("A", {"A": 1.0, "B": 0.0, "<|im_end|>": 0.0})]) == {
        "A": 1.0, "B": 0.0,
    }  # fmt: skip


def test_marks_of_two_digits_are_kept_apart_where_the_tokenizer_does():
    shares = {"8": 0.5, "10": 0.3, "1": 0.2}
    found = probabilities("8", [entry("8", shares)], MARK)
    assert (found["8"], found["10"], found["1"]) == pytest.approx((0.5, 0.3, 0.2))
    assert sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("content", "entries"),
    [
        ("8", [entry("8", {"8": 0.7, "1": 0.3})]),  # 1 may go on as 10
        ("10", [entry("1", {"1": 0.9, "9": 0.1}), entry("0", {"0": 1.0})]),
        ("10", [entry("1", {"1": 0.9, "10": 0.1}), entry("0", {"0": 1.0})]),
        ("1", [entry("1", {"1": 0.9, "2": 0.1})]),
    ],
)
def test_a_digit_that_may_go_on_gives_no_probabilities(content, entries):
    assert probabilities(content, entries, MARK) == {}


def test_a_digit_that_hardly_weighs_or_cannot_go_on_disturbs_nothing():
    found = probabilities("8", [entry("8", {"8": 0.75, "9": 0.245, "1": 0.005})], MARK)
    assert found["8"] == pytest.approx(0.75 / 0.995) and found["1"] == found["10"] == 0
    assert probabilities("1", [entry("1", {"1": 0.5, "5": 0.5})], TO_FIVE)["1"] == 0.5


@pytest.mark.parametrize(
    "entries",
    [
        None,
        [],
        {},
        "A",
        [None],
        [1, 2],
        [{}],
        [{"token": None}],
        [{"token": "A", "logprob": -0.1}],  # no alternatives: what was written is certain anyway
        [{"token": "A", "logprob": -0.1, "top_logprobs": None}],
        [{"token": "A", "logprob": -0.1, "top_logprobs": []}],
        [{"token": "A", "logprob": -0.1, "top_logprobs": {}}],
        [entry("▁A", {"▁A": 1.0})],  # pieces that do not spell the text
        [entry("\u0120A", {"\u0120A": 1.0})],
        [entry("B", top())],
        [entry("A", top()), entry("B")],
        [entry("A", top()), entry(" and so on")],
        [entry("A", {"A": 0.0, "B": 0.0})],
        [entry("A", {"x": 0.5}) | {"logprob": None}],
        [entry("A", {"x": 0.5}) | {"logprob": float("nan")}],
        [entry("A", {"x": 0.5}) | {"logprob": True}],
        [entry("A", {"x": 0.5}) | {"logprob": -(10**400)}],
        [entry("A", {"x": 0.5}) | {"logprob": float("-inf")}],
    ],
)
def test_what_does_not_fit_gives_no_probabilities_rather_than_wrong_ones(entries):
    assert probabilities("A", entries) == {}


@pytest.mark.parametrize("inner", ["none", "A"])
def test_a_name_that_stands_twice_leaves_the_place_unsure(inner):
    before = '{"notes": {"verdict": "'
    after = [entry('"}, "verdict": "'), entry("A", top()), entry('"}')]
    tokens = [entry(before), entry(inner, {"A": 0.5, "B": 0.5}), *after]
    assert probabilities(f'{before}{inner}"}}, "verdict": "A"}}', tokens) == {}


def test_strange_alternatives_are_passed_over():
    odd = entry("A", top())
    odd["top_logprobs"] += [None, 1, [], {}, {"token": 3, "logprob": 0}, {"token": "B "},
                            {"token": "\ud800", "logprob": -1.0}]  # fmt: skip
    assert probabilities("A", [odd]) == QUARTERS
    assert probabilities("A", json.loads(json.dumps([odd]))) == QUARTERS
