"""The ledger's file: its tables, and that nothing is trusted that is not exactly ours."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from align.errors import JudgeError

APPLICATION = 0x616C676E  # "algn": marks the file as ours
SCHEMA = 1

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
  id TEXT PRIMARY KEY,                 -- the process that works on it
  title TEXT NOT NULL,
  identity TEXT NOT NULL,
  started REAL NOT NULL,
  seen REAL NOT NULL,
  total INTEGER NOT NULL,
  done INTEGER NOT NULL,
  failed INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
"""


def connect(path: Path, *, create: bool = True) -> sqlite3.Connection:
    """A connection that waits for other processes, and trusts nothing in the file's schema.

    Raises:
        JudgeError: it is another program's file, which is left as it is.
    """
    address = f"file:{quote(str(path))}?mode={'rwc' if create else 'rw'}"
    try:
        connection = sqlite3.connect(
            address, uri=True, isolation_level=None, timeout=60, check_same_thread=False
        )
        try:
            for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "synchronous=FULL"):
                connection.execute(f"PRAGMA {pragma}")
            if not (create and is_empty(connection)):
                refuse_foreign(connection, path)
            connection.execute("PRAGMA journal_mode=WAL")
        except BaseException:
            connection.close()
            raise
    except sqlite3.DatabaseError as error:
        raise unreadable(path, error) from error
    return connection


def is_empty(connection: sqlite3.Connection) -> bool:
    return not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]


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


def prepare(connection: sqlite3.Connection) -> None:
    """Makes the tables in an empty file."""
    with transaction(connection):
        if not is_empty(connection):
            return
        for statement in TABLES.split(";\n"):
            if statement.strip():
                connection.execute(statement)
        connection.execute(f"PRAGMA application_id={APPLICATION}")
        connection.execute(f"PRAGMA user_version={SCHEMA}")


def refuse_foreign(connection: sqlite3.Connection, path: Path) -> None:
    """
    Raises:
        JudgeError: another program's file, another schema, triggers and views that would run
            somebody else's statements, or counts below zero, with which a cap could be passed.
    """
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
    below = "SELECT count(*) FROM judge WHERE min(attempts, spent, reserved, uncertain) < 0"
    if connection.execute(below).fetchone()[0]:
        raise JudgeError(
            f"judge.ledger={path}: holds a count below zero, so somebody else wrote into it; name "
            "another file with judge.ledger=FILE"
        )


def expected() -> dict[str, tuple[str, str]]:
    """The schema as SQLite tells it of a fresh file."""
    memory = sqlite3.connect(":memory:")
    memory.executescript(TABLES)
    rows = memory.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
    memory.close()
    return {name: (kind, sql) for kind, name, sql in rows if not name.startswith("sqlite_")}
