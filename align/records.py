"""The nouns: what travels between stages, one frozen dataclass per kind of JSONL line.

`from_json` checks a line and raises `DataError` without a place; readers add file and line number.
Fields that a record does not know are kept in `meta`, so that a user's own columns survive.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

from align.errors import DataError

VERSION = 1
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a conversation. Example: `Message(role="user", content="How many days?")`."""

    role: str
    content: str

    def to_json(self) -> dict[str, str]:
        return {"role": self.role, "content": self.content}


def read_messages(line: Mapping[str, Any]) -> tuple[Message, ...]:
    """`messages`, or a plain `prompt` string read as one user turn.

    Raises:
        DataError: neither is there, a turn is malformed, or the last turn is empty.
    """
    turns = line.get("messages")
    if turns is None and isinstance(line.get("prompt"), str):
        turns = [{"role": "user", "content": line["prompt"]}]
    if turns is None and isinstance(line.get("prompt"), list):
        turns = line["prompt"]
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise DataError(
            'no "messages" (a non-empty list of {"role", "content"}) and no "prompt" string'
        )
    messages = []
    for turn in turns:
        role = turn.get("role") if isinstance(turn, Mapping) else None
        content = turn.get("content") if isinstance(turn, Mapping) else None
        if role not in ROLES or not isinstance(content, str):
            raise DataError(
                f'a message needs "role" (one of {", ".join(ROLES)}) and "content" (a string)'
            )
        messages.append(Message(role=role, content=content))
    if not messages[-1].content.strip():
        raise DataError("the prompt is empty")
    return tuple(messages)


def _text(line: Mapping[str, Any], key: str) -> str:
    value = line.get(key)
    if not isinstance(value, str):
        raise DataError(f'no "{key}" (a string)')
    return value


def _number(line: Mapping[str, Any], key: str) -> float:
    """The number under `key`, 0 where there is none or null."""
    value = line.get(key)
    if value is None:
        return 0.0
    try:
        number = float(value) if type(value) in (int, float) else math.nan
    except OverflowError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f'"{key}" is {_shown(value)}, not a number')
    return number


def _whole(line: Mapping[str, Any], key: str) -> int:
    """The whole number under `key`, 0 where there is none or null."""
    value = line.get(key)
    if type(value) is int:
        return value
    number = _number(line, key)
    if not number.is_integer():
        raise DataError(f'"{key}" is {_shown(value)}, not a whole number')
    return int(number)


def _tokens(line: Mapping[str, Any]) -> tuple[int, ...]:
    """The token ids under "tokens", none where there are none or null."""
    value = line.get("tokens")
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or any(type(token) is not int for token in value):
        raise DataError(f'"tokens" is {_shown(value)}, not a list of whole numbers')
    return tuple(value)


def _shown(value: Any) -> str:
    """A value as an error quotes it, however long it is; numbers may be too long to be spelled."""
    try:
        return repr(value)[:40]
    except ValueError:
        return "too many digits"


@dataclass(frozen=True, kw_only=True)
class Record:
    """What all lines share: an id, the conversation so far, and free `meta`."""

    id: str
    messages: tuple[Message, ...]
    meta: Mapping[str, Any] = field(default_factory=dict)

    own_keys: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def _shared(cls, line: Mapping[str, Any], number: int) -> dict[str, Any]:
        known = {f.name for f in fields(cls)} | {"v", "prompt", *cls.own_keys}
        meta = {key: value for key, value in line.items() if key not in known}
        given = line.get("meta")
        if given is not None and not isinstance(given, Mapping):
            raise DataError(f'"meta" is a {type(given).__name__}, not an object {{…}}')
        identifier = line.get("id")
        return {
            "id": str(identifier) if identifier is not None else f"{number:07}",
            "messages": read_messages(line),
            "meta": {**meta, **(given or {})},
        }

    @classmethod
    def from_json(cls, line: Mapping[str, Any], *, number: int = 0) -> Self:
        """The record of one parsed line; `number` becomes the id where the line has none."""
        return cls(**cls._shared(line, number))

    def to_json(self) -> dict[str, Any]:
        body = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("messages", "meta")
        }
        return {
            "v": VERSION,
            "id": body.pop("id"),
            "messages": [message.to_json() for message in self.messages],
            **body,
            "meta": dict(self.meta),
        }


