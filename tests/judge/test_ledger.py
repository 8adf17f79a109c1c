"""The ledger: what was asked is known for ever, what may have been paid is never forgotten, and a
file that is not ours is not trusted.
"""

import asyncio
import errno
import json
import os
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from align.errors import JudgeError
from align.judge import entries
from align.judge.entries import ANSWERED, LOST, Caps, Job, Judgment, give_up
from align.judge.forms import pairwise
from align.judge.ledger import Ledger
from align.judge.ledger_view import look
from align.judge.owners import BATCH, Owner, alive, file_system, lock_file, refuse_network_disk
from align.judge.request import sound

FREE = Caps(nano_usd=None, attempts=None)
READ = Judgment(status="ok", answer={"status": "ok", "label": "A"}, parser=1, tokens=9, cost=40)


def key(number: int) -> bytes:
    return number.to_bytes(32, "big")


async def begin(ledger: Ledger, number: int = 1, *, reserve: int = 100, caps: Caps = FREE):
    return await ledger.begin(
        key(number), identity="j", mode="line", endpoint="http://x", reserve=reserve, caps=caps
    )


async def answer(ledger: Ledger, number: int = 1, *, cost: int | None = 40, **more):
    begun = await begin(ledger, number)
    await ledger.finish(
        begun.attempt, identity="j", status=ANSWERED, reserved=100, cost=cost, raw=b"{}",
        key=key(number), judgment=READ, **more,
    )  # fmt: skip


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "judgments.sqlite"


def test_a_judgment_outlives_the_process_that_wrote_it(path):
    with Ledger.open(path) as ledger:
        asyncio.run(answer(ledger))
    with Ledger.open(path) as ledger:
        found = ledger.judgment(key(1))
        assert found is not None and found.answer["label"] == "A" and found.cost == 40
        assert ledger.raw(found.attempt) == b"{}"
        assert asyncio.run(begin(ledger)).outcome == "known"


def test_a_reservation_becomes_the_price_once_it_is_known(path):
    async def steps(ledger: Ledger):
        await begin(ledger, 1)
        during = ledger.spending("j")
        assert (during.spent, during.reserved, during.uncertain) == (0, 100, 0)
        await answer(ledger, 2)
        await answer(ledger, 3, cost=None)
        return ledger.spending("j")

    with Ledger.open(path) as ledger:
        after = asyncio.run(steps(ledger))
    assert (after.attempts, after.spent, after.reserved, after.uncertain) == (3, 40, 100, 100)


@pytest.mark.parametrize(
    ("caps", "outcome"),
    [
        (Caps(nano_usd=240, attempts=None), "budget"),  # 40 spent + 100 under way + 100 > 239
        (Caps(nano_usd=None, attempts=2), "requests"),
    ],
)
def test_a_cap_counts_what_is_spent_and_what_is_under_way(path, caps, outcome):
    async def steps(ledger: Ledger):
        await answer(ledger, 1)
        await begin(ledger, 2)
        tight = Caps(nano_usd=caps.nano_usd and 239, attempts=caps.attempts)
        assert (await begin(ledger, 3, caps=tight)).outcome == outcome
        roomy = Caps(nano_usd=240, attempts=3)
        return (await begin(ledger, 3, caps=roomy)).outcome

    with Ledger.open(path) as ledger:
        assert asyncio.run(steps(ledger)) == "go"


def test_the_cap_holds_over_restarts(path):
    for number in range(3):
        with Ledger.open(path) as ledger:
            asyncio.run(answer(ledger, number))
    with Ledger.open(path) as ledger:
        begun = asyncio.run(begin(ledger, 9, caps=Caps(nano_usd=219, attempts=None)))
        assert begun.outcome == "budget"  # 3 * 40 + 100 = 220


