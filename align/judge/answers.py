"""From the bytes that an endpoint sent to what the judge said; never raises on what it reads.

A better parser raises `PARSER`: answers that are in the ledger are then read again, at no cost.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.judge.forms import LISTWISE, SCALAR, Form
from align.judge.objects import Parsed, beside, in_objects, parsed, unbroken
from align.judge.spoken import (
    Found,
    after_thinking,
    before_the_answer,
    lone,
    ranked,
    second_thoughts,
    tagged,
)
from align.judge.token_logprobs import probabilities
from align.unseen import NARROW

PARSER = 3
OK, REFUSAL, MALFORMED = "ok", "refusal", "malformed"
LONGEST = 100_000  # characters behind the thinking; what is longer is no verdict
MOST_TOKENS = 1 << 40  # what says more is no count


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one answer says.

    Attributes:
        status: ok, refusal or malformed; the rest is empty unless ok.
        label: the verdict or the score, as one of the form's labels.
        ranking: the labels from best to worst, of a listwise answer.
        probabilities: of each label at the place of the verdict, renormalised, where the endpoint
            gave log-probabilities. They count even where another label than the likeliest was
            written: that one was drawn, they are what it was drawn from.
        criteria: name to label.
        why: what was wrong, for people.
    """

    status: str
    label: str | None = None
    ranking: tuple[str, ...] = ()
    probabilities: Mapping[str, float] = field(default_factory=dict)
    criteria: Mapping[str, str] = field(default_factory=dict)
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if value}

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Reading":
        return cls(**{**line, "ranking": tuple(line.get("ranking", ()))})


@dataclass(frozen=True, kw_only=True)
class Usage:
    """Tokens that were charged, as the endpoint counts them."""

    prompt: int
    completion: int


def completion(raw: bytes) -> dict[str, Any] | None:
    """The chat completion that the bytes hold, None where they hold none."""
    try:
        body = json.loads(raw)
        message = body["choices"][0]["message"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        return None
    return body if isinstance(message, dict) else None


def usage(body: Mapping[str, Any]) -> Usage | None:
    """What the endpoint says it read and wrote, None where it says nothing usable."""
    told = body.get("usage")
    if not isinstance(told, Mapping):
        return None
    prompt, completion = told.get("prompt_tokens"), told.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int:
        return None
    if not 0 <= prompt < MOST_TOKENS or not 0 <= completion < MOST_TOKENS:
        return None
    return Usage(prompt=prompt, completion=completion)


def read(body: Mapping[str, Any], form: Form) -> Reading:
    """The reading of one chat completion (as `completion` gave it).

    Whatever looks like an answer must agree: two that differ are malformed, for nothing tells which
    one is the judge's own and which one it quotes.
    """
    choice = body["choices"][0]
    message, ending = choice["message"], choice.get("finish_reason")
    if message.get("refusal") or ending == "content_filter":
        return Reading(status=REFUSAL, why=str(message.get("refusal") or "content filter")[:200])
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        return Reading(status=MALFORMED, why="no content")
    start = after_thinking(content)
    if start is None or len(content) - start > LONGEST:
        why = "no end of its thinking" if start is None else f"{len(content) - start} characters"
        return Reading(status=MALFORMED, why=f"{why} in {content[:100]!r}")
    narrow, cut = content[start:].translate(NARROW), ending == "length"
    objects = parsed(narrow, cut=cut)
    whole = unbroken(narrow, objects)
    lines = min(whole, finished(narrow, form), key=len) if cut else whole
    found = list(given(narrow, objects, lines, form))
    if start:
        found += before_the_answer(content.translate(NARROW), form.key, form)
    said, sure = {each.value for each in found}, [each for each in found if each.sure]
    if len(said) != 1 or not sure:
        none = "cut off at max_tokens" if cut else f"no {form.key}"
        why = f"several answers: {sorted(map(str, said))[:5]}" if len(said) > 1 else none
        return Reading(status=MALFORMED, why=f"{why} in {content[start:][:100]!r}")
    answer = sure[-1]
    if form.kind == LISTWISE:
        return Reading(status=OK, ranking=tuple(answer.value))
    criteria = {}
    for name in form.criteria:
        if (value := criterion(narrow, objects, lines, name, form)) is None:
            return Reading(status=MALFORMED, why=f"no {name}")
        criteria[name] = value
    likely: Mapping[str, float] = {}
    if answer.place is not None:
        likely = probabilities(
            choice.get("logprobs"), content, start + answer.place,
            labels=form.labels, said=answer.value,
        )  # fmt: skip
    return Reading(status=OK, label=answer.value, criteria=criteria, probabilities=likely)


def given(text: str, objects: Sequence[Parsed], lines: str, form: Form) -> Iterator[Found]:
    """Every answer in the text: in JSON objects, on tagged lines, and as a last line of its own;
    and what may contradict it.

    Args:
        objects: of the text, as `parsed` finds them.
        lines: the beginning of the text whose lines are whole and quoted by no broken object.
    """
    held = list(in_objects(text, objects, form.key, form))
    named = [*held, *tagged(lines, form.key, form)]
    yield from named
    yield from beside(text, objects, form.key, form)
    if form.kind == LISTWISE:
        if not named and (order := ranked(lines, form.labels)) is not None:
            yield Found(value=order)
    elif not held:
        yield from second_thoughts(lines, form.key, form)
        yield from lone(lines, form, alone=not named)


def finished(text: str, form: Form) -> str:
    """A text that broke off, without the line in which it did; all of it where that is a label that
    begins no other one, for instance the one token that was asked for.
    """
    short = text.strip().lower()
    begun = [label for label in form.labels if short and label.lower().startswith(short)]
    if form.kind not in (LISTWISE, SCALAR) and [label.lower() for label in begun] == [short]:
        return text
    return text[: text.rfind("\n") + 1]


def criterion(
    text: str, objects: Sequence[Parsed], lines: str, name: str, form: Form
) -> str | None:
    """The answer to one criterion, where there is exactly one; `lines` as in `given`."""
    found = [
        *in_objects(text, objects, name, form),
        *tagged(lines, name, form),
        *beside(text, objects, name, form),
    ]
    said = {each.value for each in found}
    return said.pop() if len(said) == 1 and any(each.sure for each in found) else None


def score(reading: Reading) -> float:
    """A scalar answer as a number: its expectation where there are probabilities."""
    assert reading.label is not None
    if reading.probabilities:
        return sum(int(value) * p for value, p in reading.probabilities.items())
    return float(reading.label)
