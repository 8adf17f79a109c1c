"""What is written into the ledger, a function an entry; each runs inside one transaction.

Money is in nano-dollars throughout.
"""

import json
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from align.judge.owners import BATCH, Owner

OPEN, ANSWERED, LOST = "open", "answered", "possibly billed"  # of attempts
# Of batches. `CREATING`: the provider may have it, though its id was never saved.
WRITTEN, CREATING, SUBMITTED, TAKEN = "written", "creating", "submitted", "taken"


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """What a request came to; `answer` is a reading as JSON."""

    status: str
    answer: Mapping[str, Any]
    parser: int
    tokens: int
    cost: int
    attempt: int = 0


@dataclass(frozen=True, kw_only=True)
class Begun:
    """The answer to `begin`: `go`, or why not.

    Attributes:
        outcome: "go", "known" (another process has its judgment), "busy" (another process is
            asking), "batched" (a provider's batch holds it), or "budget" / "requests" (a cap would
            be passed).
        attempt: its id when `go`.
        n: how many attempts the request has had before.
        under_way: nano-dollars that will be settled soon, when the budget says no.
    """

    outcome: str
    attempt: int = 0
    n: int = 0
    under_way: int = 0


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A batch's answer as it stands in the ledger; cost in nano-dollars, None where not known."""

    attempt: int
    raw: bytes
    tokens: int
    cost: int | None


@dataclass(frozen=True, kw_only=True)
class Spending:
    """Nano-dollars: as counted by the endpoint, the worst case of what is under way, and that of
    what was possibly billed.
    """

    attempts: int
    spent: int
    reserved: int
    uncertain: int


@dataclass(frozen=True, kw_only=True)
class Caps:
    """What a judge may cost over the life of the ledger; None: no cap."""

    nano_usd: int | None
    attempts: int | None


@dataclass(frozen=True, kw_only=True)
class Job:
    """How far one command is, for `status`."""

    id: str
    title: str
    identity: str
    total: int
    done: int
    failed: int


def close_what_died(db: sqlite3.Connection, me: Owner) -> None:
    """Open attempts of processes that are gone become "possibly billed", at their worst case."""
    owners = [
        row[0] for row in db.execute("SELECT DISTINCT owner FROM attempt WHERE finished IS NULL")
    ]
    for owner in owners:
        if not me.lives(owner):
            give_up(db, "owner = ?", owner)


def give_up(db: sqlite3.Connection, where: str, value: Any) -> None:
    """Closes open attempts whose fate nobody will learn."""
    rows = db.execute(
        "SELECT attempt.id, identity, reserved FROM attempt JOIN request USING (key) "
        f"WHERE finished IS NULL AND {where}",
        (value,),
    ).fetchall()
    for attempt, identity, reserved in rows:
        db.execute(
            "UPDATE attempt SET status = ?, finished = ? WHERE id = ?", (LOST, time.time(), attempt)
        )
        settle(db, identity, reserved=reserved, cost=None)


def settle(db: sqlite3.Connection, identity: str, *, reserved: int, cost: int | None) -> None:
    """Turns a reservation into what was spent, or where that is unknown into what may have been."""
    spent, uncertain = (0, reserved) if cost is None else (cost, 0)
    db.execute(
        "UPDATE judge SET reserved = reserved - ?, spent = spent + ?, uncertain = uncertain + ? "
        "WHERE identity = ?",
        (reserved, spent, uncertain, identity),
    )


