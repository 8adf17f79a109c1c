"""The nouns: unknown fields are kept, JSON and back is the identity, swapping twice is nothing."""

import pytest

from align.errors import DataError
from align.records import Candidate, Comparison, Message, Preference, Prompt, Verdict


def test_unknown_fields_are_kept_in_meta():
    prompt = Prompt.from_json({"prompt": "Hi", "topic": "greeting", "meta": {"a": 1}}, number=4)
    assert prompt.meta == {"topic": "greeting", "a": 1}
    assert prompt.id == "0000004"
    assert prompt.messages == (Message(role="user", content="Hi"),)


def test_a_preference_survives_json_and_two_swaps():
    line = {"id": "7", "prompt": "?", "chosen": "a", "rejected": "b", "p": 0.75, "margin": 2}
    preference = Preference.from_json(line)
    assert Preference.from_json(preference.to_json()) == preference
    assert preference.swap().chosen == "b" and preference.swap().p == 0.25
    assert preference.swap().swap() == preference


def test_plain_responses_are_read_as_candidates():
    candidate = Candidate.from_json({"prompt": "?", "responses": ["a", "b"]})
    assert [r.text for r in candidate.responses] == ["a", "b"]
    assert Candidate.from_json(candidate.to_json()) == candidate


def test_a_swapped_comparison_carries_its_indices_along():
    comparison = Comparison(
        prompt=Prompt.from_json({"prompt": "?"}),
        first="a",
        second="b",
        first_index=3,
        second_index=5,
    )
    swapped = comparison.swap()
    assert (swapped.first, swapped.first_index, swapped.second_index) == ("b", 5, 3)
    assert swapped.swap() == comparison


@pytest.mark.parametrize(("p", "kept"), [(1 + 1e-9, 1.0), (-1e-9, 0.0), (0.25, 0.25)])
def test_a_probability_is_held_to_its_range_where_rounding_missed_it(p, kept):
    given = {"id": "1", "first": 0, "second": 1, "consistent": True, "judge": "j", "status": "ok"}
    assert Verdict(**given, p_first=p).p_first == kept
    for wrong in (1.1, -0.5, float("nan")):
        with pytest.raises(ValueError, match="not a probability"):
            Verdict(**given, p_first=wrong)
    with pytest.raises(ValueError, match="margin is -1"):
        Verdict(**given, p_first=1.0, margin=-1.0)


@pytest.mark.parametrize(("status", "p"), [("ok", None), ("refusal", 0.5), ("perhaps", 0.5)])
def test_a_failure_can_carry_no_probability_and_a_verdict_needs_one(status, p):
    with pytest.raises(ValueError, match="verdict"):
        Verdict(id="1", first=0, second=1, status=status, p_first=p, consistent=True, judge="x")


def test_meta_that_is_no_object_is_refused():
    with pytest.raises(DataError, match='"meta" is a str, not an object'):
        Prompt.from_json({"prompt": "q", "meta": "abc"})


@pytest.mark.parametrize(
    ("response", "more", "names"),
    [
        ({}, {"sampler": "gpt-4"}, '"sampler" is a str, not an object'),
        ({}, {"sampler": []}, '"sampler" is a list'),
        ({}, {"meta": []}, '"meta" is a list'),
        ({"seed": 1e999}, {}, '"seed" is inf, not a number'),
        ({"seed": 0.5}, {}, '"seed" is 0.5, not a whole number'),
        ({"seed": True}, {}, '"seed" is True'),
        ({"tokens": 5}, {}, '"tokens" is 5, not a list'),
        ({"tokens": ["a"]}, {}, '"tokens" is'),
        ({"tokens": "abc"}, {}, '"tokens" is'),
        ({"logprob": "x"}, {}, "\"logprob\" is 'x', not a number"),
        ({"logprob": 10**400}, {}, '"logprob" is 1000'),
        ({"logprob": 10**5000}, {}, '"logprob" is too many digits'),
        ({"finish": 1}, {}, '"finish" is 1, not a string'),
    ],
)
def test_what_does_not_fit_in_a_candidate_is_named_by_its_field(response, more, names):
    line = {"prompt": "?", "responses": [{"text": "a", **response}], **more}
    with pytest.raises(DataError) as error:
        Candidate.from_json(line)
    assert names in str(error.value)


def test_nulls_of_a_candidate_are_what_it_is_without_them():
    names = ("tokens", "logprob", "seed")
    line = {"prompt": "?", "responses": [{"text": "a", **dict.fromkeys(names)}], "sampler": None}
    plain = Candidate.from_json({"prompt": "?", "responses": ["a"]})
    assert Candidate.from_json(line) == plain
    assert Candidate.from_json({"prompt": "?", "responses": [{"text": "a", "seed": 2.0}]})
