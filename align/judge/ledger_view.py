"""What a ledger says of its judges and jobs, for people."""

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from align.judge.entries import TAKEN
from align.judge.ledger_file import connect, unreadable
from align.judge.owners import BATCH, SHORT, alive, alone


@dataclass(frozen=True, kw_only=True)
class JudgeSeen:
    """What a ledger says of one judge; money in nano-dollars.

    Attributes:
        judgments: status to number of requests.
        outcomes: how attempts ended, to their number.
        unsure: attempts that were possibly billed.
        unanswered: requests without a judgment of which nothing is under way.
    """

    identity: str
    mode: str
    attempts: int
    spent: int
    reserved: int
    uncertain: int
    judgments: Mapping[str, int]
    outcomes: Mapping[str, int]
    unsure: int
    unanswered: int

    @property
    def judged(self) -> int:
        return sum(self.judgments.values())


@dataclass(frozen=True, kw_only=True)
class JobSeen:
    """What a ledger says of one job; times in seconds since the epoch. `alive`: its process is."""

    identity: str
    title: str
    started: float
    seen: float
    total: int
    done: int
    failed: int
    alive: bool


@dataclass(frozen=True, kw_only=True)
class BatchSeen:
    """What a ledger says of a batch at a provider.

    Attributes:
        id: the provider's name for it; None where that is not known (yet).
        created: seconds since the epoch.
        requests: those without an answer.
    """

    identity: str
    endpoint: str
    id: str | None
    status: str
    created: float
    requests: int


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A ledger at one moment; jobs and batches with the newest first, of batches those that are not
    taken in yet.
    """

    judges: list[JudgeSeen]
    jobs: list[JobSeen]
    batches: list[BatchSeen]


def look(path: Path) -> Seen:
    """Reads a ledger that others may be writing, and changes nothing.

    Raises:
        JudgeError: it is no ledger of ours.
    """
    with alone(path):
        db = connect(path, create=False)
    try:
        jobs = db.execute(
            "SELECT id, identity, title, started, seen, total, done, failed FROM job "
            "ORDER BY started DESC"
        ).fetchall()
        judges = db.execute(
            "SELECT identity, capability, attempts, spent, reserved, uncertain FROM judge"
        ).fetchall()
        names = ("identity", "title", "started", "seen", "total", "done", "failed")
        batches = db.execute(
            "SELECT identity, batch.endpoint, batch.id, batch.status, created, count(attempt.id) "
            "FROM batch LEFT JOIN attempt ON owner = ? || substr(shard, 1, ?) AND finished IS NULL "
            "WHERE batch.status != ? GROUP BY shard ORDER BY created DESC",
            (BATCH, SHORT, TAKEN),
        ).fetchall()
        return Seen(
            judges=[look_at(db, *judge) for judge in judges],
            jobs=[
                JobSeen(**dict(zip(names, job, strict=True)), alive=alive(path, owner))
                for owner, *job in jobs
            ],
            batches=[
                BatchSeen(
                    identity=identity,
                    endpoint=endpoint,
                    id=id,
                    status=status,
                    created=created,
                    requests=requests,
                )
                for identity, endpoint, id, status, created, requests in batches
            ],
        )
    except sqlite3.DatabaseError as error:
        raise unreadable(path, error) from error
    finally:
        with alone(path):
            db.close()


def look_at(
    db: sqlite3.Connection, identity: str, capability: str | None, *counts: int
) -> JudgeSeen:
    def counted(query: str) -> dict[str, int]:
        return dict(db.execute(query, (identity,)).fetchall())

    judgments = counted(
        "SELECT judgment.status, count(*) FROM judgment JOIN request USING (key) "
        "WHERE identity = ? GROUP BY 1 ORDER BY 2 DESC"
    )
    outcomes = counted(
        "SELECT attempt.status, count(*) FROM attempt JOIN request USING (key) "
        "WHERE identity = ? GROUP BY 1 ORDER BY 2 DESC"
    )
    unsure = counted(
        "SELECT 'unsure', count(*) FROM attempt JOIN request USING (key) WHERE identity = ? "
        "AND finished IS NOT NULL AND cost IS NULL"
    )
    unanswered = counted(
        "SELECT 'unanswered', count(*) FROM request WHERE identity = ? AND key NOT IN "
        "(SELECT key FROM judgment) AND key NOT IN (SELECT key FROM attempt WHERE finished IS "
        "NULL) "
        "AND substr(key, 1, 6) != CAST('probe ' AS BLOB)"
    )
    return JudgeSeen(
        identity=identity,
        mode=mode_of(capability),
        attempts=counts[0],
        spent=counts[1],
        reserved=counts[2],
        uncertain=counts[3],
        judgments=judgments,
        outcomes=outcomes,
        unsure=unsure["unsure"],
        unanswered=unanswered["unanswered"],
    )


def mode_of(capability: str | None) -> str:
    """How the judge is asked; empty where nobody has probed it, or the entry is not ours."""
    try:
        return str(json.loads(capability)["mode"]) if capability else ""
    except (ValueError, KeyError, TypeError):
        return ""
