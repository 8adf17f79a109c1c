"""Shards: files of requests for a provider's Batch API, and what the ledger knows of them.

A shard is called by the SHA-256 of its file. Its row, its open attempts and its file come to be in
one transaction, so that whatever is found after a crash belongs together.
"""

import contextlib
import fcntl
import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from align.jsonl import dump_line
from align.judge.entries import TAKEN, WRITTEN, Caps, begin, give_up, settle
from align.judge.ledger import Ledger
from align.judge.owners import BATCH, SHORT, Owner
from align.judge.request import Request

MOST_REQUESTS, MOST_BYTES = 50_000, 190_000_000  # OpenAI takes 50,000 and 200 MB
URL: Final = "/v1/chat/completions"
EXPIRED = "expired"  # of an attempt: never done, not billed


def folder(ledger: Path) -> Path:
    """Where a ledger's shard files stand."""
    return ledger.with_name(f"{ledger.name}-batches")


def owner_of(shard: str) -> str:
    """The name under which a shard's attempts are open."""
    return f"{BATCH}{shard[:SHORT]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """What the ledger has to know of one line."""

    key: bytes
    mode: str
    reserve: int


class Draft:
    """A shard that is being written. Lines go to the disk as they come."""

    def __init__(self, path: Path, *, most: int) -> None:
        self.path, self.most = path, most
        self.file = path.open("wb")
        self.hash = hashlib.sha256()
        self.size = 0
        self.entries: dict[bytes, Entry] = {}

    def add(self, wanted: Request, *, reserve: int) -> bool:
        """Takes a request in; False where it does not fit."""
        line = dump_line(
            {
                "custom_id": wanted.key.hex(),
                "method": "POST",
                "url": URL,
                "body": wanted.body,
            }
        )
        if self.entries and not self.fits(len(line)):
            return False
        self.put(line.rstrip(), Entry(key=wanted.key, mode=wanted.mode, reserve=reserve))
        return True

    def fits(self, size: int) -> bool:
        return len(self.entries) < self.most and self.size + size <= MOST_BYTES

    def put(self, line: bytes, entry: Entry) -> None:
        block = b"\n" + line if self.entries else line  # the last line stays open until `close`
        self.file.write(block)
        self.hash.update(block)
        self.size += len(block)
        self.entries[entry.key] = entry

    def close(self, used: Callable[[str], bool]) -> str:
        """Puts the file on disk and tells its name. The same requests may have been in a batch
        before: blanks at the end of the last line then make it another one.
        """
        end = b"\n"
        while used(name := self.named(end)):
            end = b" " + end
        self.file.write(end)
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return name

    def named(self, end: bytes) -> str:
        whole = self.hash.copy()
        whole.update(end)
        return whole.hexdigest()

    def only(self, keys: Sequence[bytes]) -> "Draft":
        """A draft of some of a closed one's lines, in its place."""
        wanted = set(keys)
        fresh = Draft(self.path.with_name(f"again-{self.path.name}"), most=self.most)
        with self.path.open("rb") as file:
            for line, entry in zip(file, self.entries.values(), strict=True):
                if entry.key in wanted:
                    fresh.put(line.rstrip(), entry)
        os.replace(fresh.path, self.path)
        fresh.path = self.path
        return fresh

    def discard(self) -> None:
        self.file.close()
        self.path.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the ledger says of a shard; `id` is the provider's name for its batch."""

    shard: str
    endpoint: str
    id: str | None
    status: str
    created: float


def row(ledger: Ledger, owner: str) -> Row | None:
    """The shard whose attempts are open under that name."""
    found = ledger.rows(
        "SELECT shard, endpoint, id, status, created FROM batch WHERE substr(shard, 1, ?) = ?",
        SHORT,
        owner.removeprefix(BATCH),
    )
    names = ("shard", "endpoint", "id", "status", "created")
    return Row(**dict(zip(names, found[0], strict=True))) if found else None


def exists(ledger: Ledger, shard: str) -> bool:
    return bool(ledger.rows("SELECT 1 FROM batch WHERE shard = ?", shard))


def opened(ledger: Ledger, owner: str) -> int:
    """How many of its requests are without an answer."""
    counted = "SELECT count(*) FROM attempt WHERE owner = ? AND finished IS NULL"
    return int(ledger.rows(counted, owner)[0][0])


def history(ledger: Ledger, key: bytes) -> list[tuple[str, float | None, str]]:
    """(owner, finished, status) of each attempt of a request."""
    return ledger.rows("SELECT owner, finished, status FROM attempt WHERE key = ?", key)