@dataclass(frozen=True, kw_only=True)
class Prompt(Record):
    """A conversation that waits for an answer; its last turn is the user's."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """One sampled answer.

    Attributes:
        text: decoded without special tokens.
        finish: "eos" or "length".
        tokens: token ids, the end-of-sequence token included when `finish` is "eos".
        logprob: summed log-probability of `tokens` under the sampler, in nats.
        seed: with the prompt's id and the sample's index, what its noise was drawn from.
    """

    text: str
    finish: str
    tokens: tuple[int, ...]
    logprob: float
    seed: int

    @property
    def length(self) -> int:
        """Tokens without the end-of-sequence token."""
        return len(self.tokens) - (self.finish == "eos")

    @classmethod
    def from_json(cls, row: Any) -> Self:
        """One of a candidate's `responses`: a text, or an object with one."""
        row = {"text": row} if isinstance(row, str) else row
        if not isinstance(row, Mapping):
            raise DataError('"responses" holds something that is neither a string nor an object')
        finish = row.get("finish", "eos")
        if not isinstance(finish, str):
            raise DataError(f'"finish" is {_shown(finish)}, not a string')
        return cls(
            text=_text(row, "text"),
            finish=finish,
            tokens=_tokens(row),
            logprob=_number(row, "logprob"),
            seed=_whole(row, "seed"),
        )

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class Candidate(Record):
    """A prompt with its n sampled responses, one line a prompt."""

    responses: tuple[Response, ...]
    sampler: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, line: Mapping[str, Any], *, number: int = 0) -> Self:
        rows = line.get("responses")
        if not isinstance(rows, list) or not rows:
            raise DataError('no "responses" (a non-empty list)')
        sampler = line.get("sampler")
        if sampler is not None and not isinstance(sampler, Mapping):
            raise DataError(f'"sampler" is a {type(sampler).__name__}, not an object {{…}}')
        responses = tuple(Response.from_json(row) for row in rows)
        return cls(**cls._shared(line, number), responses=responses, sampler=sampler or {})

    def to_json(self) -> dict[str, Any]:
        line = super().to_json()
        line["responses"] = [response.to_json() for response in self.responses]
        line["sampler"] = dict(self.sampler)
        return line


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two answers to one prompt, put before a judge without saying who wrote them."""

    prompt: Prompt
    first: str
    second: str
    first_index: int = 0
    second_index: int = 1

    def swap(self) -> Self:
        """The same comparison in the other order."""
        return replace(
            self,
            first=self.second,
            second=self.first,
            first_index=self.second_index,
            second_index=self.first_index,
        )


OK, TIE = "ok", "tie"
ROUNDING = 1e-5  # by which a sum of probabilities may miss 0 or 1
STATUSES = (OK, TIE, "disagreement", "refusal", "malformed", "overflow", "failed")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a judge says of one comparison.

    Attributes:
        status: only "ok" and "tie" may become training data.
        p_first: probability that the first answer is better, over both orders; None unless ok or
            tie.
        consistent: both orders agreed; of a judge that escalates, its own.
        looks: probability of the answer *shown first*, in the given order and in the swapped one;
            empty where the judge does not look in orders.
        margin: how much better the preferred one is on the judge's own scale, None where it has
            none.
        scores: the judge's named marks for (first, second), for the report; empty where it has
            none.
        cost: in US dollars; `tokens`: read and written by the judge.
    """

    id: str
    first: int
    second: int
    status: str
    p_first: float | None
    consistent: bool
    judge: str
    looks: Sequence[float] = ()
    margin: float | None = None
    scores: Sequence[Mapping[str, float]] = ()
    level: str | None = None
    cost: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"verdict status {self.status!r} is not one of {STATUSES}")
        if (self.p_first is None) == (self.status in (OK, TIE)):
            raise ValueError(f"a verdict with status {self.status!r} has p_first {self.p_first!r}")
        if self.p_first is not None:
            if not -ROUNDING <= self.p_first <= 1 + ROUNDING:
                raise ValueError(f"p_first is {self.p_first!r}, not a probability")
            object.__setattr__(self, "p_first", min(1.0, max(0.0, self.p_first)))
        if self.margin is not None and not 0 <= self.margin < math.inf:
            raise ValueError(f"margin is {self.margin!r}, not a number from 0 on")

    def to_json(self) -> dict[str, Any]:
        return {"v": VERSION, **{f.name: getattr(self, f.name) for f in fields(self)}}


@dataclass(frozen=True, kw_only=True)
class Preference(Record):
    """Two answers to one prompt and how surely `chosen` is the better one.

    Attributes:
        p: probability that chosen is better, 0.5 to 1; 0.5 is a tie.
        margin: on the judge's scale, or None.

    Example: `{"id": "7", "messages": […], "chosen": "12 days.", "rejected": "3 days.", "p": 1.0,
    "margin": null}`
    """

    chosen: str
    rejected: str
    p: float = 1.0
    margin: float | None = None
    judge: str = ""

    @classmethod
    def from_json(cls, line: Mapping[str, Any], *, number: int = 0) -> Self:
        chosen, rejected = _text(line, "chosen"), _text(line, "rejected")
        if chosen == rejected:
            raise DataError('"chosen" equals "rejected", so the line prefers nothing')
        p = line.get("p", 1.0)
        if not isinstance(p, int | float) or not 0.5 <= p <= 1.0:
            raise DataError(f'"p" is {_shown(p)}, not a number from 0.5 to 1')
        margin = None if line.get("margin") is None else _number(line, "margin")
        return cls(
            **cls._shared(line, number),
            chosen=chosen,
            rejected=rejected,
            p=float(p),
            margin=margin,
            judge=str(line.get("judge") or ""),
        )

    def swap(self) -> Self:
        """The preference told from the other side: p becomes 1 - p (so it may leave 0.5 to 1)."""
        margin = None if self.margin is None else -self.margin
        return replace(
            self, chosen=self.rejected, rejected=self.chosen, p=1 - self.p, margin=margin
        )
