"""A fake OpenAI-compatible server that misbehaves on command, as a process of its own.

`python -m tests.judge.fake_server --port 0 --ready FILE [--plan JSON] [--log FILE]`, or in a test

    with FakeServer(tmp_path, faults={"429": 0.1}) as server:
        client = AsyncOpenAI(base_url=server.url, api_key="k", max_retries=0)

A request passes the gates first (key, rate limits, unsupported parameters, context), then meets at
most one fault, else gets the answer the plan asks for. Only requests past the gates count for `n`
and for `fault_sequence`.
"""

import argparse
import asyncio
import ctypes
import hashlib
import json
import math
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

Json = dict[str, Any]

REPOSITORY = Path(__file__).resolve().parents[2]
CHAT = "/v1/chat/completions"
BLOCK = re.compile(r'<response_([A-Z])_(\w+)>\s*(".*")(?: \[… \+\d+\])?\s*</response_\1_\2>')
TOKEN = re.compile(r"\w+|\s+|[^\w\s]")
OFFER = re.compile(r"\bone of (\w+(?:, \w+)*)")
CRITERION = re.compile(r"^([\w -]+): \(one of ", re.MULTILINE)
FIVE_POINTS = {"A": "2", "B": "4", "tie": "3"}
FEATURES = (
    "response_format", "structured_outputs", "logprobs", "max_tokens", "max_completion_tokens",
    "temperature", "seed",
)  # fmt: skip
# Faults of a status line, and faults of the connection, that hold no completion.
BARE_FAULTS = (
    "429", "429_headers", "429_long", "500", "502_html", "503", "timeout", "reset", "html", "401",
    "403", "insufficient_quota", "404_model", "redirect",
)  # fmt: skip
# Faults inside a completion: batched requests meet these too.
CONTENT_FAULTS = (
    "null_choices", "empty_choices", "null_content", "refusal", "content_filter", "length",
    "wrong_schema", "wrong_label", "two_verdicts", "echo_key",
)  # fmt: skip
BODY_FAULTS = ("cut", "truncated_json", "slow")
FAULTS = (*BARE_FAULTS, *CONTENT_FAULTS, *BODY_FAULTS)
ANSWERS = ("longest", "shortest", "first", "second", "constant", "table", "malformed")
HTML = b"<html><head><title>Bad gateway</title></head><body><h1>nginx</h1></body></html>"
SILENT_FOR = 600.0
SLOW_PIECES, SLOW_PAUSE = 5, 0.05


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the server behaves; `POST /control` merges into it."""

    latency: float = 0.0
    latencies: list[float] | None = None
    answer: str = "longest"
    p: float = 0.9
    replies: str | None = None
    fence: bool = False
    faults: dict[str, float] = field(default_factory=dict)
    fault_sequence: list[str | None] = field(default_factory=list)
    seed: int = 0
    retry_after: float = 0.05
    redirect_to: str = "/v1/elsewhere"
    unsupported: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    require_key: str | None = None
    context_chars: int | None = None
    limit_rpm: float | None = None
    limit_tpm: float | None = None
    headers: dict[str, str] = field(default_factory=dict)
    model_list: list[str] = field(default_factory=lambda: ["fake"])
    batch_polls: int = 2
    batch_expire: float = 0.0
    batch_error: float = 0.0
    batch_status: str | None = None

    def merged(self, changes: Json) -> "Plan":
        """The plan with `changes`; a key is replaced as a whole.

        Raises:
            ValueError: a key, a fault, a feature or an answer that does not exist.
        """
        names = {known.name for known in fields(self)}
        plan = replace(self, **{name: changes[name] for name in changes if name in names})
        unknown: list[str | None] = [name for name in changes if name not in names]
        unknown += [name for name in (*plan.faults, *plan.fault_sequence) if not is_fault(name)]
        unknown += [name for name in (*plan.unsupported, *plan.ignored) if name not in FEATURES]
        unknown += [] if plan.answer in ANSWERS else [plan.answer]
        if unknown:
            raise ValueError(f"the fake server's plan knows no {unknown}; see Plan and FAULTS")
        if sum(plan.faults.values()) > 1 + 1e-9:
            raise ValueError(f"the rates of faults add up to more than 1: {plan.faults}")
        if plan.answer == "table" and not plan.replies:
            raise ValueError('answer="table" needs `replies`, the path of a JSON file')
        return plan


def is_fault(name: str | None) -> bool:
    return name is None or name in FAULTS


@dataclass(frozen=True)
class Request:
    """One HTTP request, read fully; header names in lower case."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def key(self) -> str | None:
        given = self.headers.get("authorization")
        return None if given is None else given.removeprefix("Bearer ")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One HTTP answer and how it travels: whole, slow, cut, reset or silent."""

    status: int = 200
    body: bytes = b""
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    delivery: str = "whole"
    good: bool = False

    def head(self) -> bytes:
        lines = [
            f"HTTP/1.1 {self.status} {HTTPStatus(self.status).phrase}",
            f"content-type: {self.kind}",
            f"content-length: {len(self.body)}",
            *(f"{name}: {value}" for name, value in self.headers.items()),
        ]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


@dataclass(frozen=True, kw_only=True)
class Call:
    """One chat request on its way to the log."""

    sha: str
    n: int = 0
    fault: str | None = None
    texts: tuple[str, ...] = ()


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def sha(data: str | bytes) -> str:
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    return hashlib.sha256(raw).hexdigest()


def draw(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` alone."""
    return int(sha("\0".join(map(str, parts)))[:13], 16) / 16**13


def ok(value: Any) -> Reply:
    return Reply(body=dumps(value))


