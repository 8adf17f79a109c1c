"""Labels candidates with `python -m align.judge` against the fake server, kills it, and audits what
the ledger and the server say of it: for the tests of kills and marks, and for benchmarks/judge.py.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.judge import fake_server
from tests.judge.fake_server import REPOSITORY, FakeServer, Json, sha

LLMBAR = REPOSITORY.parent / "shared" / "data" / "llmbar" / "mtbench"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
PRICE_IN, PRICE_OUT = 1, 2  # dollars per million tokens
READ, WRITTEN = 1000 * PRICE_IN, 1000 * PRICE_OUT  # nano-dollars a token
PROBE = b"probe "
EARLY_S = 0.3
WORDS = ("leave", "salary", "notice", "office", "contract")
# What a real provider does now and then; each as often as the others.
MISHAPS = (
    "429", "429_headers", "500", "502_html", "timeout", "cut", "reset", "truncated_json", "html",
    "null_choices", "empty_choices", "null_content", "refusal", "content_filter", "length",
    "wrong_schema", "two_verdicts", "slow",
)  # fmt: skip


# The server.


class Till(fake_server.Server):
    """The fake server with a till: the usage of all it generates, whether it arrives or not."""

    def completion(
        self, body: Json, texts: dict[str, str], fault: str | None, authorization: str
    ) -> Json | None:
        payload = super().completion(body, texts, fault, authorization)
        if payload is not None:
            usage = payload["usage"]
            charged = READ * usage["prompt_tokens"] + WRITTEN * usage["completion_tokens"]
            vars(self.stats)["charged"] = self.charged + charged
        return payload

    @property
    def charged(self) -> int:
        return int(vars(self.stats).get("charged", 0))


class PaidServer(FakeServer):
    """`FakeServer` with the till. Example: `with PaidServer(tmp_path, latency=0.1) as server: …`"""

    def start(self, *, port: int = 0) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="paid_server_", dir=self.parent)).resolve()
        ready, errors = self.folder / "port", self.folder / "stderr"
        command = [sys.executable, "-m", "tests.judge.labelling", "--port", str(port)]
        command += ["--ready", str(ready), "--plan", json.dumps(self.first_plan)]
        command += ["--log", str(self.folder / "log.jsonl")] if self.keep_log else []
        with errors.open("wb") as stderr:
            self.process = subprocess.Popen(command, cwd=REPOSITORY, stderr=stderr)
        deadline = time.monotonic() + 30
        while not ready.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the fake server did not start: {errors.read_text()}")
            time.sleep(0.01)
        self.port = int(ready.read_text())

    def charged(self) -> int:
        """Nano-dollars for all that was generated since the last reset."""
        return int(self.stats().get("charged", 0))

    def wait_for(self, received: int, *, child: subprocess.Popen[str] | None = None) -> None:
        """Until so many requests have come, or the child that sends them has ended."""
        deadline = time.monotonic() + 120
        while self.stats()["received"] < received and time.monotonic() < deadline:
            if child is not None and child.poll() is not None:
                return
            time.sleep(0.02)

    def settled(self) -> Json:
        """The counts once no request is open; for a plan without faults."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            stats = self.stats()
            if stats["received"] == stats["answered"] + stats["aborted"]:
                return stats
            time.sleep(0.02)
        raise AssertionError(f"requests stay open: {stats['received']} received")


# Candidates, of which the longer answer is the better one.


