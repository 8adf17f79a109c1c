"""Labels candidates with `python -m align.judge` against the fake server, for the tests of kills
and marks and for benchmarks/judge.py.
"""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.judge.fake_server import REPOSITORY, FakeServer, Json, sha

LLMBAR = REPOSITORY.parent / "shared" / "data" / "llmbar" / "mtbench"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
PRICE_IN, PRICE_OUT = 1, 2  # dollars per million tokens
READ, WRITTEN = 1000 * PRICE_IN, 1000 * PRICE_OUT  # nano-dollars a token
WORDS = ("leave", "salary", "notice", "office", "contract")
# What a real provider does now and then; each as often as the others.
MISHAPS = (
    "429", "429_headers", "500", "502_html", "timeout", "cut", "reset", "truncated_json", "html",
    "null_choices", "empty_choices", "null_content", "refusal", "content_filter", "length",
    "wrong_schema", "two_verdicts", "slow",
)  # fmt: skip


def charged(server: FakeServer) -> int:
    """Nano-dollars for all that the server has generated since its last reset."""
    stats = server.stats()
    return int(READ * stats["prompt_tokens"] + WRITTEN * stats["completion_tokens"])


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
    def ledger(self) -> Path:
        return self.workspace / "judgments.sqlite"

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


# Faults.


def mishaps(rate: float) -> dict[str, float]:
    """Shares of all mishaps, `rate` in all."""
    return dict.fromkeys(MISHAPS, rate / len(MISHAPS))


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
    with FakeServer(folder, answer="table", replies=str(gpt4_replies(folder))) as server:
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
