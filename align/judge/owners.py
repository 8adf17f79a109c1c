"""Who writes a ledger: processes of one host, each alive as long as a lock of its own is held."""

import contextlib
import fcntl
import json
import os
import re
import secrets
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Self

from align.errors import JudgeError

STALE_S = 120.0
BATCH = "batch-"  # with SHORT letters of a shard's name: owns what a provider's Batch API was given
SHORT = 32
NETWORK = frozenset(
    ["nfs", "nfs3", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "lustre", "gpfs", "beegfs",
     "ceph", "afs", "glusterfs", "pvfs2", "orangefs", "wekafs", "panfs", "fuse.sshfs",
     "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.rclone", "fuse.juicefs", "fuse.gcsfuse"]
)  # fmt: skip


def file_system(path: Path, mounts: str | None = None) -> str:
    """The type of the file system that holds `path`, by the longest mount point above it."""
    if mounts is None:
        table = Path("/proc/self/mountinfo")
        mounts = table.read_text(encoding="utf-8", errors="replace") if table.exists() else ""
    best, kind = "", "unknown"
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        # A blank in a path stands there as \\040.
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), left.split()[4])
        if path.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind


def refuse_network_disk(path: Path) -> None:
    """SQLite's write-ahead log needs memory shared by all who write, which no network disk has.

    Raises:
        JudgeError: the file would lie on one.
    """
    kind = file_system(path.parent.resolve())
    if kind.lower() in NETWORK:
        raise JudgeError(
            f"judge.ledger={path}: lies on a network disk ({kind}), where SQLite loses writes; "
            "name a file on this machine's own disk, judge.ledger=/var/tmp/judgments.sqlite for "
            "instance, and copy it away when the work is done"
        )


def this_boot() -> str:
    """Names the running kernel, which all containers of a host share, as they share its locks."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else socket.gethostname()


def claim_host(db: sqlite3.Connection, path: Path) -> None:
    """One host writes: which one, and a sign of life, stand in the file. A host that was started
    anew is known by its name.

    Raises:
        JudgeError: another host gave a sign of life within two minutes.
    """
    host, boot = socket.gethostname(), this_boot()
    db.execute("BEGIN IMMEDIATE")
    try:
        row = db.execute("SELECT value FROM about WHERE name = 'writer'").fetchone()
        if row is not None:
            writer = json.loads(row[0])
            ago = time.time() - float(writer["seen"])
            if ago < STALE_S and writer["host"] != host and writer["boot"] != boot:
                raise JudgeError(
                    f"judge.ledger={path}: host {writer['host']} writes it (last sign of life "
                    f"{ago:.0f} s ago), and only one host can; run there, or name another file "
                    "with judge.ledger=FILE"
                )
        now = json.dumps({"host": host, "boot": boot, "seen": time.time()})
        db.execute("INSERT OR REPLACE INTO about VALUES ('writer', ?)", (now,))
    except (ValueError, KeyError, TypeError) as error:
        raise JudgeError(
            f"judge.ledger={path}: who writes it cannot be read ({error!r}), so somebody else "
            "wrote into it; name another file with judge.ledger=FILE"
        ) from error
    finally:
        db.execute("COMMIT")


@contextlib.contextmanager
def alone(ledger: Path) -> Iterator[None]:
    """One process at a time: for opening and closing, where SQLite switches to its write-ahead log
    and back without waiting for others.
    """
    with ledger.with_name(f"{ledger.name}-lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


class Owner:
    """This process's name in the ledger, held by a lock on a file beside it for as long as it
    lives.
    """

    def __init__(self, ledger: Path, name: str, file: IO[str]) -> None:
        self.ledger, self.name, self.file = ledger, name, file

    @classmethod
    def new(cls, ledger: Path) -> Self:
        name = f"{os.getpid()}-{secrets.token_hex(4)}"
        file = lock_file(ledger, name).open("w")
        fcntl.flock(file, fcntl.LOCK_EX)
        return cls(ledger, name, file)

    def lives(self, name: str) -> bool:
        """Whether the process of that name still runs, this one included. A provider's batch
        outlives all of them.
        """
        if name == self.name or name.startswith(BATCH):
            return True
        return alive(self.ledger, name, remove=True)

    def sweep(self) -> None:
        """Removes the files of processes that were killed; for whoever is `alone`."""
        before = lock_file(self.ledger, "").name
        for path in list(self.ledger.parent.iterdir()):
            if path.name.startswith(before):
                self.lives(path.name.removeprefix(before))

    def release(self) -> None:
        with contextlib.suppress(OSError):
            lock_file(self.ledger, self.name).unlink(missing_ok=True)
        self.file.close()


def alive(ledger: Path, name: str, *, remove: bool = False) -> bool:
    """Whether another process of that name holds its lock; True where nobody can tell.

    Args:
        remove: the file of one that does not.
    """
    path = lock_file(ledger.absolute(), name)
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if remove:
                with contextlib.suppress(OSError):  # another user's
                    path.unlink(missing_ok=True)
    except FileNotFoundError:  # gone with it
        return False
    except OSError:  # held; or too many files are open, for instance
        return True
    return False


def lock_file(ledger: Path, name: str) -> Path:
    """A name from a ledger is somebody else's text: only its harmless characters count."""
    safe = "".join(c for c in name if c.isalnum() or c == "-")[:64]
    return ledger.with_name(f"{ledger.name}-owner-{safe}")
