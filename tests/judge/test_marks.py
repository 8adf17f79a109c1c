"""The judge's marks, small enough for the suite; benchmarks/judge.py measures them in full."""

import asyncio
import math
import time
from pathlib import Path

import pytest

from align.records import STATUSES
from tests.judge.fake_server import FakeServer
from tests.judge.killing import books
from tests.judge.labelling import (
    LLMBAR,
    Labelling,
    charged,
    comparisons,
    ended,
    judge_settings,
    judged,
    mishaps,
    replayed,
    statuses,
    write_candidates,
    wrong_labels,
)

FAULTS = mishaps(0.3)
# Time-outs are among the faults; a patient breaker, for a suite on a busy machine.
PATIENT = ("judge.timeout_s=1.5", "judge.concurrency=16")


def labelling(server: FakeServer, candidates: Path, folder: Path, *more: str) -> Labelling:
    return Labelling(
        server=server, candidates=candidates, workspace=folder / "runs", settings=(*PATIENT, *more)
    )


def assert_all_named_and_none_wrong(work: Labelling, *, pairs: int) -> None:
    verdicts = work.verdicts()
    assert [v["id"] for v in verdicts] == [f"p{n}" for n in range(pairs)]
    assert set(statuses(verdicts)) <= set(STATUSES)
    assert not wrong_labels(work.candidates, verdicts)
    assert sum(v["status"] == "ok" for v in verdicts) > 0.75 * pairs


def test_with_three_faults_in_ten_answers_no_label_is_wrong_and_every_row_ends_in_a_status(
    tmp_path,
):
    pairs, cap = 150, 0.5
    candidates = write_candidates(tmp_path / "candidates.jsonl", pairs)
    with FakeServer(tmp_path, faults=FAULTS, seed=1) as server:
        work = labelling(server, candidates, tmp_path, f"judge.budget_usd={cap}")
        work.finish()
        assert_all_named_and_none_wrong(work, pairs=pairs)
        stats, found = server.stats(), books(work.ledger)
        assert len(stats["faults"]) == len(FAULTS)
        assert sum(stats["faults"].values()) > 0.2 * stats["received"]
        assert charged(server) <= found.spent + found.uncertain <= cap * 1e9


def test_a_budget_that_is_hit_is_never_passed_and_raising_it_loses_nothing(tmp_path):
    pairs, cap = 60, 0.02
    candidates = write_candidates(tmp_path / "candidates.jsonl", pairs)
    with FakeServer(tmp_path, faults=FAULTS, seed=2, latency=0.01) as server:
        small = labelling(server, candidates, tmp_path, f"judge.budget_usd={cap}")
        told = ended(small.start(), status=1)
        assert f"judge.budget_usd={cap}: the next request could pass" in told
        before, billed = books(small.ledger), charged(server)
        assert 0 < billed <= before.spent + before.uncertain <= cap * 1e9
        assert not before.under_way and not wrong_labels(candidates, small.verdicts())
        ample = labelling(server, candidates, tmp_path, "judge.budget_usd=0.5")
        ample.finish()
        assert_all_named_and_none_wrong(ample, pairs=pairs)
        after = books(ample.ledger)
        assert not {k for k, n in before.answered.items() if n > after.answered[k]}
        assert charged(server) <= after.spent + after.uncertain <= 0.5 * 1e9


@pytest.mark.skipif(not LLMBAR.is_dir(), reason=f"needs the stored GPT-4 answers in {LLMBAR}")
def test_gpt4_s_stored_answers_give_the_agreement_that_was_counted_independently(tmp_path):
    report, stats = replayed(tmp_path)
    assert set(stats["statuses"]) == {"200"}
    against, place = report["against"][0], report["position"]
    assert against["one_order"]["agreement"]["mean"] == 0.795
    assert round(against["one_order"]["kappa"]["mean"], 2) == 0.59
    assert (place["consistent"]["n"], place["consistent"]["mean"]) == (200, 0.87)
    assert round(against["both_alike"]["agreement"]["mean"], 3) == 0.856
    assert round(against["both_alike"]["kappa"]["mean"], 2) == 0.71


def test_sixteen_at_a_time_take_little_longer_than_their_latency(tmp_path):
    pairs, concurrency, latency = 128, 16, 0.2
    with FakeServer(tmp_path, keep_log=False, latency=latency) as server:
        settings = judge_settings(server, tmp_path / "ledger.sqlite", concurrency=concurrency)
        asyncio.run(judged(comparisons(1), settings))  # the probe, and the imports
        started = time.monotonic()
        assert asyncio.run(judged(comparisons(pairs, start=1), settings)) == pairs
        seconds = time.monotonic() - started
        assert server.stats()["max_in_flight"] == concurrency
    assert seconds <= 1.35 * math.ceil(2 * pairs / concurrency) * latency
