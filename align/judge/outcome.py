"""What a reply comes to in the ledger: its judgment, its status and its price."""

from typing import Any

from align.judge import answers, endpoint
from align.judge.answers import PARSER, REFUSAL, Reading, Usage, usage
from align.judge.endpoint import Reply
from align.judge.entries import ANSWERED, Judgment
from align.judge.forms import Form
from align.judge.prices import Price

UNASKED = (endpoint.OVERFLOWED, endpoint.FILTERED)  # refused for good, for what they hold
UNSURE = (endpoint.GARBLED, endpoint.DOWN, endpoint.FILTERED)  # some of them are charged


def judgment_of(reply: Reply, form: Form, *, price: Price, attempt: int) -> Judgment | None:
    """What a reply says of a question of that form, None where it says nothing."""
    if reply.kind in UNASKED:
        return unasked(reply, attempt=attempt)
    if reply.kind != endpoint.ANSWERED:
        return None
    reading = answers.read(reply.body, form)
    counted = usage(reply.body) or Usage(prompt=0, completion=0)
    return Judgment(
        status=reading.status,
        answer=reading.to_json(),
        parser=PARSER,
        tokens=counted.prompt + counted.completion,
        cost=price.cost(prompt=counted.prompt, completion=counted.completion),
        attempt=attempt,
    )


def unasked(reply: Reply, *, attempt: int) -> Judgment:
    """Of a request that is longer than the model's window, or that a content filter held."""
    status = "overflow" if reply.kind == endpoint.OVERFLOWED else REFUSAL
    reading = Reading(status=status, why=reply.why)
    return Judgment(
        status=reading.status, answer=reading.to_json(), parser=PARSER, tokens=0, cost=0,
        attempt=attempt,
    )  # fmt: skip


def ending(reply: Reply, *, identity: str, price: Price, reserve: int) -> dict[str, Any]:
    """What `ledger.finish` is told about a reply. An answer costs what the endpoint counted; what
    was refused cost nothing; what broke, was filtered, or not counted, may have cost the worst.
    """
    answered = reply.kind == endpoint.ANSWERED
    counted = usage(reply.body) if answered else None
    free = not answered and reply.kind not in UNSURE
    cost = 0 if free else None
    if counted:
        cost = price.cost(prompt=counted.prompt, completion=counted.completion)
    return {
        "identity": identity,
        "status": ANSWERED if answered else reply.kind,
        "reserved": reserve,
        "cost": cost,
        "http": reply.http,
        "raw": reply.raw or (reply.why.encode() or None),
        "prompt_tokens": counted.prompt if counted else None,
        "completion_tokens": counted.completion if counted else None,
    }