def write_candidates(path: Path, count: int, *, start: int = 0, length: int = 60) -> Path:
    """Pairs of answers of unequal length, the longer one at either place."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(start, start + count):
            rng = random.Random(number)
            words = [rng.choice(WORDS) for _ in range(40)]
            longer = f"{number} {' '.join(words)}"[:length]
            answers = [longer, longer[: rng.randrange(length // 4, length - 5)] + "."]
            rng.shuffle(answers)
            row = {"id": f"p{number}", "prompt": f"Question {number}?", "responses": answers}
            file.write(json.dumps(row) + "\n")
    return path


def read_jsonl(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# The command.


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """One labelling as a user types it; `settings` are the words after the judge's address.

    Example: `Labelling(server=server, candidates=file, workspace=tmp_path / "runs").finish()`
    """

    server: FakeServer
    candidates: Path
    workspace: Path
    settings: tuple[str, ...] = ()

    @property
    def out(self) -> Path:
        return self.workspace / "preferences.jsonl"

    @property
    def words(self) -> list[str]:
        judge = ["judge=openai", "judge.model=fake", f"judge.base_url={self.server.url}"]
        prices = [f"judge.price_in={PRICE_IN}", f"judge.price_out={PRICE_OUT}"]
        paths = [f"candidates={self.candidates}", f"out={self.out}", f"workspace={self.workspace}"]
        return [*paths, *judge, *prices, *self.settings]

    def start(self) -> subprocess.Popen[str]:
        self.workspace.mkdir(exist_ok=True)
        return spawn("align.judge", *self.words)

    def finish(self) -> str:
        """Runs it to its good end; returns what it said on stderr."""
        return ended(self.start())

    def verdicts(self) -> list[Json]:
        """Those that are in the artifact, finished or not."""
        files = list(self.workspace.glob("artifacts/label/*/verdicts.jsonl"))
        return [row for file in files for row in read_jsonl(file)]

    def books(self) -> "Books":
        return books(self.workspace / "judgments.sqlite")

    def exported(self) -> tuple[bytes, bytes]:
        """The preferences and the verdicts, as they stand on disk."""
        latest = self.workspace / "judge" / "latest" / "verdicts.jsonl"
        return self.out.read_bytes(), latest.read_bytes()


def spawn(module: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", module, *words]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip


def ended(child: subprocess.Popen[str], *, status: int = 0) -> str:
    """What it said on stderr, once it has ended with that status."""
    out, err = child.communicate(timeout=600)
    assert child.returncode == status, f"exit status {child.returncode}\n{out}\n{err[-3000:]}"
    assert "Traceback" not in err, err[-3000:]
    return err


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
    assert isinstance(work.server, PaidServer)
    before, lost_before = Books(), 0
    for moment in moments:
        child = work.start()
        killed = not waited(child, moment)
        if not killed:
            break
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        after, stats = work.books(), work.server.settled()
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
    assert isinstance(work.server, PaidServer)
    found, stats = work.books(), work.server.settled()
    assert not found.under_way and found.reserved == 0
    assert found.twice == 0, "a question has two answers on disk"
    told = f"{stats['answered']} answers, {found.answers} on disk and {lost} cut off by kills"
    assert stats["answered"] == found.answers + lost, told
    assert stats["received"] <= found.attempts, "a request was sent before it was written down"
    # A kill between the probe's answer and what was learnt from it asks the probe again.
    assert stats["duplicates"] <= lost + found.probes - 1
    assert found.spent + found.uncertain >= work.server.charged() >= found.spent
    killing.duplicates += stats["duplicates"]
    killing.probed_again += found.probes - 1


def answered_again(log: Iterable[Json], kills: Iterable[float], *, window: float) -> list[Json]:
    """Log lines of answers that were given again although no kill followed within `window`."""
    answers: dict[str, list[Json]] = {}
    for line in log:
        if line["answered"]:
            answers.setdefault(line["sha"], []).append(line)
    moments = list(kills)
    return [
        line
        for lines in answers.values()
        for line in lines[:-1]
        if not any(0 <= moment - line["t"] <= window for moment in moments)
    ]


# Faults.


def mishaps(rate: float, *, slow_down: float = 1.0) -> dict[str, float]:
    """Shares of all mishaps, `rate` in all. With `slow_down` below 1 there are fewer refusals for
    speed, each of which halves the pace, as it should.
    """
    weights = {name: slow_down if name.startswith("429") else 1.0 for name in MISHAPS}
    return {name: rate * weight / sum(weights.values()) for name, weight in weights.items()}


def wrong_labels(candidates: Path, verdicts: Iterable[Json]) -> list[Json]:
    """Verdicts that prefer the shorter answer, or that call a difference a tie."""
    lengths = {row["id"]: [len(t) for t in row["responses"]] for row in read_jsonl(candidates)}
    wrong = []
    for v in verdicts:
        longer = lengths[v["id"]][v["first"]] > lengths[v["id"]][v["second"]]
        right = v["p_first"] is None or (v["p_first"] > 0.5) == longer
        if v["status"] == "tie" or (v["status"] == "ok") != (v["p_first"] is not None) or not right:
            wrong.append(v)
    return wrong


def statuses(verdicts: Iterable[Json]) -> Counter[str]:
    return Counter(v["status"] for v in verdicts)


# GPT-4's stored answers.


def gpt4_replies(folder: Path) -> Path:
    """What GPT-4 said of each pair in each order, as a table for the server's answer="table"."""
    from align.judge.probe import EXAMPLE

    table = {sha("\0".join((EXAMPLE.first, EXAMPLE.second))): "Output (a)"}
    for row in json.loads((LLMBAR / "gpt-4.json").read_text("utf-8")):
        given, swapped = (
            row["results"][0][f"swap = {way}"]["completion"][0] for way in (False, True)
        )
        table[sha("\0".join((row["output_1"], row["output_2"])))] = given
        table[sha("\0".join((row["output_2"], row["output_1"])))] = swapped
    path = folder / "replies.json"
    path.write_text(json.dumps(table), "utf-8")
    return path