def failure(
    status: int,
    message: str,
    *,
    code: str | None,
    kind: str = "invalid_request_error",
    param: str | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    error = {"message": message, "type": kind, "param": param, "code": code}
    return Reply(status=status, body=dumps({"error": error}), headers=headers or {})


def wrong_key(key: str | None) -> Reply:
    """Echoes the key on purpose: a client must not write it anywhere."""
    return failure(401, f"Incorrect API key provided: {key}", code="invalid_api_key")


# What the judge's prompt shows, and what to think of it.


def message_text(message: Any) -> str:
    content = message.get("content") if isinstance(message, dict) else None
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def message_texts(body: Json) -> list[str]:
    messages = body.get("messages")
    return [message_text(m) for m in messages] if isinstance(messages, list) else []


def shown_texts(prompt: str) -> dict[str, str]:
    """Label to text of every `<response_A_NONCE>` block, in the order shown."""
    texts = {}
    for match in BLOCK.finditer(prompt):
        try:
            texts[match[1]] = json.loads(match[3])
        except ValueError:
            continue
    return texts


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """What the server thinks of the texts shown; `forced` is a label that nobody offered."""

    texts: dict[str, str]
    ranking: list[str]
    tied: bool = False
    constant: bool = False
    forced: str | None = None

    def choose(self, choices: list[str]) -> str:
        """The preferred one of `choices`: labels, five points, or scores of a single response."""
        if self.forced is not None:
            return self.forced
        if self.constant or not self.ranking:
            return choices[0]
        best = "tie" if self.tied and "tie" in choices else self.ranking[0]
        if all(choice.isdigit() for choice in choices):
            scores = sorted(int(choice) for choice in choices)
            best = FIVE_POINTS.get("tie" if self.tied else best, choices[0])
            if len(self.texts) == 1:
                best = str(self.score(scores[0], scores[-1]))
        return best if best in choices else choices[0]

    def score(self, low: int = 1, high: int = 10) -> int:
        """A grade that the first text's length decides; out of range where a label is forced."""
        if self.forced is not None:
            return high + 89
        if self.constant:
            return low
        text = next(iter(self.texts.values()), "")
        return min(high, max(low, len(text) % 10 + 1))

    def order(self) -> list[str]:
        return self.ranking if self.forced is None else [self.forced, *self.ranking[1:]]


def form_opinion(texts: dict[str, str], answer: str, *, wrong_label: bool = False) -> Opinion:
    labels = list(texts)
    ranking, tied = labels, False
    if answer == "second":
        ranking = labels[1:2] + labels[:1] + labels[2:]
    elif answer in ("longest", "shortest"):
        sign = -1 if answer == "longest" else 1
        ranking = sorted(labels, key=lambda label: sign * len(texts[label]))
        tied = len(ranking) > 1 and len(texts[ranking[0]]) == len(texts[ranking[1]])
    forced = chr(ord("A") + max(2, len(labels))) if wrong_label else None
    return Opinion(
        texts=texts, ranking=ranking, tied=tied, constant=answer == "constant", forced=forced
    )


# The forms an answer can take.


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The content, the label in it, and the labels that share its probability."""

    content: str
    label: str | None = None
    choices: tuple[str, ...] = ()


def schema_answer(schema: Json, opinion: Opinion) -> Answer:
    """Fills the schema's properties in order."""
    filled: Json = {}
    label: str | None = None
    choices: tuple[str, ...] = ()
    for name, rule in schema.get("properties", {}).items():
        options = value_options(rule)
        if rule.get("type") == "array":
            filled[name] = opinion.order()
        elif options and "enum" not in rule:
            filled[name] = opinion.score(int(options[0]), int(options[-1]))
        elif options:
            picked = opinion.choose(options)
            filled[name] = next((v for v in rule["enum"] if str(v) == picked), picked)
        else:
            filled[name] = False if rule.get("type") == "boolean" else "because"
        if options and (name == "verdict" or "verdict" not in filled):
            label, choices = str(filled[name]), tuple(options)
    return Answer(content=dumps(filled).decode(), label=label, choices=choices)


def value_options(rule: Json) -> list[str]:
    """The values a property may take, as strings: its enum, or its range of integers."""
    if "enum" in rule:
        return [str(value) for value in rule["enum"]]
    if rule.get("type") in ("integer", "number"):
        return [
            str(n) for n in range(int(rule.get("minimum", 1)), int(rule.get("maximum", 10)) + 1)
        ]
    return []


def free_value(word: str, last: str, opinion: Opinion) -> tuple[Any, tuple[str, ...]]:
    """The value for `word` where nothing but the prompt says what is allowed, and its options."""
    if word == "reason":
        return "because", ()
    if word == "ranking":
        return opinion.order(), ()
    instructions = BLOCK.sub("", last)
    offers = OFFER.findall(instructions)
    choices = offers[-1].split(", ") if offers else []
    if word == "score":
        scores = sorted(int(choice) for choice in choices if choice.isdigit()) or range(1, 11)
        return opinion.score(scores[0], scores[-1]), tuple(str(n) for n in scores)
    if not choices:
        choices = list(opinion.texts) or ["A", "B"]
        choices += ["tie"] if re.search(r"\btie\b", instructions, re.IGNORECASE) else []
    return opinion.choose(choices), tuple(choices)


def json_answer(last: str, opinion: Opinion, *, fence: bool) -> Answer:
    """The names of the last line with an object, or the one word that the prompt speaks of."""
    sample = next(line for line in reversed(last.splitlines()) if '{"' in line)
    words = re.findall(r'"(\w+)":', sample)
    if not {"verdict", "ranking", "score"} & set(words):
        words = [last_word(last, "{}") or "verdict"]
    values, label, choices = free_values(words, last, opinion)
    content = json.dumps(values, ensure_ascii=False)
    return Answer(
        content=f"```json\n{content}\n```" if fence else content, label=label, choices=choices
    )


def line_answer(last: str, opinion: Opinion) -> Answer:
    """A line for each criterion the prompt has a line for, then the one of the word named last."""
    words = CRITERION.findall(last)
    final = last_word(last, "{}:", change=str.capitalize) or "verdict"
    words = [*(word for word in words if word != final.capitalize()), final.capitalize()]
    values, label, choices = free_values(words, last, opinion)
    shown = {w: " > ".join(v) if isinstance(v, list) else str(v) for w, v in values.items()}
    content = "\n".join(f"{word}: {value}" for word, value in shown.items())
    return Answer(content=content, label=label, choices=choices)


def free_values(
    words: list[str], last: str, opinion: Opinion
) -> tuple[Json, str | None, tuple[str, ...]]:
    """A value for each word, a criterion's like that of the last; the last one's label, options."""
    final = words[-1].lower()
    known = ("reason", "ranking")
    kinds = {word: word.lower() if word.lower() in known else final for word in words}
    values = {word: free_value(kind, last, opinion)[0] for word, kind in kinds.items()}
    value, choices = free_value(final, last, opinion)
    return values, str(value) if choices else None, choices


def last_word(text: str, pattern: str, change: Callable[[str], str] = str) -> str | None:
    """Which of verdict, ranking and score stands last in `text`, written as in `pattern`."""
    places = {w: text.rfind(pattern.format(change(w))) for w in ("verdict", "ranking", "score")}
    best = max(places, key=lambda word: places[word])
    return best if places[best] >= 0 else None


def answer_to(body: Json, texts: list[str], opinion: Opinion, plan: Plan) -> Answer:
    """The answer in the form the request asks for; features ignored are gone from `body`."""
    last = texts[-1] if texts else ""
    asked, guided = body.get("response_format"), body.get("structured_outputs")
    if isinstance(asked, dict) and asked.get("type") == "json_schema":
        return schema_answer(asked["json_schema"]["schema"], opinion)
    if isinstance(guided, dict) and guided.get("choice"):
        choices = [str(choice) for choice in guided["choice"]]
        label = opinion.choose(choices)
        return Answer(content=label, label=label, choices=tuple(choices))
    if '{"' in last and "JSON" in last:
        return json_answer(last, opinion, fence=plan.fence)
    return line_answer(last, opinion)


def label_inside(content: str, choices: tuple[str, ...]) -> str | None:
    """The last token of `content` that is one of `choices`."""
    return next((t for t in reversed(TOKEN.findall(content)) if t in choices), None)


def logprobs_of(answer: Answer, *, p: float, top: int) -> Json:
    """One entry a token; the last token that is the label carries the probabilities."""
    tokens = TOKEN.findall(answer.content)
    place = max((i for i, token in enumerate(tokens) if token == answer.label), default=-1)
    entries = []
    for i, token in enumerate(tokens):
        options = label_options(answer, p=p) if i == place else [(token, 0.99), ("…", 0.001)]
        best = [token_entry(*option) for option in options[:top]]
        own = next(share for option, share in options if option == token)
        entries.append(token_entry(token, own) | {"top_logprobs": best})
    return {"content": entries, "refusal": None}


def label_options(answer: Answer, *, p: float) -> list[tuple[str, float]]:
    """Label and probability, likeliest first: p, then 0.9 (1-p) shared, then a junk token."""
    assert answer.label is not None
    others = [choice for choice in answer.choices if choice != answer.label]
    shared = [(other, (1 - p) * 0.9 / len(others)) for other in others]
    options = [(answer.label, p), *shared, ("…", (1 - p) * 0.1)]
    return sorted(options, key=lambda option: -option[1])


def token_entry(token: str, probability: float) -> Json:
    logprob = math.log(probability) if probability > 0 else -100.0
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


# Faults.


def bare_fault(fault: str, plan: Plan, request: Request, model: str) -> Reply:
    """The answer to a request that meets one of BARE_FAULTS."""
    if fault in ("timeout", "reset"):
        return Reply(delivery={"timeout": "silent", "reset": "reset"}[fault])
    if fault in ("502_html", "html"):
        return Reply(status=502 if fault == "502_html" else 200, body=HTML, kind="text/html")
    if fault == "redirect":
        return Reply(status=307, headers={"location": plan.redirect_to})
    if fault == "401":
        return wrong_key(request.key)
    if fault.startswith("429"):
        wait = 300 if fault == "429_long" else plan.retry_after
        headers = {"retry-after": f"{wait:g}", "retry-after-ms": f"{1000 * wait:g}"}
        return failure(
            429,
            "Rate limit reached for requests",
            code="rate_limit_exceeded",
            kind="requests",
            headers=None if fault == "429" else headers,
        )
    status, message, kind, code = {
        "500": (500, "The server had an error", "server_error", None),
        "503": (503, "The engine is overloaded", "server_error", None),
        "403": (403, "Your project may not use this model", "permission_error", "forbidden"),
        "insufficient_quota": (
            429, "You exceeded your current quota", "insufficient_quota", "insufficient_quota",
        ),
        "404_model": (
            404, f"The model `{model}` does not exist", "invalid_request_error", "model_not_found",
        ),
    }[fault]  # fmt: skip
    return failure(status, message, kind=kind, code=code)


def spoil_answer(answer: Answer, fault: str | None, authorization: str) -> Answer:
    """The answer with a wrong content, where the fault is one of the content."""
    content = answer.content
    if fault == "length":
        content = content[: len(content) // 2]
    elif fault == "content_filter":
        content = ""
    elif fault == "wrong_schema":
        content = '{"foo": 1}'
    elif fault == "two_verdicts":
        content = "Verdict: A\nVerdict: B"
    elif fault == "echo_key":
        content = f"{authorization} {content}"
    return answer if content == answer.content else replace(answer, content=content)


def completion(body: Json, answer: Answer, *, fault: str | None, p: float, number: int) -> Json:
    """A chat completion as OpenAI documents it, but for `fault`."""
    silent = fault in ("null_content", "refusal")
    refusal = "I'm sorry, I can't help with that." if fault == "refusal" else None
    reasons = {"content_filter": "content_filter", "length": "length"}
    choice = {
        "index": 0,
        "message": {
            "role": "assistant",
            "content": None if silent else answer.content,
            "refusal": refusal,
        },
        "logprobs": None,
        "finish_reason": reasons.get(fault or "", "stop"),
    }
    if body.get("logprobs") and not silent:
        choice["logprobs"] = logprobs_of(answer, p=p, top=int(body.get("top_logprobs") or 0))
    prompt_tokens = characters(message_texts(body)) // 4
    completion_tokens = max(1, len(answer.content) // 4)
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": str(body.get("model", "fake")),
        "choices": {"null_choices": None, "empty_choices": []}.get(fault or "", [choice]),
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def characters(texts: list[str]) -> int:
    return sum(map(len, texts))


# Rate limits.


class Bucket:
    """A token bucket of `per_minute`; its burst is one second's worth, at least 1."""

    def __init__(self, per_minute: float) -> None:
        self.per_minute = per_minute
        self.burst = max(1.0, per_minute / 60)
        self.level = self.burst
        self.at = time.monotonic()

    def take(self, cost: float) -> bool:
        """Takes `cost` if there is as much; a cost above the burst passes when full, in debt."""
        now = time.monotonic()
        self.level = min(self.burst, self.level + (now - self.at) * self.per_minute / 60)
        self.at = now
        if self.level < min(cost, self.burst):
            return False
        self.level -= cost
        return True

    def headers(self, name: str) -> dict[str, str]:
        missing = (self.burst - self.level) * 60 / self.per_minute
        return {
            f"x-ratelimit-limit-{name}": f"{self.per_minute:g}",
            f"x-ratelimit-remaining-{name}": str(max(0, int(self.level))),
            f"x-ratelimit-reset-{name}": duration(missing),
        }


def duration(seconds: float) -> str:
    """As OpenAI writes it: "20ms", "1s", "1.5s", "6m0s"; rounded up."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds * 1000) / 1000
    return f"{whole:g}s" if whole < 60 else f"{int(whole // 60)}m{whole % 60:g}s"


# The server.


@dataclass
class Stats:
    """What happened since the start or the last reset."""

    received: int = 0
    answered: int = 0
    aborted: int = 0
    limited: int = 0
    batched: int = 0
    prompt_tokens: int = 0  # of all that was generated, whether it arrived or not
    completion_tokens: int = 0
    max_in_flight: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    by_body: Counter[str] = field(default_factory=Counter)
    keys_seen: list[str] = field(default_factory=list)

    def to_json(self) -> Json:
        return vars(self) | {"duplicates": sum(n - 1 for n in self.by_body.values())}


class Server:
    """The plan and all that was counted; answers requests, knows nothing of sockets."""

    def __init__(self, plan: Plan, log: Path | None = None) -> None:
        self.log = None if log is None else log.open("a", encoding="utf-8", buffering=1)
        self.in_flight = 0
        self.completions = 0
        self.adopt(plan)
        self.reset()

    def adopt(self, plan: Plan) -> None:
        self.replies = json.loads(Path(plan.replies).read_text("utf-8")) if plan.replies else {}
        self.plan = plan
        limits = {"requests": plan.limit_rpm, "tokens": plan.limit_tpm}
        self.buckets = {name: Bucket(limit) for name, limit in limits.items() if limit}

    def reset(self) -> None:
        """Forgets counts, files and batches; the plan stays."""
        self.stats = Stats()
        self.seen: Counter[str] = Counter()
        self.sequence_at = 0
        self.batches = Batches(self)

    def chat(self, request: Request) -> tuple[Call, Reply, float]:
        """The answer to a chat request, and the seconds to wait before it is sent."""
        self.stats.received += 1
        self.in_flight += 1
        self.stats.max_in_flight = max(self.stats.max_in_flight, self.in_flight)
        call = Call(sha=sha(request.body))
        try:
            body = json.loads(request.body)
            assert isinstance(body, dict)
        except (ValueError, AssertionError):
            return call, failure(400, "The body is no JSON object", code="invalid_json"), 0.0
        refused = self.refuse_key(request) or self.refuse_rate(body) or self.refuse_body(body)
        if refused is not None:
            return call, refused, 0.0
        return self.answer_chat(request, body, call)

    def answer_chat(self, request: Request, body: Json, call: Call) -> tuple[Call, Reply, float]:
        n, fault = self.meet_fault(call.sha)
        texts = shown_texts("\n".join(message_texts(body)))
        call = replace(call, n=n, fault=fault, texts=tuple(texts.values()))
        if fault in BARE_FAULTS:
            reply = bare_fault(fault, self.plan, request, str(body.get("model")))
        else:
            reply = self.complete(body, texts, fault, request.headers.get("authorization", ""))
        reply = replace(reply, headers=reply.headers | self.limit_headers())
        return call, reply, self.latency(call)

    def meet_fault(self, body_sha: str, *, batched: bool = False) -> tuple[int, str | None]:
        """How often the body was seen, now included, and the fault it meets this time."""
        self.seen[body_sha] += 1
        n = self.seen[body_sha]
        if self.sequence_at < len(self.plan.fault_sequence) and not batched:
            fault = self.plan.fault_sequence[self.sequence_at]
            self.sequence_at += 1
        else:
            fault = drawn_fault(self.plan.faults, draw(self.plan.seed, body_sha, n))
        if batched and fault not in CONTENT_FAULTS:
            fault = None
        if fault is not None:
            self.stats.faults[fault] += 1
        return n, fault

    def complete(
        self, body: Json, texts: dict[str, str], fault: str | None, authorization: str
    ) -> Reply:
        payload = self.completion(body, texts, fault, authorization)
        if payload is None:
            return failure(400, "The fake server's table has no reply for this", code="no_reply")
        raw = dumps(payload)
        if fault == "truncated_json":
            return Reply(body=raw[: len(raw) // 2])
        delivery = fault if fault in ("slow", "cut") else "whole"
        return Reply(body=raw, delivery=delivery, good=fault in (None, "slow"))

    def completion(
        self, body: Json, texts: dict[str, str], fault: str | None, authorization: str
    ) -> Json | None:
        """The chat completion, or None where the table has no reply."""
        plan = self.plan
        body = {name: value for name, value in body.items() if name not in plan.ignored}
        opinion = form_opinion(texts, plan.answer, wrong_label=fault == "wrong_label")
        answer = answer_to(body, message_texts(body), opinion, plan)
        if plan.answer == "table" and fault != "wrong_label":
            shown = (*texts.values(), "", "")[:2]
            content = self.replies.get(sha("\0".join(shown)))
            if content is None:
                return None
            answer = replace(answer, content=content, label=label_inside(content, answer.choices))
        elif plan.answer == "malformed":
            answer = Answer(content="hmm, hard to say")
        answer = spoil_answer(answer, fault, authorization)
        self.completions += 1
        made = completion(body, answer, fault=fault, p=plan.p, number=self.completions)
        self.stats.prompt_tokens += made["usage"]["prompt_tokens"]
        self.stats.completion_tokens += made["usage"]["completion_tokens"]
        return made

    def latency(self, call: Call) -> float:
        if not self.plan.latencies:
            return self.plan.latency
        place = draw(self.plan.seed, call.sha, call.n, "latency") * len(self.plan.latencies)
        return self.plan.latencies[int(place)]

    def refuse_key(self, request: Request) -> Reply | None:
        key = request.key
        if key is not None and key not in self.stats.keys_seen:
            self.stats.keys_seen.append(key)
        wanted = self.plan.require_key
        if wanted is None or request.headers.get("authorization") == f"Bearer {wanted}":
            return None
        return wrong_key(key)

    def refuse_rate(self, body: Json) -> Reply | None:
        """A 429 where a bucket is empty; a token's cost is the prompt's and the most it may add."""
        asked = body.get("max_completion_tokens") or body.get("max_tokens") or 0
        costs = {"requests": 1.0, "tokens": characters(message_texts(body)) // 4 + float(asked)}
        for name, bucket in self.buckets.items():
            if not bucket.take(costs[name]):
                self.stats.limited += 1
                message = f"Rate limit reached for {name}"
                headers = self.limit_headers()
                return failure(429, message, code="rate_limit_exceeded", kind=name, headers=headers)
        return None

    def refuse_body(self, body: Json) -> Reply | None:
        for name in self.plan.unsupported:
            if body.get(name) not in (None, False):
                message = f"Unsupported parameter: '{name}' is not supported with this model."
                return failure(400, message, code="unsupported_parameter", param=name)
        limit = self.plan.context_chars
        if limit is not None and characters(message_texts(body)) > limit:
            message = (
                "This model's maximum context length is 8192 tokens. However, your messages "
                f"resulted in {characters(message_texts(body)) // 4} tokens."
            )
            return failure(400, message, code="context_length_exceeded", param="messages")
        return None

    def limit_headers(self) -> dict[str, str]:
        headers = dict(self.plan.headers)
        for name, bucket in self.buckets.items():
            headers |= bucket.headers(name)
        return headers

    def finish(self, call: Call, reply: Reply | None) -> None:
        """Counts and logs a chat request; without a reply the client went away first."""
        answered = reply is not None and reply.good
        self.in_flight -= 1
        self.stats.answered += answered
        self.stats.aborted += reply is None
        if answered:
            self.stats.by_body[call.sha] += 1
        sent = reply is not None and reply.delivery != "reset"
        status = reply.status if reply is not None and sent else None
        self.stats.statuses[str(status)] += 1
        if self.log is not None:
            self.log.write(json.dumps(self.log_line(call, status, answered)) + "\n")

    def log_line(self, call: Call, status: int | None, answered: bool) -> Json:
        shas = [sha(text) for text in call.texts[:2]]
        first, second = (*shas, None, None)[:2]
        return {
            "t": time.time(),
            "sha": call.sha,
            "n": call.n,
            "fault": call.fault,
            "status": status,
            "answered": answered,
            "first": first,
            "second": second,
        }

    def other(self, request: Request) -> Reply:
        """Everything that is not a chat request."""
        if request.path.startswith("/control"):
            return self.control(request)
        refused = self.refuse_key(request)
        if refused is not None:
            return refused
        if request.path == "/v1/models":
            models = [
                {"id": name, "object": "model", "created": 0, "owned_by": "fake"}
                for name in self.plan.model_list
            ]
            return ok({"object": "list", "data": models})
        return self.batches.handle(request) or failure(404, "Not found", code="not_found")

    def control(self, request: Request) -> Reply:
        match request.method, request.path:
            case "GET", "/control/stats":
                return ok(self.stats.to_json())
            case "POST", "/control/reset":
                self.reset()
                return ok({})
            case "POST", "/control":
                try:
                    self.adopt(self.plan.merged(json.loads(request.body)))
                except (ValueError, TypeError, OSError) as error:
                    return failure(400, str(error), code="bad_plan")
                self.sequence_at = 0 if b'"fault_sequence"' in request.body else self.sequence_at
                return ok(asdict(self.plan))
        return failure(404, "Not found", code="not_found")


def drawn_fault(rates: dict[str, float], at: float) -> str | None:
    """The fault whose share of [0, 1) holds `at`; names in alphabetical order."""
    for name in sorted(rates):
        at -= rates[name]
        if at < 0:
            return name
    return None


# Files and batches.


@dataclass
class Batch:
    """One batch; `polls` counts the GETs it has answered."""

    shown: Json
    lines: list[Json]
    polls: int = 0


class Batches:
    """Files and batches of the provider's Batch API."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.files: dict[str, tuple[Json, bytes]] = {}
        self.batches: dict[str, Batch] = {}

    def handle(self, request: Request) -> Reply | None:
        match request.method, request.path.removeprefix("/v1/").split("/"):
            case "POST", ["files"]:
                return self.upload(request)
            case "GET", ["files"]:
                return page([shown for shown, _ in self.files.values()], request.query)
            case "GET", ["files", name] if name in self.files:
                return ok(self.files[name][0])
            case "GET", ["files", name, "content"] if name in self.files:
                return Reply(body=self.files[name][1], kind="application/octet-stream")
            case "DELETE", ["files", name] if name in self.files:
                del self.files[name]
                return ok({"id": name, "object": "file", "deleted": True})
            case "POST", ["batches"]:
                return self.create(json.loads(request.body))
            case "GET", ["batches"]:
                return page([batch.shown for batch in self.batches.values()], request.query)
            case "GET", ["batches", name] if name in self.batches:
                return ok(self.poll(self.batches[name]))
            case "POST", ["batches", name, "cancel"] if name in self.batches:
                return self.cancel(self.batches[name])
        return None

    def upload(self, request: Request) -> Reply:
        parts = form_parts(request.headers.get("content-type", ""), request.body)
        if "file" not in parts or "purpose" not in parts:
            return failure(400, "A file needs `file` and `purpose`", code="missing_part")
        filename, content = parts["file"]
        return ok(self.store(content, filename, parts["purpose"][1].decode()))

    def store(self, content: bytes, filename: str, purpose: str) -> Json:
        shown = {
            "id": f"file-{len(self.files) + 1}-{sha(content)[:8]}",
            "object": "file",
            "bytes": len(content),
            "created_at": int(time.time()),
            "expires_at": None,
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
            "status_details": None,
        }
        self.files[str(shown["id"])] = (shown, content)
        return shown

    def create(self, body: Json) -> Reply:
        source = body.get("input_file_id")
        if not isinstance(source, str) or source not in self.files:
            return failure(400, f"No such file: {source}", code="invalid_file", param="file")
        raw = self.files[source][1].splitlines()
        now = int(time.time())
        shown = {
            "id": f"batch_{len(self.batches) + 1}",
            "object": "batch",
            "endpoint": body.get("endpoint"),
            "errors": None,
            "input_file_id": source,
            "completion_window": body.get("completion_window"),
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "in_progress_at": None,
            "expires_at": now + 86400,
            "finalizing_at": None,
            "completed_at": None,
            "failed_at": None,
            "expired_at": None,
            "cancelling_at": None,
            "cancelled_at": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": body.get("metadata"),
        }
        lines = [json.loads(line) for line in raw if line.strip()]
        self.batches[str(shown["id"])] = Batch(shown=dict(shown), lines=lines)
        return ok(shown)

    def poll(self, batch: Batch) -> Json:
        """The batch as one more GET sees it."""
        status = batch.shown["status"]
        if status == "cancelling":
            self.close(batch, "cancelled")
        elif status in ("validating", "in_progress"):
            batch.polls += 1
            if batch.polls > self.server.plan.batch_polls:
                self.end(batch)
            else:
                self.close(batch, "in_progress")
                batch.shown["request_counts"]["total"] = len(batch.lines)
        return batch.shown

    def cancel(self, batch: Batch) -> Reply:
        if batch.shown["status"] not in ("validating", "in_progress"):
            message = f"Cannot cancel a batch with status '{batch.shown['status']}'."
            return failure(409, message, code="batch_not_cancellable")
        self.close(batch, "cancelling")
        return ok(batch.shown)

    def close(self, batch: Batch, status: str) -> None:
        batch.shown["status"] = status
        if batch.shown[f"{status}_at"] is None:
            batch.shown[f"{status}_at"] = int(time.time())

    def end(self, batch: Batch) -> None:
        """Answers the lines in the order of a hash: expired first, then errors, then outputs."""
        plan = self.server.plan
        if plan.batch_status == "failed" or duplicated_ids(batch.lines):
            self.fail(batch)
            return
        lines = sorted(batch.lines, key=lambda line: draw(plan.seed, line["custom_id"], "batch"))
        expired = round(plan.batch_expire * len(lines))
        wrong = expired + round(plan.batch_error * len(lines))
        errors = [expired_line(line) for line in lines[:expired]]
        errors += [wrong_line(line) for line in lines[expired:wrong]]
        outputs: list[Json] = []
        for line in lines[wrong:]:
            done = self.run(line)
            (outputs if done["response"]["status_code"] == 200 else errors).append(done)
        self.close(batch, plan.batch_status or ("expired" if expired else "completed"))
        self.write(batch, outputs=outputs, errors=errors)

    def fail(self, batch: Batch) -> None:
        twice = duplicated_ids(batch.lines)
        error = {
            "code": "duplicate_custom_id" if twice else "token_limit_exceeded",
            "message": f"Used more than once: {twice}" if twice else "Enqueued token limit reached",
            "param": None,
            "line": None,
        }
        self.close(batch, "failed")
        batch.shown["errors"] = {"object": "list", "data": [error]}

    def write(self, batch: Batch, *, outputs: list[Json], errors: list[Json]) -> None:
        name = batch.shown["id"]
        for kind, lines in (("output", outputs), ("error", errors)):
            if lines:
                content = b"".join(dumps(line) + b"\n" for line in lines)
                stored = self.store(content, f"{name}_{kind}.jsonl", "batch_output")
                batch.shown[f"{kind}_file_id"] = stored["id"]
        total, completed = len(batch.lines), len(outputs)
        counts = {"total": total, "completed": completed, "failed": total - completed}
        batch.shown["request_counts"] = counts

    def run(self, line: Json) -> Json:
        """The output line of one request; of the faults it meets those of the content."""
        server, body = self.server, line["body"]
        server.stats.batched += 1
        reply = server.refuse_body(body)
        if reply is None:
            _, fault = server.meet_fault(sha(dumps(body)), batched=True)
            texts = shown_texts("\n".join(message_texts(body)))
            reply = server.complete(body, texts, fault, "")
        return batch_line(line, status=reply.status, body=json.loads(reply.body))


def batch_line(line: Json, *, status: int, body: Json) -> Json:
    custom_id = line["custom_id"]
    response = {"status_code": status, "request_id": f"req_{sha(custom_id)[:12]}", "body": body}
    return {
        "id": f"batch_req_{sha(custom_id)[:12]}",
        "custom_id": custom_id,
        "response": response,
        "error": None,
    }


def wrong_line(line: Json) -> Json:
    error = {"message": "Invalid request", "type": "invalid_request_error", "code": "invalid"}
    return batch_line(line, status=400, body={"error": error})


def expired_line(line: Json) -> Json:
    message = "This request could not be executed before the completion window expired."
    error = {"code": "batch_expired", "message": message}
    return batch_line(line, status=0, body={}) | {"response": None, "error": error}


def duplicated_ids(lines: list[Json]) -> list[str]:
    return [name for name, n in Counter(line["custom_id"] for line in lines).items() if n > 1]


def page(items: list[Json], query: dict[str, str]) -> Reply:
    """A list newest first, from the one after `after`."""
    newest = items[::-1]
    ids = [item["id"] for item in newest]
    start = ids.index(query["after"]) + 1 if query.get("after") in ids else 0
    limit = int(query.get("limit", 20))
    shown = newest[start : start + limit]
    return ok(
        {
            "object": "list",
            "data": shown,
            "first_id": shown[0]["id"] if shown else None,
            "last_id": shown[-1]["id"] if shown else None,
            "has_more": start + limit < len(newest),
        }
    )


def form_parts(content_type: str, body: bytes) -> dict[str, tuple[str, bytes]]:
    """Name to file name and content of every part of a multipart form."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)
    parts = {}
    for part in (b"\r\n" + body).split(b"\r\n--" + boundary[1].encode())[1:-1] if boundary else []:
        head, _, content = part.partition(b"\r\n\r\n")
        name = re.search(rb'[; ]name="([^"]*)"', head)
        filename = re.search(rb'filename="([^"]*)"', head)
        if name:
            parts[name[1].decode()] = (filename[1].decode() if filename else "", content)
    return parts


# The wire.


class Connection(asyncio.Protocol):
    """One keep-alive connection: reads a request fully, answers it, reads the next."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.buffer = bytearray()
        self.busy = False
        self.call: Call | None = None
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self.take()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()
        if self.call is not None:
            self.server.finish(self.call, None)
            self.call = None

    def take(self) -> None:
        """Answers the request at the start of the buffer, once it is there and none is open."""
        request = None if self.busy else self.read()
        if request is None:
            return
        self.busy = True
        self.closing = request.headers.get("connection", "").lower() == "close"
        reply, delay = self.answer(request)
        if delay > 0:
            self.later(delay, self.deliver, reply)
        else:
            self.deliver(reply)

    def answer(self, request: Request) -> tuple[Reply, float]:
        """The reply and when to send it; a bug of this file must not look like a fault."""
        try:
            if request.path == CHAT and request.method == "POST":
                self.call, reply, delay = self.server.chat(request)
                return reply, delay
            return self.server.other(request), 0.0
        except Exception:
            traceback.print_exc()
            return failure(500, traceback.format_exc(), code="fake_server_bug"), 0.0

    def read(self) -> Request | None:
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return None
        first, *rest = self.buffer[:end].decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in rest)
        headers = {name.lower(): value.strip() for name, _, value in pairs}
        size = int(headers.get("content-length", 0))
        if len(self.buffer) < end + 4 + size:
            return None
        body = bytes(self.buffer[end + 4 : end + 4 + size])
        del self.buffer[: end + 4 + size]
        method, target, _ = first.split(" ", 2)
        url = urlsplit(target)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        return Request(method=method, path=url.path, query=query, headers=headers, body=body)

    def later(self, delay: float, action: Callable[..., None], *args: Any) -> None:
        self.timer = asyncio.get_running_loop().call_later(delay, action, *args)

    def deliver(self, reply: Reply) -> None:
        """Sends the reply as it is meant to travel; a client that has gone gets nothing.

        Counted and logged before its last byte leaves, so that who has it finds it in the log.
        """
        if self.transport.is_closing():
            return
        match reply.delivery:
            case "silent":
                self.later(SILENT_FOR, self.transport.abort)
            case "reset":
                self.end(reply)
                reset_on_close(self.transport.get_extra_info("socket"))
                self.transport.abort()
            case "cut":
                self.end(reply)
                self.transport.write(reply.head() + reply.body[: len(reply.body) // 2])
                self.transport.close()
            case "slow":
                self.transport.write(reply.head())
                self.send_pieces(reply, split(reply.body, SLOW_PIECES))
            case _:
                self.end(reply)
                self.transport.write(reply.head() + reply.body)
                self.next()

    def send_pieces(self, reply: Reply, pieces: list[bytes]) -> None:
        if self.transport.is_closing():
            return
        if pieces[1:]:
            self.transport.write(pieces[0])
            self.later(SLOW_PAUSE, self.send_pieces, reply, pieces[1:])
        else:
            self.end(reply)
            self.transport.write(pieces[0])
            self.next()

    def end(self, reply: Reply) -> None:
        if self.call is not None:
            self.server.finish(self.call, reply)
            self.call = None

    def next(self) -> None:
        self.busy = False
        if self.closing:
            self.transport.close()
        elif self.buffer:
            self.take()


def split(body: bytes, count: int) -> list[bytes]:
    size = -(-len(body) // count)
    return [body[start : start + size] for start in range(0, len(body), size)]


def reset_on_close(connection: socket.socket) -> None:
    """Makes the close send RST instead of FIN: linger on, for 0 seconds."""
    linger = (1).to_bytes(4, sys.byteorder) + (0).to_bytes(4, sys.byteorder)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)


# The process.


async def serve(server: Server, *, port: int, ready: Path) -> None:
    loop = asyncio.get_running_loop()
    listening = await loop.create_server(
        lambda: Connection(server), "127.0.0.1", port, backlog=4096
    )
    fresh = ready.with_name(ready.name + ".new")
    fresh.write_text(str(listening.sockets[0].getsockname()[1]))
    os.replace(fresh, ready)
    await listening.serve_forever()


def die_with_parent() -> None:
    """SIGTERM when the thread that started this process ends (Linux); its default action exits."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def allow_many_connections() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ready", type=Path, required=True)
    parser.add_argument("--plan", type=json.loads, default={})
    parser.add_argument("--log", type=Path)
    given = parser.parse_args()
    die_with_parent()
    allow_many_connections()
    server = Server(Plan().merged(given.plan), given.log)
    asyncio.run(serve(server, port=given.port, ready=given.ready))


class FakeServer:
    """The server for a `with` block; its files lie in a new folder below `folder`.

    Example: `with FakeServer(tmp_path, answer="first", latency=0.1) as server: server.stats()`
    """

    def __init__(self, folder: Path, *, keep_log: bool = True, **plan: Any) -> None:
        self.parent = folder
        self.keep_log = keep_log
        self.first_plan = plan
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "FakeServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, *, port: int = 0) -> None:
        """Starts the process and waits until it listens.

        Raises:
            RuntimeError: it ended, or did not listen within 30 seconds; says what it printed.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="fake_server_", dir=self.parent)).resolve()
        ready, errors = self.folder / "port", self.folder / "stderr"
        command = [sys.executable, "-m", "tests.judge.fake_server", "--port", str(port)]
        command += ["--ready", str(ready), "--plan", json.dumps(self.first_plan)]
        command += ["--log", str(self.folder / "log.jsonl")] if self.keep_log else []
        with errors.open("wb") as stderr:
            self.process = subprocess.Popen(command, cwd=REPOSITORY, stderr=stderr)
        deadline = time.monotonic() + 30
        while not ready.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the fake server did not start: {errors.read_text()}")
            time.sleep(0.01)
        self.port = int(ready.read_text())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def stats(self) -> Json:
        return self.ask("GET", "/control/stats")

    def plan(self, **changes: Any) -> Json:
        """Merges `changes` into the plan; returns the whole of it."""
        return self.ask("POST", "/control", changes)

    def reset(self) -> None:
        self.ask("POST", "/control/reset")

    def wait_for(self, received: int, *, child: "subprocess.Popen[str] | None" = None) -> None:
        """Until so many requests have come, or the child that sends them has ended."""
        deadline = time.monotonic() + 120
        while self.stats()["received"] < received and time.monotonic() < deadline:
            if child is not None and child.poll() is not None:
                return
            time.sleep(0.02)

    def settled(self) -> Json:
        """The counts once no request is open; for a plan without faults."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            stats = self.stats()
            if stats["received"] == stats["answered"] + stats["aborted"]:
                return stats
            time.sleep(0.02)
        raise AssertionError(f"requests stay open: {stats['received']} received")

    def log(self) -> list[Json]:
        lines = (self.folder / "log.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def stop(self) -> None:
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
            self.process = None

    def ask(self, method: str, path: str, body: Json | None = None) -> Json:
        """One request to the control paths, past any proxy.

        Raises:
            ValueError: the server refused it.
        """
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data=data, method=method
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=30) as response:
                answer: Json = json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(error.read().decode()) from None
        return answer


if __name__ == "__main__":
    main()
