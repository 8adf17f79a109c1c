"""Whatever ends a labelling, nothing that was answered is lost or asked again: counted on the
server's side.
"""

import itertools
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.judge.fake_server import FakeServer
from tests.judge.killing import Killing, answered_again, books, kill_until_finished
from tests.judge.labelling import (
    Labelling,
    charged,
    ended,
    read_jsonl,
    spawn,
    write_candidates,
    wrong_labels,
)
from tests.test_pipeline import SMALL

PAIRS, CONCURRENCY, LATENCY = 80, 8, 0.05
KILLS = 10


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with FakeServer(tmp_path_factory.mktemp("server"), latency=LATENCY) as server:
        yield server


@pytest.fixture
def server(shared: FakeServer) -> FakeServer:
    shared.reset()
    return shared


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_candidates(tmp_path_factory.mktemp("candidates") / "candidates.jsonl", PAIRS)


@pytest.fixture(scope="module")
def undisturbed(shared: FakeServer, candidates: Path, tmp_path_factory) -> tuple[Labelling, float]:
    """A labelling that nobody killed, and the seconds it took."""
    shared.reset()
    work = labelling(shared, candidates, tmp_path_factory.mktemp("undisturbed"))
    started = time.monotonic()
    work.finish()
    return work, time.monotonic() - started


def labelling(server: FakeServer, candidates: Path, workspace: Path, *more: str) -> Labelling:
    settings = (f"judge.concurrency={CONCURRENCY}", *more)
    return Labelling(server=server, candidates=candidates, workspace=workspace, settings=settings)


def test_kill_9_at_random_points_loses_no_finished_call_and_repeats_none(
    server, candidates, undisturbed, tmp_path
):
    """Some fall within the imports. `kill_until_finished` asserts at each kill, and at the end."""
    expected, seconds = undisturbed
    rng, killing = random.Random(5), Killing()
    for number in itertools.count():
        server.reset()
        work = labelling(server, candidates, tmp_path / str(number))
        moments = (rng.uniform(0, seconds) for _ in range(KILLS - killing.kills))
        kill_until_finished(work, moments, killing=killing)
        assert work.exported() == expected.exported()
        if killing.kills == KILLS:
            break
    assert killing.most_under_way <= CONCURRENCY
    assert killing.duplicates <= killing.under_way


@pytest.mark.parametrize("shift", [0, PAIRS // 2])
def test_two_processes_on_one_ledger_ask_nothing_twice(
    server, candidates, undisturbed, tmp_path, shift
):
    """The same candidates, and a file of which half are the same."""
    ledger = tmp_path / "judgments.sqlite"
    other = write_candidates(tmp_path / "other.jsonl", PAIRS, start=shift)
    both = [
        labelling(server, file, tmp_path / name, f"judge.ledger={ledger}")
        for name, file in (("one", candidates), ("other", other))
    ]
    for child in [work.start() for work in both]:
        ended(child)
    stats, found = server.settled(), books(ledger)
    # Both may ask the probe; every question is asked by one of them, in two orders.
    assert stats["duplicates"] == 0 and found.probes == 1 and found.twice == 0
    assert stats["received"] == found.answers == found.probes + 2 * (PAIRS + shift)
    assert both[0].exported() == undisturbed[0].exported()
    assert len(read_jsonl(both[1].out)) == PAIRS and not wrong_labels(other, both[1].verdicts())


def test_two_of_the_same_command_share_one_labelling(server, candidates, undisturbed, tmp_path):
    both = [labelling(server, candidates, tmp_path / "runs").start() for _ in range(2)]
    for child in both:
        ended(child)
    assert server.settled()["received"] == 1 + 2 * PAIRS
    assert labelling(server, candidates, tmp_path / "runs").exported() == undisturbed[0].exported()


def test_ctrl_c_keeps_what_is_under_way_and_the_same_command_asks_the_rest(
    server, candidates, undisturbed, tmp_path
):
    work = labelling(server, candidates, tmp_path / "runs")
    child = work.start()
    server.wait_for(PAIRS // 2, child=child)
    child.send_signal(signal.SIGINT)
    told = ended(child, status=130)
    lines = [line for line in told.splitlines() if "interrupted" in line or "error" in line]
    assert len(lines) == 1 and "To go on: python -m align.judge candidates=" in lines[0]
    stats, found = server.settled(), books(work.ledger)
    assert stats["aborted"] == 0 and stats["received"] < 2 * PAIRS
    assert found.answers == stats["answered"] and not found.under_way and not found.uncertain
    work.finish()
    stats = server.settled()
    assert stats["received"] == stats["answered"] == 1 + 2 * PAIRS and stats["duplicates"] == 0
    assert work.exported() == undisturbed[0].exported()


def test_a_recipe_killed_while_it_labels_asks_for_no_finished_answer_again(server, tmp_path):
    words = [
        *SMALL, "data.limit=16", "sampler.max_new_tokens=24", "stages=[generate,label]",
        f"workspace={tmp_path / 'runs'}", "judge=openai", "judge.model=fake",
        f"judge.base_url={server.url}", "judge.price_in=1", "judge.price_out=2",
        "judge@evaluate.judge=none", "judge.concurrency=4",
    ]  # fmt: skip
    ledger, began = tmp_path / "runs" / "judgments.sqlite", time.time()
    child = spawn("align.run", *words)
    server.wait_for(24, child=child)
    os.killpg(child.pid, signal.SIGKILL)
    killed = time.time()
    out, err = child.communicate()
    assert child.returncode == -signal.SIGKILL, f"{out}\n{err[-3000:]}"
    cut, before = books(ledger), server.settled()
    lost = before["answered"] - cut.answers
    assert cut.answers and 0 <= lost <= len(cut.under_way) <= 4
    ended(spawn("align.run", *words))
    stats, found = server.settled(), books(ledger)
    assert stats["duplicates"] <= lost and stats["answered"] == found.answers + lost
    assert found.twice == 0 and found.spent + found.uncertain >= charged(server)
    log = [line for line in server.log() if line["t"] > began]
    assert not answered_again(log, [killed], window=2)
    (verdicts,) = tmp_path.glob("runs/artifacts/label/*/verdicts.jsonl")
    assert len(read_jsonl(verdicts)) == (found.answers - found.probes) / 2