def replayed(folder: Path, *settings: str) -> tuple[Json, Json]:
    """The report of `python -m align.judge agreement` on them, and the server's counts."""
    with PaidServer(folder, answer="table", replies=str(gpt4_replies(folder))) as server:
        columns = ["columns.first=output_1", "columns.second=output_2", "columns.prompt=input"]
        judge = ["judge=openai", "judge.model=gpt-4", f"judge.base_url={server.url}"]
        words = [f"pairs={LLMBAR / 'dataset.json'}", *columns, "columns.human=[label]", *judge]
        # The stored answers say (a) or (b), and nothing of how sure they are.
        words += [
            "judge.scale=two",
            "judge.logprobs=false",
            "judge.price_in=0",
            "judge.price_out=0",
        ]
        words += [f"out={folder / 'agreement'}", f"workspace={folder / 'runs'}", *settings]
        ended(spawn("align.judge", "agreement", *words))
        stats = server.stats()
    return json.loads((folder / "agreement" / "agreement.json").read_text("utf-8")), stats


# The judge within this process.


def judge_settings(server: FakeServer, ledger: Path, **changes: Any) -> Any:
    """The settings of judge=openai at the server."""
    from hydra import compose, initialize_config_dir

    from align.config import CONF, build_named, register_resolvers, resolved

    register_resolvers()
    given = {"model": "fake", "base_url": server.url, "ledger": ledger}
    given |= {"price_in": PRICE_IN, "price_out": PRICE_OUT, **changes}
    words = ["judge=openai", *(f"judge.{key}={value}" for key, value in given.items())]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = compose("judge_cli", overrides=words)
    return build_named("judge", "align.judge", Any, resolved(tree)["judge"])


def comparisons(count: int, *, start: int = 0) -> list[Any]:
    """Pairs of which the longer answer, at either place, is the better one."""
    from align.records import Comparison, Message, Prompt

    made = []
    for number in range(start, start + count):
        prompt = Prompt(
            id=f"p{number}", messages=(Message(role="user", content=f"Question {number}?"),)
        )
        texts = [f"It is {number}, as the contract of {number} says.", f"No, not {number}."]
        if number % 2:
            texts.reverse()
        made.append(Comparison(prompt=prompt, first=texts[0], second=texts[1]))
    return made


async def judged(pairs: list[Any], settings: Any) -> int:
    """Has them judged; returns how many got the right verdict."""
    from align.judge.openai import compare

    right, number = 0, 0
    async for verdict in compare(pairs, settings=settings):
        pair, number = pairs[number], number + 1
        assert verdict.p_first is not None, verdict
        right += (verdict.p_first > 0.5) == (len(pair.first) > len(pair.second))
    return right


if __name__ == "__main__":
    fake_server.Server = Till  # type: ignore[misc]
    fake_server.main()
