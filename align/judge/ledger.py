"""The ledger: every request, attempt and judgment of a project's judges in one SQLite file.

An attempt is written before its request is sent and its raw answer before it is read, so that
nothing is paid for twice and nothing that was paid for is lost, however the process ends. An
attempt that stands open after its process died is "possibly billed": it counts at its worst case.
What the answers say (`judgment`) is derived from `raw`; a better parser costs nothing.

One thread writes, in groups: all that has come since the last commit goes into the next, so that
the disk is waited for once per group and not once per request.
"""

import asyncio
import contextlib
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from align.errors import JudgeError
from align.judge.owners import BATCH, Owner, alone, claim_host, refuse_network_disk

APPLICATION = 0x616C676E  # "algn": marks the file as ours
SCHEMA = 1
GROUP = 512  # operations in one transaction at most
HEARTBEAT_S = 30.0

TABLES = """
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE judge (
  identity TEXT PRIMARY KEY,
  capability TEXT,                     -- JSON: the answer mode and what else was probed, once
  attempts INTEGER NOT NULL DEFAULT 0,
  spent INTEGER NOT NULL DEFAULT 0,    -- nano-dollars, as the endpoint counted
  reserved INTEGER NOT NULL DEFAULT 0, -- worst case of what is under way
  uncertain INTEGER NOT NULL DEFAULT 0 -- worst case of what was possibly billed
) STRICT, WITHOUT ROWID;
CREATE TABLE request (
  key BLOB PRIMARY KEY,                -- SHA-256 of messages, identity, sampling, mode, sample
  identity TEXT NOT NULL,
  mode TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE attempt (
  id INTEGER PRIMARY KEY,
  key BLOB NOT NULL,
  n INTEGER NOT NULL,
  owner TEXT NOT NULL,
  endpoint TEXT NOT NULL,
  started REAL NOT NULL,
  finished REAL,                       -- NULL: open
  status TEXT NOT NULL,
  http INTEGER,
  raw BLOB,
  prompt_tokens INTEGER,
  completion_tokens INTEGER,
  reserved INTEGER NOT NULL,
  cost INTEGER,                        -- nano-dollars; NULL: not known, `reserved` counts
  UNIQUE (key, n)
) STRICT;
CREATE INDEX open_attempt ON attempt (owner) WHERE finished IS NULL;
CREATE TABLE judgment (
  key BLOB PRIMARY KEY,
  attempt INTEGER NOT NULL,
  parser INTEGER NOT NULL,
  status TEXT NOT NULL,
  answer TEXT NOT NULL,
  tokens INTEGER NOT NULL,
  cost INTEGER NOT NULL                -- nano-dollars of the answer that counts
) STRICT, WITHOUT ROWID;
CREATE TABLE batch (
  shard TEXT PRIMARY KEY,              -- SHA-256 of the input file
  identity TEXT NOT NULL,
  endpoint TEXT NOT NULL,
  id TEXT,                             -- the provider's, NULL until it is known
  status TEXT NOT NULL,
  created REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE job (
  id TEXT PRIMARY KEY,                 -- what is being judged, so that a restart is the same job
  title TEXT NOT NULL,
  identity TEXT NOT NULL,
  started REAL NOT NULL,
  seen REAL NOT NULL,
  total INTEGER NOT NULL,
  done INTEGER NOT NULL,
  failed INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""

OPEN, ANSWERED, LOST = "open", "answered", "possibly billed"


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
        left: nano-dollars under way of this judge, when the budget says no.
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


class Ledger:
    """One process's hold on the file. Example: `with Ledger.open(path) as ledger: …`"""

    def __init__(
        self, path: Path, reader: sqlite3.Connection, writer: sqlite3.Connection, owner: Owner
    ) -> None:
        self.path, self.reader, self.writer, self.owner = path, reader, writer, owner
        self.operations: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._write, name="ledger", daemon=True)
        self.broken: BaseException | None = None

    @classmethod
    def open(cls, path: Path) -> Self:
        """Opens the file, made where there is none, and closes what dead processes left open.

        Raises:
            JudgeError: it is no ledger of ours, another host writes it, or it lies on a network
                disk.
        """
        path = path.absolute()
        path.parent.mkdir(parents=True, exist_ok=True)
        refuse_network_disk(path)
        with alone(path):
            reader, writer = connect(path), connect(path)
            try:
                prepare(reader, path)
                claim_host(reader, path)
                owner = Owner.new(path)
                with transaction(reader):
                    close_what_died(reader, owner)
            except (sqlite3.DatabaseError, JudgeError) as error:
                reader.close()
                writer.close()
                raise error if isinstance(error, JudgeError) else unreadable(path, error) from error
        ledger = cls(path, reader, writer, owner)
        ledger.thread.start()
        return ledger

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Waits until everything is on disk. What this process leaves open was cut off."""
        if self.broken is None:
            self._enqueue(lambda db: give_up(db, "owner = ?", self.owner.name))
        self.operations.put(None)
        self.thread.join()
        with alone(self.path):
            self.reader.close()
            self.writer.close()
        self.owner.release()

    # What is read, in the calling thread.

    def judgment(self, key: bytes) -> Judgment | None:
        row = self.reader.execute(
            "SELECT status, answer, parser, tokens, cost, attempt FROM judgment WHERE key = ?",
            (key,),
        ).fetchone()
        if row is None:
            return None
        try:
            answer = json.loads(row[1])
        except ValueError as error:
            raise unreadable(self.path, error) from error
        return Judgment(
            status=row[0], answer=answer, parser=row[2], tokens=row[3], cost=row[4], attempt=row[5]
        )

    def raw(self, attempt: int) -> bytes:
        """The stored bytes of an attempt's answer."""
        row = self.reader.execute("SELECT raw FROM attempt WHERE id = ?", (attempt,)).fetchone()
        return bytes(row[0]) if row and row[0] is not None else b""

    def from_batches(self, key: bytes) -> list[Stored]:
        """The answers that came in batches, where a request's form is not known and they stay
        unread until somebody asks.
        """
        rows = self.reader.execute(
            "SELECT id, raw, coalesce(prompt_tokens, 0) + coalesce(completion_tokens, 0), cost "
            "FROM attempt WHERE key = ? AND status = ? AND substr(owner, 1, ?) = ? ORDER BY n",
            (key, ANSWERED, len(BATCH), BATCH),
        ).fetchall()
        return [
            Stored(attempt=row[0], raw=bytes(row[1] or b""), tokens=row[2], cost=row[3])
            for row in rows
        ]

    def answered(self, key: bytes) -> int:
        """How many attempts of a request were answered, readable or not."""
        counted = "SELECT count(*) FROM attempt WHERE key = ? AND status = ?"
        return int(self.reader.execute(counted, (key, ANSWERED)).fetchone()[0])

    def capability(self, identity: str) -> dict[str, Any] | None:
        row = self.reader.execute(
            "SELECT capability FROM judge WHERE identity = ?", (identity,)
        ).fetchone()
        return json.loads(row[0]) if row and row[0] else None

    def spending(self, identity: str) -> "Spending":
        """What a judge has cost over the life of the file."""
        row = self.reader.execute(
            "SELECT attempts, spent, reserved, uncertain FROM judge WHERE identity = ?", (identity,)
        ).fetchone() or (0, 0, 0, 0)
        return Spending(attempts=row[0], spent=row[1], reserved=row[2], uncertain=row[3])

    def seconds_per_request(self, identity: str) -> float | None:
        """Median time of this judge's latest answers, None before there are any."""
        rows = self.reader.execute(
            "SELECT finished - started FROM attempt JOIN request USING (key) WHERE identity = ? "
            "AND attempt.status = ? ORDER BY id DESC LIMIT 200",
            (identity, ANSWERED),
        ).fetchall()
        return sorted(row[0] for row in rows)[len(rows) // 2] if rows else None

    # What is written, in the writer's thread.

    def begin(
        self, key: bytes, *, identity: str, mode: str, endpoint: str, reserve: int, caps: Caps
    ) -> "asyncio.Future[Begun]":
        """Writes an open attempt, so that its request may be sent once this is done."""
        return self._submit(
            lambda db: begin(
                db, key, identity=identity, mode=mode, endpoint=endpoint, reserve=reserve,
                caps=caps, owner=self.owner,
            )
        )  # fmt: skip

    def finish(self, attempt: int, **what: Any) -> "asyncio.Future[None]":
        """Writes what came of an attempt; see `finish` below for the words."""
        return self._submit(lambda db: finish(db, attempt, **what))

    def judge(self, key: bytes, judgment: Judgment) -> "asyncio.Future[None]":
        """Writes a judgment that was derived anew."""
        return self._submit(lambda db: put_judgment(db, key, judgment))

    def remember(self, identity: str, capability: Mapping[str, Any]) -> "asyncio.Future[None]":
        """Stores what was probed, unless another process was first."""
        return self._submit(
            lambda db: (
                db.execute(
                    "INSERT INTO judge (identity, capability) VALUES (?, ?) ON CONFLICT "
                    "(identity) DO "
                    "UPDATE SET capability = excluded.capability WHERE capability IS NULL",
                    (identity, json.dumps(capability, sort_keys=True)),
                )
                and None
            )
        )

    def progress(self, job: "Job") -> "asyncio.Future[None]":
        return self._submit(lambda db: put_job(db, job))

    def run(self, work: Callable[[sqlite3.Connection], Any]) -> "asyncio.Future[Any]":
        """Any other work in a transaction of the writer."""
        return self._submit(work)

    def _submit(self, work: Callable[[sqlite3.Connection], Any]) -> "asyncio.Future[Any]":
        return asyncio.wrap_future(self._enqueue(work))

    def _enqueue(self, work: Callable[[sqlite3.Connection], Any]) -> Future[Any]:
        if self.broken is not None:
            raise unreadable(self.path, self.broken)
        done: Future[Any] = Future()
        self.operations.put(Operation(work=work, done=done))
        return done

    def _write(self) -> None:
        beat = time.monotonic()
        try:
            while (group := self._group()) is not None:
                if time.monotonic() - beat > HEARTBEAT_S:
                    beat = time.monotonic()
                    group.append(Operation(work=claim_again(self.path), done=Future()))
                perform(self.writer, group)
        except BaseException as error:  # handed to whoever waits, here and from now on
            self.broken = error
            self._fail(error)

    def _group(self) -> "list[Operation] | None":
        """What has come since the last commit; waits for the first."""
        first = self.operations.get()
        if first is None:
            return None
        group = [first]
        with contextlib.suppress(queue.Empty):
            while len(group) < GROUP:
                another = self.operations.get_nowait()
                if another is None:
                    self.operations.put(None)
                    break
                group.append(another)
        return group

    def _fail(self, error: BaseException) -> None:
        while (operation := self.operations.get()) is not None:
            operation.done.set_exception(unreadable(self.path, error))


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Work for the writer, and who waits for it."""

    work: Callable[[sqlite3.Connection], Any]
    done: Future[Any]


@dataclass(frozen=True, kw_only=True)
class Job:
    """How far one command is, for `status`."""

    id: str
    title: str
    identity: str
    total: int
    done: int
    failed: int


def perform(connection: sqlite3.Connection, group: list[Operation]) -> None:
    """One transaction for the group; whoever waits is told once it is on disk."""
    results: list[Any] = []
    try:
        with transaction(connection):
            for operation in group:
                results.append(operation.work(connection))
    except sqlite3.Error as error:
        for operation in group:
            operation.done.set_exception(unreadable(Path(file_of(connection)), error))
        raise
    for operation, result in zip(group, results, strict=True):
        operation.done.set_result(result)


def file_of(connection: sqlite3.Connection) -> str:
    return str(connection.execute("PRAGMA database_list").fetchone()[2])


def connect(path: Path) -> sqlite3.Connection:
    """A connection that waits for other processes, and trusts nothing in the file's schema."""
    try:
        connection = sqlite3.connect(
            path, isolation_level=None, timeout=60, check_same_thread=False
        )
        for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")
        connection.execute("PRAGMA journal_mode=WAL")
    except sqlite3.DatabaseError as error:
        raise unreadable(path, error) from error
    return connection


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def unreadable(path: Path, error: BaseException) -> JudgeError:
    return JudgeError(
        f"judge.ledger={path}: {error}; it cannot be used. Free the disk or mend the file (sqlite3 "
        "FILE .recover), or name another one; what is in it is kept"
    )


def prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Makes the tables in an empty file; refuses one that is not exactly ours.

    Raises:
        JudgeError: another program's file, another schema, or triggers and views that would run
            somebody else's statements.
    """
    with transaction(connection):
        if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            for statement in TABLES.split(";\n"):
                if statement.strip():
                    connection.execute(statement)
            connection.execute(f"PRAGMA application_id={APPLICATION}")
            connection.execute(f"PRAGMA user_version={SCHEMA}")
            return
    found = {
        name: (kind, sql)
        for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master")
        if not name.startswith("sqlite_")
    }
    application, version = (
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("application_id", "user_version")
    )
    if application != APPLICATION or version != SCHEMA or found != expected():
        raise JudgeError(
            f"judge.ledger={path}: not a ledger that this version of align made (its tables "
            "differ), so nothing in it is trusted; name another file with judge.ledger=FILE"
        )


def expected() -> dict[str, tuple[str, str]]:
    """The schema as SQLite tells it of a fresh file."""
    memory = sqlite3.connect(":memory:")
    memory.executescript(TABLES)
    rows = memory.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
    memory.close()
    return {name: (kind, sql) for kind, name, sql in rows if not name.startswith("sqlite_")}


def claim_again(path: Path) -> Callable[[sqlite3.Connection], None]:
    return lambda db: claim_host(db, path, inside=True)


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
        return Begun(outcome="requests", under_way=reserved)
    if caps.nano_usd is not None and spent + reserved + uncertain + reserve > caps.nano_usd:
        return Begun(outcome="budget", under_way=reserved)
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
    """Closes an attempt with what came of it, its price, and its judgment where it has one.

    Args:
        status: "answered", or in words what went wrong.
        cost: in nano-dollars; None where it is not known, `reserved` then counts.
    """
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
    """What a ledger says of one job; times in seconds since the epoch."""

    identity: str
    title: str
    started: float
    seen: float
    total: int
    done: int
    failed: int


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A ledger at one moment; `jobs` with the newest first."""

    judges: list[JudgeSeen]
    jobs: list[JobSeen]


def look(path: Path) -> Seen:
    """Reads a ledger that others may be writing, and changes nothing.

    Raises:
        JudgeError: it is no ledger of ours.
    """
    with alone(path):
        db = connect(path)
    try:
        prepare(db, path)
        jobs = db.execute(
            "SELECT identity, title, started, seen, total, done, failed FROM job "
            "ORDER BY started DESC"
        ).fetchall()
        judges = db.execute(
            "SELECT identity, capability, attempts, spent, reserved, uncertain FROM judge"
        ).fetchall()
        names = ("identity", "title", "started", "seen", "total", "done", "failed")
        return Seen(
            judges=[look_at(db, *judge) for judge in judges],
            jobs=[JobSeen(**dict(zip(names, job, strict=True))) for job in jobs],
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
        mode=json.loads(capability)["mode"] if capability else "",
        attempts=counts[0],
        spent=counts[1],
        reserved=counts[2],
        uncertain=counts[3],
        judgments=judgments,
        outcomes=outcomes,
        unsure=unsure["unsure"],
        unanswered=unanswered["unanswered"],
    )
