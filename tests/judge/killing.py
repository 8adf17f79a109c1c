"""Kills a labelling and audits what the ledger and the server say of it: nothing that was answered
is lost, and nothing is asked again but what the kill cut off.
"""

import os
import shutil
import signal
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.judge.fake_server import Json
from tests.judge.labelling import Labelling, charged, ended

PROBE = b"probe "
EARLY_S = 0.3


# What the ledger says.


@dataclass(frozen=True, kw_only=True)
class Books:
    """A ledger as a killed process left it; money in nano-dollars.

    Attributes:
        answered: how many attempts of each request were answered, the probe's included.
        under_way: the requests whose attempt stands open.
        attempts: how many attempts were written down.
    """

    answered: Mapping[bytes, int] = field(default_factory=dict)
    under_way: frozenset[bytes] = frozenset()
    attempts: int = 0
    spent: int = 0
    reserved: int = 0
    uncertain: int = 0

    @property
    def answers(self) -> int:
        return sum(self.answered.values())

    @property
    def probes(self) -> int:
        return sum(n for key, n in self.answered.items() if key.startswith(PROBE))

    @property
    def twice(self) -> int:
        """Questions that have more than one answer; the probe is none."""
        return sum(n > 1 for key, n in self.answered.items() if not key.startswith(PROBE))


def books(ledger: Path) -> Books:
    """Reads a copy, so that the next process finds the file as the kill left it."""
    if not ledger.exists():
        return Books()
    with tempfile.TemporaryDirectory() as folder:
        for file in ledger.parent.glob(f"{ledger.name}*"):
            if file.name.removeprefix(ledger.name) in ("", "-wal"):
                shutil.copy(file, folder)
        db = sqlite3.connect(Path(folder) / ledger.name)
        try:
            return audited(db)
        finally:
            db.close()


def audited(db: sqlite3.Connection) -> Books:
    """The books, after a look at whether the file is whole and its sums are those of its rows."""
    assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        return Books()  # killed before the tables were made
    sums = "coalesce(sum(attempts), 0), sum(spent), sum(reserved), sum(uncertain)"
    told = db.execute(f"SELECT {sums} FROM judge").fetchone()
    counted = db.execute(
        "SELECT count(*), sum(cost), sum(CASE WHEN finished IS NULL THEN reserved ELSE 0 END), "
        "sum(CASE WHEN finished IS NOT NULL AND cost IS NULL THEN reserved ELSE 0 END) FROM attempt"
    ).fetchone()
    attempts, spent, reserved, uncertain = (int(n or 0) for n in told)
    assert [attempts, spent, reserved, uncertain] == [int(n or 0) for n in counted], (told, counted)
    answered = db.execute("SELECT key, count(*) FROM attempt WHERE status = 'answered' GROUP BY 1")
    opened = db.execute("SELECT key FROM attempt WHERE finished IS NULL")
    return Books(
        answered={bytes(key): n for key, n in answered},
        under_way=frozenset(bytes(key) for (key,) in opened),
        attempts=attempts, spent=spent, reserved=reserved, uncertain=uncertain,
    )  # fmt: skip


# Kills.


@dataclass
class Killing:
    """What kills have cost so far.

    Attributes:
        kills: processes that were killed; `early` of them within 300 ms.
        lost: answers that had left the server and were not on disk yet.
        under_way: attempts that stood open, over all kills; `most_under_way` at one of them.
        duplicates: answers that the server gave again.
    """

    kills: int = 0
    early: int = 0
    lost: int = 0
    under_way: int = 0
    most_under_way: int = 0
    duplicates: int = 0
    probed_again: int = 0


def kill_until_finished(
    work: Labelling, moments: Iterable[float], *, killing: Killing
) -> subprocess.Popen[str]:
    """Starts the work and kills it at each moment (seconds after its start), until it finishes or
    there are no moments left; then it runs to its end. The server must be fresh.

    Asserts after each kill that no finished call is lost, and that what the server answered is on
    disk or was under way.
    """
    before, lost_before = Books(), 0
    for moment in moments:
        child = work.start()
        killed = not waited(child, moment)
        if not killed:
            break
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        after, stats = books(work.ledger), work.server.settled()
        assert not {k for k, n in before.answered.items() if after.answered.get(k, 0) < n}
        lost = stats["answered"] - after.answers - lost_before
        assert 0 <= lost <= len(after.under_way), (lost, len(after.under_way))
        killing.kills += 1
        killing.early += moment <= EARLY_S
        killing.lost += lost
        killing.under_way += len(after.under_way)
        killing.most_under_way = max(killing.most_under_way, len(after.under_way))
        before, lost_before = after, lost_before + lost
    else:
        child = work.start()
    ended(child)
    audit(work, lost=lost_before, killing=killing)
    return child


def waited(child: subprocess.Popen[str], seconds: float) -> bool:
    """Whether the child ended within that time."""
    try:
        child.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def audit(work: Labelling, *, lost: int, killing: Killing) -> None:
    """Nothing was asked again but what a kill had cut off, and all money is accounted for."""
    found, stats = books(work.ledger), work.server.settled()
    assert not found.under_way and found.reserved == 0
    assert found.twice == 0, "a question has two answers on disk"
    told = f"{stats['answered']} answers, {found.answers} on disk and {lost} cut off by kills"
    assert stats["answered"] == found.answers + lost, told
    assert stats["received"] <= found.attempts, "a request was sent before it was written down"
    # A kill between the probe's answer and what was learnt from it asks the probe again.
    assert stats["duplicates"] <= lost + found.probes - 1
    assert found.spent + found.uncertain >= charged(work.server) >= found.spent
    killing.duplicates += stats["duplicates"]
    killing.probed_again += found.probes - 1


def answered_again(log: Iterable[Json], kills: Iterable[float], *, window: float) -> list[Json]:
    """Log lines of answers that were given again although no kill was near them, in seconds."""
    answers: dict[str, list[Json]] = {}
    for line in log:
        if line["answered"]:
            answers.setdefault(line["sha"], []).append(line)
    moments = list(kills)
    return [
        line
        for lines in answers.values()
        for line in lines[:-1]
        if not any(abs(moment - line["t"]) <= window for moment in moments)
    ]