def begin(
    db: sqlite3.Connection, key: bytes, *, identity: str, mode: str, endpoint: str, reserve: int,
    caps: Caps, owner: Owner, batch: str | None = None,
) -> Begun:  # fmt: skip
    """Opens an attempt of the owner, or of a batch that it hands to the provider."""
    if db.execute("SELECT 1 FROM judgment WHERE key = ?", (key,)).fetchone():
        return Begun(outcome="known")
    before = db.execute(
        "SELECT owner, finished FROM attempt WHERE key = ? ORDER BY n", (key,)
    ).fetchall()
    for who in {who for who, finished in before if finished is None}:
        if owner.lives(who):
            return Begun(outcome="batched" if who.startswith(BATCH) else "busy")
        give_up(db, "owner = ?", who)
    db.execute("INSERT OR IGNORE INTO judge (identity) VALUES (?)", (identity,))
    attempts, spent, reserved, uncertain = db.execute(
        "SELECT attempts, spent, reserved, uncertain FROM judge WHERE identity = ?", (identity,)
    ).fetchone()
    if caps.attempts is not None and attempts >= caps.attempts:
        return Begun(outcome="requests")
    if caps.nano_usd is not None and spent + reserved + uncertain + reserve > caps.nano_usd:
        close_what_died(db, owner)  # nobody settles that any more
        return Begun(outcome="budget", under_way=soon_settled(db, identity))
    db.execute("INSERT OR IGNORE INTO request VALUES (?, ?, ?)", (key, identity, mode))
    cursor = db.execute(
        "INSERT INTO attempt (key, n, owner, endpoint, started, status, reserved) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (key, len(before) + 1, batch or owner.name, endpoint, time.time(), OPEN, reserve),
    )
    db.execute(
        "UPDATE judge SET attempts = attempts + 1, reserved = reserved + ? WHERE identity = ?",
        (reserve, identity),
    )
    return Begun(outcome="go", attempt=int(cursor.lastrowid or 0), n=len(before))


def soon_settled(db: sqlite3.Connection, identity: str) -> int:
    """Nano-dollars reserved by what is under way; batches, which take a day, left out."""
    (reserved,) = db.execute(
        "SELECT coalesce(sum(reserved), 0) FROM attempt JOIN request USING (key) "
        "WHERE finished IS NULL AND identity = ? AND substr(owner, 1, ?) != ?",
        (identity, len(BATCH), BATCH),
    ).fetchone()
    return int(reserved)


def finish(
    db: sqlite3.Connection,
    attempt: int,
    *,
    identity: str,
    status: str,
    reserved: int,
    cost: int | None,
    http: int | None = None,
    raw: bytes | None = None,
    prompt_tokens: int | None = None,
    completion_tokens: int | None = None,
    key: bytes = b"",
    judgment: Judgment | None = None,
) -> None:
    """Closes an attempt with what came of it, its price, and its judgment where it has one; also
    one that was given up meanwhile.

    Args:
        status: "answered", or in words what went wrong.
        cost: in nano-dollars; None where it is not known, `reserved` then counts.
    """
    query = "SELECT finished IS NOT NULL FROM attempt WHERE id = ?"
    if db.execute(query, (attempt,)).fetchone()[0]:
        db.execute(
            "UPDATE judge SET reserved = reserved + ?, uncertain = uncertain - ? "
            "WHERE identity = ?",
            (reserved, reserved, identity),
        )
    db.execute(
        "UPDATE attempt SET finished = ?, status = ?, http = ?, raw = ?, prompt_tokens = ?, "
        "completion_tokens = ?, cost = ? WHERE id = ?",
        (time.time(), status, http, raw, prompt_tokens, completion_tokens, cost, attempt),
    )
    settle(db, identity, reserved=reserved, cost=cost)
    if judgment is not None:
        put_judgment(db, key, judgment, attempt=attempt)


def put_judgment(
    db: sqlite3.Connection, key: bytes, judgment: Judgment, *, attempt: int | None = None
) -> None:
    db.execute(
        "INSERT OR REPLACE INTO judgment VALUES (?, ?, ?, ?, ?, ?, ?)",
        (
            key,
            judgment.attempt if attempt is None else attempt,
            judgment.parser,
            judgment.status,
            json.dumps(judgment.answer),
            judgment.tokens,
            judgment.cost,
        ),
    )


def put_job(db: sqlite3.Connection, job: Job) -> None:
    now = time.time()
    db.execute(
        "INSERT INTO job VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
        "seen = excluded.seen, total = excluded.total, done = excluded.done, "
        "failed = excluded.failed",
        (job.id, job.title, job.identity, now, now, job.total, job.done, job.failed),
    )
