"""From the bytes that an endpoint sent to what the judge said; never raises on what it reads.

A better parser raises `PARSER`: answers that are in the ledger are then read again, at no cost.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from align.judge.forms import LISTWISE, Form

PARSER = 1
OK, REFUSAL, MALFORMED = "ok", "refusal", "malformed"
# What a judge may put around a label that stands alone: [[A]], **A**, (a), "Output (b)", Response A.
ALONE = re.compile(
    r"\W*(?:(?:the\s+)?(?:better\s+|best\s+)?(?:output|response|answer|assistant|verdict|score|option)"
    r"(?:\s+is)?\W*)?(?P<label>[\w]+)\W*",
    re.IGNORECASE,
)
LONGEST_ALONE = 60
MOST_TOKENS = 1 << 40  # what says more is no count


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one answer says.

    Attributes:
        status: ok, refusal or malformed; the rest is empty unless ok.
        label: the verdict or the score, as one of the form's labels.
        ranking: the labels from best to worst, of a listwise answer.
        probabilities: of each label at the place of the verdict, renormalised, where the endpoint
            gave log-probabilities.
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
    if not isinstance(prompt, int) or not isinstance(completion, int):
        return None
    if not 0 <= prompt < MOST_TOKENS or not 0 <= completion < MOST_TOKENS:
        return None
    return Usage(prompt=prompt, completion=completion)


def read(body: Mapping[str, Any], form: Form) -> Reading:
    """The reading of one chat completion (as `completion` gave it)."""
    choice = body["choices"][0]
    message = choice["message"]
    if message.get("refusal") or choice.get("finish_reason") == "content_filter":
        return Reading(status=REFUSAL, why=str(message.get("refusal") or "content filter")[:200])
    content = message.get("content")
    if not isinstance(content, str) or not content.strip():
        return Reading(status=MALFORMED, why="no content")
    found = list(given(content, form))
    said = {value for value, _ in found}
    if not said:
        ending = choice.get("finish_reason")
        why = "cut off at max_tokens" if ending == "length" else f"no {form.key}"
        return Reading(status=MALFORMED, why=f"{why} in {content[:100]!r}")
    if len(said) > 1:
        return Reading(status=MALFORMED, why=f"several answers: {sorted(map(str, said))[:5]}")
    value, place = found[-1]
    if form.kind == LISTWISE:
        return Reading(status=OK, ranking=tuple(value))
    criteria = {name: labelled for name in form.criteria
                if (labelled := criterion(content, name, form)) is not None}  # fmt: skip
    missing = [name for name in form.criteria if name not in criteria]
    if missing:
        return Reading(status=MALFORMED, why=f"no {missing[0]}")
    return Reading(
        status=OK,
        label=value,
        criteria=criteria,
        probabilities=probabilities(choice.get("logprobs"), content, place, form.labels),
    )


def given(content: str, form: Form) -> Iterator[tuple[Any, int]]:
    """(value, offset of its first character) of every answer in the content: on tagged lines and in
    JSON objects; without any, the content as a whole.
    """
    found = [*tagged(content, form.key, form), *in_objects(content, form.key, form)]
    if found:
        yield from found
        return
    if form.kind == LISTWISE:
        if (order := ranking(re.findall(r"\w+", content), form.labels)) is not None:
            yield order, 0
    elif len(content) <= LONGEST_ALONE and (match := ALONE.fullmatch(content.strip())):
        value = label(match["label"], form.labels)
        if value is not None:
            yield value, content.index(match["label"])


def in_objects(content: str, key: str, form: Form) -> Iterator[tuple[Any, int]]:
    """From the JSON objects in the content that have the key and a value that fits."""
    decoder, start = json.JSONDecoder(), 0
    for _ in range(20):
        start = content.find("{", start)
        if start < 0:
            return
        try:
            value, end = decoder.raw_decode(content, start)
        except (ValueError, RecursionError):
            start += 1
            continue
        answer = fitting(value.get(key), form) if key in value else None
        if answer is not None:
            place = re.search(rf'"{re.escape(key)}"\s*:\s*"?', content[start:end])
            yield answer, start + (place.end() if place else 0)
        start = end


def fitting(value: Any, form: Form) -> Any:
    """A JSON value as one of the form's labels (or a ranking of all of them), else None."""
    if form.kind == LISTWISE:
        return ranking(value, form.labels) if isinstance(value, list) else None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    if isinstance(value, float):
        value = int(value) if value.is_integer() else str(value)
    return label(str(value), form.labels)


