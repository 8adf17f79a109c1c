"""A question as it is sent: its body, its name in the ledger, and whether an answer fits it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.artifacts import canonical_json
from align.errors import JudgeError
from align.judge import answers
from align.judge.answers import MALFORMED, Reading
from align.judge.entries import Judgment
from align.judge.forms import MODES, Form
from align.judge.prices import Price
from align.judge.prompts import Template, one_message
from align.judge.settings import Openai
from align.judge.verdicts import GRAVEST, Question

LIMITS = ("max_completion_tokens", "max_tokens")  # two names of the longest answer
SURE = 1e-6  # how far probabilities may be from 1 together


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What an endpoint's model can do, probed once and then kept, so that keys never change.

    Attributes:
        mode: how answers are asked for, one of `forms.MODES`.
        limit: the name under which the endpoint takes the longest answer.
    """

    mode: str
    logprobs: bool
    limit: str
    temperature: bool

    @classmethod
    def assumed(cls, settings: Openai) -> "Capability":
        """Of an endpoint that nobody has asked yet."""
        return cls(
            mode="json_schema" if settings.answer == "auto" else settings.answer,
            logprobs=str(settings.logprobs).lower() != "false",
            limit="max_completion_tokens",
            temperature=settings.temperature is not None,
        )

    @classmethod
    def believed(cls, known: Any, *, ledger: Path, identity: str) -> "Capability":
        """What a ledger says of a judge's endpoint.

        Raises:
            JudgeError: no probe can have led to it.
        """
        try:
            able = cls(**known)
            sound = able.mode in MODES and able.limit in LIMITS
            sound = sound and all(isinstance(v, bool) for v in (able.logprobs, able.temperature))
        except TypeError:
            sound = False
        if not sound:
            raise JudgeError(
                f"judge.ledger={ledger}: says of {identity} what no probe can have found, so "
                "somebody else wrote into it; name another file with judge.ledger=FILE"
            )
        return able


@dataclass(frozen=True, kw_only=True)
class Request:
    """A question as it is sent; `key` is its name in the ledger. What a `probe` says is no
    judgment, so that it can be asked again.
    """

    key: bytes
    body: Mapping[str, Any]
    form: Form
    mode: str
    probe: bool = False

    @property
    def characters(self) -> int:
        return sum(len(m["content"]) for m in self.body["messages"])

    def worst(self, price: Price, max_tokens: int) -> int:
        """Nano-dollars if every byte were a token and the answer as long as allowed."""
        read = sum(len(m["content"].encode()) + 16 for m in self.body["messages"])
        return price.cost(prompt=read, completion=max_tokens)


def able_of(settings: Openai, probed: Capability) -> Capability:
    """What the settings make of what an endpoint was found to be able to do."""
    return replace(
        probed,
        mode=probed.mode if settings.answer == "auto" else settings.answer,
        logprobs=probed.logprobs and str(settings.logprobs).lower() != "false",
        temperature=probed.temperature and settings.temperature is not None,
    )


def sound(judgment: Judgment, form: Form) -> Reading | None:
    """The reading that a judgment holds, None where it fits no answer of the form; never raises,
    for others may have written the ledger.
    """
    try:
        reading = Reading.from_json(judgment.answer)
        if reading.status == answers.OK:
            return reading if fits(reading, form) else None
        return reading if reading.status in (*GRAVEST, MALFORMED) else None
    except (TypeError, AttributeError, ValueError, OverflowError):
        return None


def fits(reading: Reading, form: Form) -> bool:
    """Whether an answer of the form can be read so: labels, criteria, probabilities.

    Raises:
        TypeError, AttributeError, ValueError, OverflowError: it has another shape.
    """
    labels, likely = set(form.labels), list(reading.probabilities.values())
    if form.kind == "listwise":
        answered = sorted(reading.ranking) == sorted(labels)
    else:
        answered = reading.label in labels
    named = set(reading.criteria) >= set(form.criteria) and set(reading.criteria.values()) <= labels
    shares = set(reading.probabilities) <= labels and all(
        type(p) in (int, float) and 0 <= p <= 1 for p in likely
    )
    return answered and named and shares and (not likely or abs(sum(likely) - 1) <= SURE)


def request(question: Question, *, settings: Openai, able: Capability, limit: int) -> Request:
    """The request for a question, with texts of at most `limit` characters."""
    form = question.form
    mode = able.mode if able.mode in form.modes() else "json"
    template = Template(Path(settings.prompt), Path(settings.prompts))
    messages = template.render(question.material, form=form, mode=mode, limit=limit)
    if not settings.system_role:
        messages = one_message(messages)
    body: dict[str, Any] = {
        "model": settings.model,
        "messages": messages,
        able.limit: settings.max_tokens,
        **form.body(mode),
    }
    if able.temperature and settings.temperature is not None:
        body["temperature"] = settings.temperature
    if able.logprobs and form.kind != "listwise":
        body |= {"logprobs": True, "top_logprobs": min(20, len(form.labels) + 2)}
    asked = {key: value for key, value in body.items() if key not in ("model", able.limit)}
    named = {
        **asked,
        "judge": settings.judge,
        "max_tokens": settings.max_tokens,
        "mode": mode,
        "sample": question.sample,
    }
    told = canonical_json(named).encode("utf-8", "surrogatepass")
    return Request(key=hashlib.sha256(told).digest(), body=body, form=form, mode=mode)
