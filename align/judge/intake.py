"""Takes a provider's finished batch into the ledger: each line the end of one attempt."""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import openai
from openai.types import Batch

from align.judge import endpoint
from align.judge.answers import completion
from align.judge.asker import Asker
from align.judge.batch_api import ABSENT, BatchApi, Refused
from align.judge.endpoint import Endpoint, Reply
from align.judge.entries import ANSWERED, finish
from align.judge.outcome import UNASKED, ending, unasked
from align.judge.shards import EXPIRED, close, forget, owner_of
from align.notice import notice

AT_ONCE = 300  # lines in one transaction
FAILED = "failed"  # an error without a status
UNTOUCHED = ("expired", "cancelled", "failed")  # what they did not answer, they did not begin
# What a second batch would not mend; the live path asks these again, and tells what is wrong.
PERMANENT = (
    endpoint.ANSWERED, endpoint.GARBLED, endpoint.OVERFLOWED, endpoint.FILTERED, endpoint.REJECTED,
    endpoint.STOP,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a result file."""

    key: bytes
    reply: Reply


@dataclass
class Counts:
    """What a shard came to.

    Attributes:
        again: requests that another batch may answer.
        unknown: lines of requests that the shard does not hold.
        garbled: lines that say nothing.
        lost: a result file is gone at the provider.
        why: what the provider said of the last request that it did not answer.
    """

    answered: int = 0
    again: int = 0
    unknown: int = 0
    garbled: int = 0
    lost: bool = False
    why: str = ""


async def take_in(api: BatchApi, asker: Asker, *, shard: str, batch: Batch, path: Path) -> Counts:
    """Everything that the batch brought; a second time changes nothing."""
    counts = Counts()
    for suffix, file in (("output", batch.output_file_id), ("error", batch.error_file_id)):
        if file is None:
            continue
        place = path.with_name(f"{path.name}.{suffix}")
        try:
            await api.download(file, place)
        except Refused as error:
            if error.reply.http not in ABSENT:
                raise
            counts.lost = True
            continue
        for lines in batched_lines(place, asker.endpoint, counts):
            await asker.ledger.run(
                partial(put, asker=asker, shard=shard, lines=lines, counts=counts)
            )
    unsure = counts.lost or counts.garbled > 0 or batch.status not in UNTOUCHED
    counts.again += await asker.ledger.run(
        lambda db: close(db, shard, identity=asker.settings.judge, billed=unsure)
    )
    forget(path)
    asker.good += counts.answered
    tell(counts, batch)
    return counts


def batched_lines(path: Path, at: Endpoint, counts: Counts) -> Iterator[list[Line]]:
    """The file's lines, `AT_ONCE` at a time; what is none is counted."""
    lines: list[Line] = []
    with path.open("rb") as file:
        for raw in file:
            line = parse(raw, at)
            if line is not None:
                lines.append(line)
            elif raw.strip():
                counts.garbled += 1
            if len(lines) == AT_ONCE:
                yield lines
                lines = []
    if lines:
        yield lines


def parse(raw: bytes, at: Endpoint) -> Line | None:
    """One line of a result file, None where it is none."""
    try:
        line = json.loads(at.clean(raw))
        key = bytes.fromhex(line["custom_id"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    response, error = line.get("response"), line.get("error")
    if isinstance(response, Mapping):
        return Line(key=key, reply=answered(response, at))
    code = error.get("code") if isinstance(error, Mapping) else None
    kind = EXPIRED if code in ("batch_expired", "batch_cancelled") else FAILED
    told = json.dumps(error)
    return Line(key=key, reply=Reply(kind=kind, raw=told.encode(), why=told[:200]))


def answered(response: Mapping[str, Any], at: Endpoint) -> Reply:
    """A line's response in the words that live replies have too."""
    status, body = response.get("status_code"), response.get("body")
    raw = json.dumps(body).encode()
    if status == 200:
        found = completion(raw)
        if found is None:
            return Reply(kind=endpoint.GARBLED, raw=raw, http=status, why=f"{raw[:80]!r}")
        return Reply(kind=endpoint.ANSWERED, raw=raw, http=status, body=found)
    if not isinstance(status, int) or not 100 <= status < 600:
        return Reply(kind=FAILED, raw=raw, why=f"{raw[:80]!r}")
    error = body.get("error") if isinstance(body, Mapping) else None
    message = error.get("message") if isinstance(error, Mapping) else body
    request = httpx2.Request("POST", at.url)
    return at.refused(
        openai.APIStatusError(
            str(message),
            response=httpx2.Response(status, content=raw, request=request),
            body=error,
        )
    )


def put(
    db: sqlite3.Connection, *, asker: Asker, shard: str, lines: Sequence[Line], counts: Counts
) -> None:
    """Ends the attempts that are still open. What was not answered cost nothing."""
    for line in lines:
        found = db.execute(
            "SELECT id, reserved, finished, status FROM attempt WHERE key = ? AND owner = ?",
            (line.key, owner_of(shard)),
        ).fetchone()
        if found is None:
            counts.unknown += 1
            continue
        attempt, reserved, finished, status = found
        if finished is not None:  # by a process that was killed half-way
            counts.answered += status == ANSWERED
            counts.again += status not in PERMANENT
            continue
        kind = line.reply.kind
        end = ending(line.reply, identity=asker.settings.judge, price=asker.price, reserve=reserved)
        if kind == endpoint.DOWN:  # of a batch, the provider says so itself
            end["cost"] = 0
        judgment = unasked(line.reply, attempt=attempt) if kind in UNASKED else None
        finish(db, attempt, **end, key=line.key, judgment=judgment)
        counts.answered += kind == endpoint.ANSWERED
        counts.again += kind not in PERMANENT
        counts.why = counts.why if kind == endpoint.ANSWERED else line.reply.why


def tell(counts: Counts, batch: Batch) -> None:
    """One line, with what went wrong where something did."""
    parts = [f"batch {batch.id} {batch.status}: {counts.answered:,} answers taken in"]
    if counts.again:
        why = f" (the last: {counts.why})" if counts.why else ""
        parts.append(f"{counts.again:,} requests without one{why}")
    if counts.unknown:
        parts.append(f"{counts.unknown:,} lines of requests that were never in it left out")
    if counts.garbled:
        parts.append(f"{counts.garbled:,} lines that are no results left out")
    if counts.lost:
        parts.append("a result file is gone; its requests count as possibly billed")
    notice("; ".join(parts))