def tagged(content: str, key: str, form: Form) -> Iterator[tuple[Any, int]]:
    """From lines like "Verdict: A"."""
    for match in re.finditer(rf"(?im)^\W*{re.escape(key)}\W*[:=]([^\n]*)$", content):
        words = re.findall(r"\w+", match[1])
        if form.kind == LISTWISE:
            value: Any = ranking(words, form.labels)
        else:
            value = fitting_words(words, form.labels)
        if value is not None:
            first = value if isinstance(value, str) else value[0]
            at = match[1].lower().find(first.lower())
            yield value, match.start(1) + max(at, 0)


def fitting_words(words: Sequence[str], labels: Sequence[str]) -> str | None:
    """The one label among the words of a tagged line; "Response A" is A, "7/10" is 7."""
    words = (
        words[:1] if len(words) == 2 and words[1] == labels[-1] and words[0] in labels else words
    )
    known = {value for word in words if (value := label(word, labels)) is not None}
    return known.pop() if len(known) == 1 and len(words) <= 3 else None


def label(text: str, labels: Sequence[str]) -> str | None:
    """The label that the text is, whatever its case."""
    return next((known for known in labels if known.lower() == text.strip().lower()), None)


def ranking(values: Sequence[Any], labels: Sequence[str]) -> tuple[str, ...] | None:
    """The labels in the order of the values; None unless each stands there once."""
    found = [label(v, labels) for v in values if isinstance(v, str) and len(v) < 20]
    order = tuple(v for v in found if v is not None)
    return order if sorted(order) == sorted(labels) else None


def criterion(content: str, name: str, form: Form) -> str | None:
    """The answer to one criterion, where there is exactly one."""
    found = {value for value, _ in in_objects(content, name, form)} or {
        value for value, _ in tagged(content, name, form)
    }
    return found.pop() if len(found) == 1 else None


def probabilities(
    logprobs: Any, content: str, place: int, labels: Sequence[str]
) -> dict[str, float]:
    """Probability of each label at the token that covers `place`, renormalised over the labels.

    Empty where the endpoint gave no log-probabilities, or none that match the text.
    """
    token = token_at(logprobs, content, place)
    if token is None:
        return {}
    mass = dict.fromkeys(labels, 0.0)
    alternatives = [*(token.get("top_logprobs") or []), token]
    seen: set[str] = set()
    for alternative in alternatives:
        text, logprob = alternative.get("token"), alternative.get("logprob")
        if not isinstance(text, str) or not isinstance(logprob, int | float) or text in seen:
            continue
        seen.add(text)
        meant = beginning(text, labels)
        if meant is not None and logprob == logprob:
            mass[meant] += math.exp(min(float(logprob), 0.0))
    total = sum(mass.values())
    return {key: value / total for key, value in mass.items()} if total > 0 else {}


def token_at(logprobs: Any, content: str, place: int) -> Mapping[str, Any] | None:
    """The entry of the token that covers the character at `place`."""
    entries = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not isinstance(entries, list):
        return None
    offset = 0
    for entry in entries:
        if not isinstance(entry, dict):
            return None
        token = entry.get("token")
        if not isinstance(token, str) or not content.startswith(token, offset):
            return None  # special tokens, or a tokenizer whose pieces do not spell the content
        if offset <= place < offset + len(token):
            return entry
        offset += len(token)
    return None


def beginning(token: str, labels: Sequence[str]) -> str | None:
    """The label that a token spells or begins: "A", " A" and '"A' are A, "t" begins tie."""
    text = re.sub(r"\W", "", token)
    exact = label(text, labels)
    if exact is not None or not text:
        return exact
    begun = [known for known in labels if known.lower().startswith(text.lower())]
    return begun[0] if len(begun) == 1 and not text.isdigit() else None


def score(reading: Reading) -> float:
    """A scalar answer as a number: its expectation where there are probabilities."""
    assert reading.label is not None
    if reading.probabilities:
        return sum(int(value) * p for value, p in reading.probabilities.items())
    return float(reading.label)