def test_what_was_given_up_and_is_answered_after_all_is_counted_once(path):
    async def steps(ledger: Ledger):
        begun = await begin(ledger)
        await ledger.run(lambda db: give_up(db, "owner = ?", ledger.owner.name))
        assert ledger.spending("j").uncertain == 100
        await ledger.finish(
            begun.attempt, identity="j", status=ANSWERED, reserved=100, cost=40, key=key(1),
            judgment=READ,
        )  # fmt: skip
        return ledger.spending("j")

    with Ledger.open(path) as ledger:
        told = asyncio.run(steps(ledger))
    assert (told.attempts, told.spent, told.reserved, told.uncertain) == (1, 40, 0, 0)
    Ledger.open(path).close()


def test_a_process_of_which_nobody_can_tell_is_not_taken_for_dead(path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    with Ledger.open(path) as ledger:
        other = Owner.new(path)
        assert ledger.owner.lives(other.name)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", refused)
            assert ledger.owner.lives(other.name)
        other.release()
        assert not ledger.owner.lives(other.name)


def test_the_file_of_a_dead_process_that_cannot_be_written_is_no_life(path):
    with Ledger.open(path) as ledger:
        dead = lock_file(path, "7-dead")
        dead.write_text("")
        dead.chmod(0o444)
        assert not alive(path, "7-dead") and dead.exists()
        assert not ledger.owner.lives("7-dead") and not dead.exists()


def test_what_a_dead_process_reserved_holds_nobody_up_at_a_cap(path):
    async def steps(ledger: Ledger, other: Owner):
        await ledger.run(
            lambda db: entries.begin(
                db, key(1), identity="j", mode="line", endpoint="", reserve=100, caps=FREE,
                owner=other,
            )
        )  # fmt: skip
        capped = Caps(nano_usd=150, attempts=None)
        waiting = await begin(ledger, 2, caps=capped)
        other.release()
        return waiting, await begin(ledger, 2, caps=capped)

    with Ledger.open(path) as ledger:
        waiting, begun = asyncio.run(steps(ledger, Owner.new(path)))
    assert (waiting.outcome, waiting.under_way) == ("budget", 100)
    assert (begun.outcome, begun.under_way) == ("budget", 0), "it may have cost what it reserved"


def test_how_long_a_batch_took_says_nothing_of_a_live_request(path):
    async def steps(ledger: Ledger):
        begun = await ledger.run(
            lambda db: entries.begin(
                db, key(1), identity="j", mode="line", endpoint="", reserve=1, caps=FREE,
                owner=ledger.owner, batch=f"{BATCH}x",
            )
        )  # fmt: skip
        await ledger.finish(
            begun.attempt, identity="j", status=ANSWERED, reserved=1, cost=1, key=key(1)
        )
        assert ledger.seconds_per_request("j") is None
        await answer(ledger, 2)
        return ledger.seconds_per_request("j")

    with Ledger.open(path) as ledger:
        assert asyncio.run(steps(ledger)) is not None


DIES = """
import asyncio, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.judge.test_ledger import begin, Ledger
ledger = Ledger.open(Path({path!r}))
print(asyncio.run(begin(ledger)).outcome, flush=True)
{ending}
"""
ROOT = str(Path(__file__).parents[2])


def elsewhere(path: Path, ending: str) -> subprocess.Popen:
    code = DIES.format(root=ROOT, path=str(path), ending=ending)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_an_open_attempt_of_a_dead_process_is_possibly_billed_and_asked_again(path):
    with elsewhere(path, "os._exit(9)") as dead:
        assert dead.wait(60) == 9
    with Ledger.open(path) as ledger:
        assert len(list(path.parent.glob("*-owner-*"))) == 1  # the dead one's is gone
        lost = ledger.spending("j")
        assert (lost.reserved, lost.uncertain) == (0, 100)
        again = asyncio.run(begin(ledger))
        assert (again.outcome, again.n) == ("go", 1)
    (judge,) = look(path).judges
    assert judge.outcomes == {LOST: 2} and judge.uncertain == 200 and judge.unsure == 2


def test_a_request_that_a_living_process_asks_is_left_to_it(path):
    with elsewhere(path, "import time; time.sleep(60)") as living, Ledger.open(path) as ledger:
        assert living.stdout.readline().strip() == "go"
        Ledger.open(path).close()
        assert asyncio.run(begin(ledger)).outcome == "busy"
        living.kill()
        living.wait(60)
        assert asyncio.run(begin(ledger)).outcome == "go"


OPENS = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.judge.test_ledger import Ledger
time.sleep({begin} - time.time())
for number in range(40):
    time.sleep(-time.time() % 0.04)  # all at the same moment
    Ledger.open(Path({folder!r}) / str(number)).close()
"""


def test_processes_that_begin_at_the_same_moment_do_not_lock_each_other_out(tmp_path):
    """SQLite's switch to the write-ahead log does not wait for others."""
    code = OPENS.format(root=ROOT, folder=str(tmp_path), begin=time.time() + 3)
    begun = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [process.wait(60) for process in begun] == [0, 0, 0, 0]


def test_a_forked_name_of_an_owner_is_only_a_name(tmp_path):
    owner = Owner.new(tmp_path / "l")
    assert owner.lives(owner.name)
    assert not owner.lives("../../etc/passwd")
    owner.release()
    assert list(tmp_path.iterdir()) == []


def statement(path: Path, *statements: str) -> None:
    db = sqlite3.connect(path)
    for one in statements:
        db.execute(one)
    db.commit()
    db.close()


@pytest.mark.parametrize(
    "statements",
    [
        ("CREATE TABLE attempt (id INTEGER)",),
        ("PRAGMA application_id=1", "CREATE TABLE x (y)"),
    ],
)
def test_another_programs_file_is_refused_and_left_as_it_is(path, statements):
    statement(path, *statements)
    before = path.read_bytes()
    with pytest.raises(JudgeError, match="not a ledger"):
        Ledger.open(path)
    with pytest.raises(JudgeError, match="not a ledger"):
        look(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "addition",
    [
        "CREATE TRIGGER t AFTER INSERT ON attempt BEGIN DELETE FROM judgment; END",
        "CREATE VIEW v AS SELECT * FROM judgment",
        "ALTER TABLE judgment ADD COLUMN extra TEXT",
        "DROP INDEX open_attempt",
    ],
)
def test_a_ledger_that_somebody_added_statements_to_is_refused(path, addition):
    Ledger.open(path).close()
    statement(path, addition)
    with pytest.raises(JudgeError, match="nothing in it is trusted"):
        Ledger.open(path)


@pytest.mark.parametrize(
    "content", [b"not a database at all" * 50, b"SQLite format 3\0" + b"x" * 5000]
)
def test_a_file_that_is_no_database_is_one_line(path, content):
    path.write_bytes(content)
    with pytest.raises(JudgeError, match="cannot be used"):
        Ledger.open(path)


def test_a_judgment_that_is_no_json_is_refused_in_one_line(path):
    Ledger.open(path).close()
    row = f"x'{key(1).hex()}', 1, 1, 'ok', '{{not json', 0, 0"
    statement(path, f"INSERT INTO judgment VALUES ({row})")
    with Ledger.open(path) as ledger, pytest.raises(JudgeError, match="cannot be used"):
        ledger.judgment(key(1))


@pytest.mark.parametrize(
    "answer",
    [
        {"status": "ok", "label": "Z"},
        {"status": "ok", "label": "A", "evil": 1},
        {"status": "excellent"},
        {"status": "ok", "label": "A", "probabilities": {"A": 7.0}},
        {"status": "ok", "label": "A", "probabilities": {"X": 0.5}},
    ],
)
def test_a_judgment_that_no_answer_can_have_led_to_is_not_believed(answer):
    form = pairwise(scale="three")
    assert sound(replace(READ, answer=answer), form) is None
    assert sound(READ, form) is not None


def test_another_host_that_gave_a_sign_of_life_keeps_the_file(path):
    Ledger.open(path).close()

    def writer(host: str, ago: float) -> None:
        value = json.dumps({"host": host, "boot": "x", "seen": time.time() - ago})
        statement(path, f"UPDATE about SET value = '{value}' WHERE name = 'writer'")

    writer("elsewhere", 5)
    with pytest.raises(JudgeError, match="host elsewhere writes it"):
        Ledger.open(path)
    writer("elsewhere", 500)
    Ledger.open(path).close()


MOUNTS = """22 1 254:0 / / rw - ext4 /dev/vda rw
30 22 0:50 / /home rw - nfs4 server:/home rw
31 30 0:51 / /home/me/fast rw - xfs /dev/vdb rw
33 22 0:53 / /données rw - nfs4 server:/d rw
32 22 0:52 / /with\\040space rw - cifs //server/share rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/tmp/x", "ext4"), ("/home/me", "nfs4"), ("/home/me/fast/y", "xfs"),
        ("/homely", "ext4"), ("/with space/z", "cifs"), ("/données/x", "nfs4"),
    ],
)  # fmt: skip
def test_the_disk_below_a_path_is_that_of_the_nearest_mount(path, kind):
    assert file_system(Path(path), MOUNTS) == kind


def test_a_network_disk_is_refused_with_what_to_type(monkeypatch, path):
    monkeypatch.setattr("align.judge.owners.file_system", lambda path: "nfs4")
    with pytest.raises(JudgeError, match=r"network disk \(nfs4\).*judge\.ledger=/"):
        refuse_network_disk(path)


def test_a_full_disk_stops_everybody_who_waits_with_one_line(path):
    async def steps(ledger: Ledger):
        ledger.run(lambda db: db.execute("PRAGMA max_page_count=20"))
        for number in range(400):
            await ledger.finish(
                (await begin(ledger, number)).attempt, identity="j", status=ANSWERED, reserved=100,
                cost=1, raw=os.urandom(2000), key=key(number), judgment=READ,
            )  # fmt: skip

    with Ledger.open(path) as ledger, pytest.raises(JudgeError, match="full"):
        asyncio.run(steps(ledger))
    with Ledger.open(path) as ledger:  # what was written before stands
        assert ledger.judgment(key(0)) is not None


def test_a_job_tells_how_far_it_is(path):
    with Ledger.open(path) as ledger:
        job = Job(id="x", title="pairwise", identity="j", total=10, done=4, failed=1)
        asyncio.run(_told(ledger, job))
    (seen,) = look(path).jobs
    assert (seen.total, seen.done, seen.failed) == (10, 4, 1)


async def _told(ledger: Ledger, job: Job) -> None:
    await ledger.progress(job)


def test_a_writer_outlives_those_who_no_longer_wait(path):
    async def steps(ledger: Ledger):
        waiting = asyncio.ensure_future(begin(ledger, 1))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        return (await begin(ledger, 2)).outcome

    with Ledger.open(path) as ledger:
        assert asyncio.run(steps(ledger)) == "go"


def test_work_that_fails_tells_everybody_in_its_group(path):
    async def steps(ledger: Ledger):
        def wrong(db):
            raise RuntimeError("a bug")

        both = [ledger.run(wrong), begin(ledger, 1)]
        return await asyncio.wait_for(asyncio.gather(*both, return_exceptions=True), 5)

    with Ledger.open(path) as ledger:
        found = asyncio.run(steps(ledger))
    assert all(isinstance(error, JudgeError) for error in found)


def test_looking_at_a_file_changes_nothing_in_it(path):
    path.write_bytes(b"")
    with pytest.raises(JudgeError, match="not a ledger"):
        look(path)
    assert path.read_bytes() == b""


def test_counts_below_zero_let_nobody_pass_a_cap(path):
    Ledger.open(path).close()
    statement(path, "INSERT INTO judge (identity, spent) VALUES ('j', -1000000000000)")
    with pytest.raises(JudgeError, match="a count below zero"):
        Ledger.open(path)