# What follows runs in the ledger's writer, each in one transaction.


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Whether a draft became a shard; else nothing was changed, and `going` are the requests that
    could.
    """

    whole: bool
    going: Sequence[bytes]
    cap: str = ""


def admit(
    db: sqlite3.Connection, draft: Draft, *, shard: str, identity: str, endpoint: str, caps: Caps,
    owner: Owner,
) -> Admission:  # fmt: skip
    """The row, an open attempt for each request at its worst case, and the file in its place."""
    db.execute("SAVEPOINT shard")
    going, cap = [], ""
    for entry in draft.entries.values():
        begun = begin(
            db, entry.key, identity=identity, mode=entry.mode, endpoint=endpoint,
            reserve=entry.reserve, caps=caps, owner=owner, batch=owner_of(shard),
        )  # fmt: skip
        if begun.outcome in ("budget", "requests"):
            cap = begun.outcome
            break
        if begun.outcome == "go":
            going.append(entry.key)
    there = db.execute("SELECT 1 FROM batch WHERE shard = ?", (shard,)).fetchone()
    whole = len(going) == len(draft.entries) and there is None
    if whole:
        db.execute(
            "INSERT INTO batch VALUES (?, ?, ?, NULL, ?, ?)",
            (shard, identity, endpoint, WRITTEN, time.time()),
        )
        move(draft.path, draft.path.with_name(shard))
    else:
        db.execute("ROLLBACK TO shard")
    db.execute("RELEASE shard")
    return Admission(whole=whole, going=going, cap=cap)


def move(source: Path, target: Path) -> None:
    try:
        os.replace(source, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:  # in the one family of errors that the ledger's writer passes on
        raise sqlite3.OperationalError(str(error)) from error


def mark(db: sqlite3.Connection, shard: str, *, status: str, id: str | None = None) -> None:
    db.execute("UPDATE batch SET status = ?, id = ? WHERE shard = ?", (status, id, shard))


def withdraw(db: sqlite3.Connection, shard: str, *, identity: str) -> None:
    """As if the shard had never been: it was not submitted."""
    count, reserved = db.execute(
        "SELECT count(*), coalesce(sum(reserved), 0) FROM attempt WHERE owner = ? AND finished IS "
        "NULL",
        (owner_of(shard),),
    ).fetchone()
    db.execute("DELETE FROM attempt WHERE owner = ? AND finished IS NULL", (owner_of(shard),))
    settle(db, identity, reserved=reserved, cost=0)
    db.execute("UPDATE judge SET attempts = attempts - ? WHERE identity = ?", (count, identity))
    db.execute("DELETE FROM batch WHERE shard = ?", (shard,))


def close(db: sqlite3.Connection, shard: str, *, identity: str, billed: bool) -> int:
    """Marks a shard as taken in; what is still open was not done, or if `billed` perhaps was.
    Returns how many those were.
    """
    where = "owner = ? AND finished IS NULL"
    count, reserved = db.execute(
        f"SELECT count(*), coalesce(sum(reserved), 0) FROM attempt WHERE {where}",
        (owner_of(shard),),
    ).fetchone()
    if billed:
        give_up(db, "owner = ?", owner_of(shard))
    else:
        db.execute(
            f"UPDATE attempt SET status = ?, finished = ?, cost = 0 WHERE {where}",
            (EXPIRED, time.time(), owner_of(shard)),
        )
        settle(db, identity, reserved=reserved, cost=0)
    db.execute("UPDATE batch SET status = ? WHERE shard = ?", (TAKEN, shard))
    return int(count)


def sweep(db: sqlite3.Connection, place: Path, owner: Owner) -> None:
    """Removes files of shards that are taken in, and drafts of processes that are gone."""
    db.execute(  # taken in by a process that was killed before it could say so
        "UPDATE batch SET status = ? WHERE id IS NOT NULL AND NOT EXISTS (SELECT 1 FROM attempt "
        "WHERE owner = ? || substr(shard, 1, ?) AND finished IS NULL)",
        (TAKEN, BATCH, SHORT),
    )
    rows = dict(db.execute("SELECT shard, status FROM batch").fetchall())
    for path in place.iterdir():
        if path.suffix == ".part":
            dead = not owner.lives(path.stem.removeprefix("again-").split(".")[0])
        else:
            dead = rows.get(path.name.split(".")[0], TAKEN) == TAKEN
        if dead:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def lock(path: Path) -> IO[bytes] | None:
    """A hold on a shard's file that dies with this process; None while another one has it."""
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat())
    except BlockingIOError:
        gone = True
    if gone:  # somebody else holds it, or just removed it
        file.close()
        return None
    return file


def forget(path: Path) -> None:
    """Removes a shard's file and what was downloaded beside it."""
    for suffix in ("", ".output", ".error"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
