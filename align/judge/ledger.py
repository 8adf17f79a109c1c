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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from align.errors import JudgeError
from align.judge.entries import (
    ANSWERED,
    Begun,
    Caps,
    Job,
    Judgment,
    Spending,
    Stored,
    begin,
    close_what_died,
    finish,
    give_up,
    put_job,
    put_judgment,
)
from align.judge.ledger_file import connect, prepare, transaction, unreadable
from align.judge.owners import BATCH, Owner, alone, claim_host, refuse_network_disk

GROUP = 512  # operations in one transaction at most
HEARTBEAT_S = 30.0


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
                prepare(reader)
                claim_host(reader, path)
                owner = Owner.new(path)
                owner.sweep()
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
            self._enqueue(Operation(work=lambda db: give_up(db, "owner = ?", self.owner.name)))
        self.operations.put(None)
        self.thread.join()
        with alone(self.path):
            self.reader.close()
            self.writer.close()
        self.owner.release()

    # What is read, in the calling thread.

    def rows(self, query: str, *values: Any) -> list[Any]:
        """
        Raises:
            JudgeError: the file cannot be read.
        """
        try:
            return self.reader.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:  # a damaged page, for instance
            raise unreadable(self.path, error) from error

    def judgment(self, key: bytes) -> Judgment | None:
        rows = self.rows(
            "SELECT status, answer, parser, tokens, cost, attempt FROM judgment WHERE key = ?", key
        )
        if not rows:
            return None
        status, answer, parser, tokens, cost, attempt = rows[0]
        try:
            answer = json.loads(answer)
        except ValueError as error:
            raise unreadable(self.path, error) from error
        return Judgment(
            status=status, answer=answer, parser=parser, tokens=tokens, cost=cost, attempt=attempt
        )

    def raw(self, attempt: int) -> bytes:
        """The stored bytes of an attempt's answer."""
        rows = self.rows("SELECT raw FROM attempt WHERE id = ?", attempt)
        return bytes(rows[0][0]) if rows and rows[0][0] is not None else b""

    def from_batches(self, key: bytes) -> list[Stored]:
        """The answers that came in batches, where a request's form is not known and they stay
        unread until somebody asks.
        """
        rows = self.rows(
            "SELECT id, raw, coalesce(prompt_tokens, 0) + coalesce(completion_tokens, 0), cost "
            "FROM attempt WHERE key = ? AND status = ? AND substr(owner, 1, ?) = ? ORDER BY n",
            key, ANSWERED, len(BATCH), BATCH,
        )  # fmt: skip
        return [
            Stored(attempt=row[0], raw=bytes(row[1] or b""), tokens=row[2], cost=row[3])
            for row in rows
        ]

    def answered(self, key: bytes) -> int:
        """How many attempts of a request were answered, readable or not."""
        counted = "SELECT count(*) FROM attempt WHERE key = ? AND status = ?"
        return int(self.rows(counted, key, ANSWERED)[0][0])

    def capability(self, identity: str) -> Any:
        """What was stored of it, None where nothing was."""
        rows = self.rows("SELECT capability FROM judge WHERE identity = ?", identity)
        try:
            return json.loads(rows[0][0]) if rows and rows[0][0] else None
        except ValueError as error:
            raise unreadable(self.path, error) from error

    def is_open(self, key: bytes) -> bool:
        """Whether somebody is asking it, as far as the file says."""
        query = "SELECT 1 FROM attempt WHERE key = ? AND finished IS NULL"
        return bool(self.rows(query, key))

    def has_verdicts(self, identity: str) -> bool:
        """Whether any request of this judge has led to a verdict."""
        query = (
            "SELECT 1 FROM judgment JOIN request USING (key) "
            "WHERE identity = ? AND judgment.status = 'ok' LIMIT 1"
        )
        return bool(self.rows(query, identity))

    def spending(self, identity: str) -> Spending:
        """What a judge has cost over the life of the file."""
        rows = self.rows(
            "SELECT attempts, spent, reserved, uncertain FROM judge WHERE identity = ?", identity
        )
        attempts, spent, reserved, uncertain = rows[0] if rows else (0, 0, 0, 0)
        return Spending(attempts=attempts, spent=spent, reserved=reserved, uncertain=uncertain)

    def seconds_per_request(self, identity: str) -> float | None:
        """Median time of this judge's latest live answers, None before there are any."""
        rows = self.rows(
            "SELECT finished - started FROM attempt JOIN request USING (key) WHERE identity = ? "
            "AND attempt.status = ? AND substr(owner, 1, ?) != ? ORDER BY id DESC LIMIT 200",
            identity, ANSWERED, len(BATCH), BATCH,
        )  # fmt: skip
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
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        self._enqueue(Operation(work=work, loop=loop, done=done))
        return done

    def _enqueue(self, operation: "Operation") -> None:
        if self.broken is not None:
            raise unreadable(self.path, self.broken)
        self.operations.put(operation)

    def _write(self) -> None:
        beat = time.monotonic()
        try:
            while (group := self._group()) is not None:
                if time.monotonic() - beat > HEARTBEAT_S:
                    beat = time.monotonic()
                    claim_host(self.writer, self.path)
                perform(self.writer, group)
        except BaseException as error:  # handed to whoever waits, here and from now on
            self.broken = error
            self._fail(error)

    def _group(self) -> "list[Operation] | None":
        """What has come since the last commit; waits for the first, but for no longer than a sign
        of life is due. None: there is nothing more to come.
        """
        group: list[Operation] = []
        with contextlib.suppress(queue.Empty):
            while len(group) < GROUP:
                another = self.operations.get(block=not group, timeout=HEARTBEAT_S)
                if another is None:
                    if not group:
                        return None
                    self.operations.put(None)
                    break
                group.append(another)
        return group

    def _fail(self, error: BaseException) -> None:
        while (operation := self.operations.get()) is not None:
            deliver([operation], error=unreadable(self.path, error))


@dataclass(frozen=True, kw_only=True)
class Operation:
    """Work for the writer, and who waits for it, if anybody does."""

    work: Callable[[sqlite3.Connection], Any]
    loop: asyncio.AbstractEventLoop | None = None
    done: "asyncio.Future[Any] | None" = None


def perform(connection: sqlite3.Connection, group: list[Operation]) -> None:
    """One transaction for the group; whoever waits is told once it is on disk."""
    if not group:
        return
    try:
        with transaction(connection):
            results = [operation.work(connection) for operation in group]
    except BaseException as error:
        deliver(group, error=unreadable(Path(file_of(connection)), error))
        raise
    deliver(group, results=results)


def deliver(
    group: Sequence[Operation], *, results: Sequence[Any] = (), error: BaseException | None = None
) -> None:
    """Tells those who wait, each event loop once for all of its own: waking a loop is a system
    call.
    """
    told: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for operation, result in zip_longest(group, results):
        if operation.loop is not None and operation.done is not None:
            told.setdefault(operation.loop, []).append((operation.done, result))
    for loop, waiting in told.items():
        with contextlib.suppress(RuntimeError):  # a loop that has ended has nobody waiting
            loop.call_soon_threadsafe(tell, waiting, error)


def tell(waiting: list[tuple["asyncio.Future[Any]", Any]], error: BaseException | None) -> None:
    """Within the loop; who was cancelled meanwhile is passed over."""
    for done, result in waiting:
        if done.done():
            continue
        if error is None:
            done.set_result(result)
        else:
            done.set_exception(error)


def file_of(connection: sqlite3.Connection) -> str:
    return str(connection.execute("PRAGMA database_list").fetchone()[2])
