"""Measures the judge against its marks: overhead, rate, memory, kills, faults, replay.

`python benchmarks/judge.py [--only NAME …] [--quick] [--kills N] [--markdown FILE]` prints a table.
It asks the tests' fake server alone and writes nothing but that FILE. All of it takes about half an
hour; a busy machine makes the ratios worse and nothing else.
"""

import argparse
import asyncio
import contextlib
import io
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from align.records import STATUSES
from benchmarks.table import Row, machine, markdown
from tests.judge import labelling
from tests.judge.fake_server import REPOSITORY, FakeServer
from tests.judge.killing import EARLY_S, Killing, books, kill_until_finished
from tests.judge.labelling import Labelling

FLAT = 60  # bytes a row: an offset in the index, and what the allocator does beside it


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    quick: bool
    kills: int
    folder: Path

    def pick(self, full: int, quick: int) -> int:
        return quick if self.quick else full


def timed(work: Coroutine[Any, Any, Any]) -> tuple[float, float]:
    """Wall and processor seconds of this process, which says nothing meanwhile."""
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()):
        asyncio.run(work)
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# Overhead: wall time over what the latency alone would take.


def overhead(size: Size) -> Iterator[Row]:
    latency, rounds = 1.0, size.pick(12, 4)
    for concurrency in (16, 64, 256):
        pairs = rounds * concurrency // 2
        floor = math.ceil(2 * pairs / concurrency) * latency
        with FakeServer(size.folder, keep_log=False, latency=latency) as server:
            cold, warm = (size.folder / f"{name}-{concurrency}.sqlite" for name in ("cold", "warm"))
            settings = labelling.judge_settings(server, warm, concurrency=concurrency)
            timed(labelling.judged(labelling.comparisons(1, start=10**6), settings))
            wall, cpu = timed(labelling.judged(labelling.comparisons(pairs), settings))
            mark = {"mark": "≤ 1.10", "met": wall <= 1.10 * floor} if concurrency == 64 else {}
            told = f"{wall / floor:.3f} ({wall:.2f} s for {2 * pairs:,} requests of {floor:.0f} s"
            yield Row(
                what=f"wall time over its floor, c={concurrency}",
                measured=f"{told}; {cpu / 2 / pairs * 1e3:.2f} ms CPU a request)",
                **mark,
            )
            settings = labelling.judge_settings(server, cold, concurrency=concurrency)
            wall, _ = timed(labelling.judged(labelling.comparisons(pairs), settings))
            yield Row(
                what=f"… with an empty ledger: a probe first, c={concurrency}",
                measured=f"{wall / floor:.3f} ({wall:.2f} s for {2 * pairs + 1:,} requests)",
            )
            if concurrency == 64:
                yield whole_command(size, server, pairs=pairs, floor=floor)


def whole_command(size: Size, server: FakeServer, *, pairs: int, floor: float) -> Row:
    candidates = labelling.write_candidates(size.folder / "overhead.jsonl", pairs)
    started = time.monotonic()
    Labelling(server=server, candidates=candidates, workspace=size.folder / "overhead").finish()
    wall = time.monotonic() - started
    return Row(
        what="… the whole command, from python to the exported file, c=64",
        measured=f"{wall / floor:.3f} ({wall:.2f} s)",
    )


# Rate: requests a second against a bare loop over the same SDK.


async def bare(url: str, bodies: list[dict[str, Any]], concurrency: int) -> None:
    """Sends the bodies and keeps nothing."""
    from openai import AsyncOpenAI

    waiting = iter(bodies)
    async with AsyncOpenAI(api_key="none", base_url=url, max_retries=0) as client:

        async def worker() -> None:
            for body in waiting:
                answer = await client.chat.completions.with_raw_response.create(**body)
                assert answer.http_response.content

        await asyncio.gather(*(worker() for _ in range(concurrency)))


async def rendered(pairs: list[Any], settings: Any) -> list[dict[str, Any]]:
    """The bodies that the judge sends for the pairs."""
    from align.judge.ledger import Ledger
    from align.judge.request import Capability, request
    from align.judge.verdicts import groups, questions

    with Ledger.open(Path(settings.ledger)) as opened:
        able = Capability(**(opened.capability(settings.judge) or {}))
    return [
        dict(request(question, settings=settings, able=able, limit=settings.max_chars).body)
        for group in groups(pairs, settings=settings)
        for question in questions(group, settings=settings)
    ]


def rate(size: Size) -> Iterator[Row]:
    pairs = labelling.comparisons(size.pick(1500, 400))
    with FakeServer(size.folder, keep_log=False) as server:
        for concurrency in (64, 16, 256):
            ledger = size.folder / f"rate-{concurrency}.sqlite"
            settings = labelling.judge_settings(server, ledger, concurrency=concurrency)
            timed(labelling.judged(labelling.comparisons(1, start=10**6), settings))
            bodies = asyncio.run(rendered(pairs, settings))
            rounds = [
                one_round(server, pairs, bodies, ledger, concurrency=concurrency, number=number)
                for number in range(size.pick(7, 3))
            ]
            yield rate_row(rounds, len(bodies), concurrency=concurrency)


def one_round(
    server: FakeServer, pairs: list[Any], bodies: list[Any], ledger: Path, *, concurrency: int,
    number: int,
) -> tuple[float, float, float, float]:  # fmt: skip
    """Wall and processor seconds of the bare loop and of ours, in turns the one or the other
    first.
    """
    fresh = ledger.with_name(f"{ledger.stem}-{number}.sqlite")
    settings = labelling.judge_settings(server, fresh, concurrency=concurrency)
    timed(labelling.judged(labelling.comparisons(1, start=10**6), settings))
    server.reset()
    works: list[Callable[[], Coroutine[Any, Any, Any]]] = [
        lambda: bare(server.url, bodies, concurrency),
        lambda: labelling.judged(pairs, settings),
    ]
    order = [0, 1] if number % 2 else [1, 0]
    took = {which: timed(works[which]()) for which in order}
    assert server.stats()["answered"] == 2 * len(bodies)
    return (*took[0], *took[1])


def rate_row(rounds: list[tuple[float, ...]], requests: int, *, concurrency: int) -> Row:
    ratio = statistics.median(theirs / ours for theirs, _, ours, _ in rounds)
    theirs, their_cpu, ours, our_cpu = (
        statistics.median(column) for column in zip(*rounds, strict=True)
    )
    mark = {"mark": "≥ 0.8", "met": ratio >= 0.8} if concurrency == 64 else {}
    return Row(
        what=f"request rate over that of a bare loop, c={concurrency}",
        measured=(
            f"{ratio:.2f} ({requests / ours:.0f}/s against {requests / theirs:.0f}/s; "
            f"{our_cpu / requests * 1e3:.2f} against {their_cpu / requests * 1e3:.2f} ms CPU a "
            f"request; median of {len(rounds)})"
        ),
        **mark,
    )


# Memory: the most that the whole command holds, over the rows.


def memory(size: Size) -> Iterator[Row]:
    counts = (10_000, 100_000) if size.quick else (10_000, 100_000, 1_000_000)
    peaks = {count: peak(size, count, ["judge=scripted"]) for count in counts}
    yield memory_row("scripted", peaks)
    counts = (2_000, 10_000) if size.quick else (10_000, 50_000)
    with FakeServer(size.folder, keep_log=False) as server:
        judge = [
            "judge=openai", "judge.model=fake", f"judge.base_url={server.url}", "judge.price_in=1",
            "judge.price_out=2",
        ]  # fmt: skip
        yield memory_row("openai", {count: peak(size, count, judge) for count in counts})


def peak(size: Size, rows: int, judge: list[str]) -> tuple[int, float]:
    """Bytes at most, and seconds, of `python -m align.judge` on so many rows."""
    with tempfile.TemporaryDirectory(dir=size.folder) as folder:
        candidates = labelling.write_candidates(Path(folder) / "candidates.jsonl", rows)
        words = [f"candidates={candidates}", f"workspace={folder}/runs", f"out={folder}/out.jsonl"]
        command = [sys.executable, "-m", "align.judge", *words, *judge]
        started, most = time.monotonic(), 0
        with (Path(folder) / "said").open("w") as said:
            child = subprocess.Popen(
                command, cwd=REPOSITORY, env=labelling.ENVIRONMENT, stdout=said, stderr=said
            )
            while child.poll() is None:
                most = max(most, high_water(child.pid))
                time.sleep(0.02)
        assert child.returncode == 0, (Path(folder) / "said").read_text()
        return most, time.monotonic() - started


def high_water(pid: int) -> int:
    """The most that the process has had in memory, 0 once it is gone. `ru_maxrss` would count what
    its parent held when it was forked.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 if lines else 0


def memory_row(judge: str, peaks: dict[int, tuple[int, float]]) -> Row:
    few, many = sorted(peaks)[-2:]
    slope = (peaks[many][0] - peaks[few][0]) / (many - few)
    told = ", ".join(
        f"{count:,} rows {most / 2**20:.0f} MiB ({seconds:.0f} s)"
        for count, (most, seconds) in sorted(peaks.items())
    )
    return Row(
        what=f"peak memory, judge={judge}",
        measured=f"{told}: {slope:.0f} bytes a row",
        mark=f"< {FLAT} bytes a row",
        met=slope < FLAT,
    )


# Kills.


def kill(size: Size) -> Iterator[Row]:
    pairs, concurrency = 150, 16
    rng, killing, starts = random.Random(11), Killing(), 0
    candidates = labelling.write_candidates(size.folder / "killed.jsonl", pairs)
    with FakeServer(size.folder, keep_log=False, latency=0.1) as server:

        def work(name: str) -> Labelling:
            settings = (f"judge.concurrency={concurrency}",)
            folder = size.folder / name
            return Labelling(
                server=server, candidates=candidates, workspace=folder, settings=settings
            )

        expected, started = work("undisturbed"), time.monotonic()
        expected.finish()
        whole = time.monotonic() - started
        while killing.kills < size.kills:
            server.reset()
            again = work(f"killed-{starts}")
            moments = (
                rng.uniform(0, EARLY_S if rng.random() < 0.05 else whole)
                for _ in range(size.kills - killing.kills)
            )
            kill_until_finished(again, moments, killing=killing)
            assert again.exported() == expected.exported()
            starts += 1
    yield Row(
        what=f"kill -9 at {killing.kills} random points ({killing.early} in the first 300 ms)",
        measured=(
            f"{starts} labellings of {2 * pairs} requests, no finished call lost or sent again, "
            "every ledger whole, every export byte-identical"
        ),
        mark="all",
        met=True,  # asserted at each kill
    )
    most = killing.kills * concurrency
    yield Row(
        what=f"… calls that were paid for twice, c={concurrency}",
        measured=(
            f"{killing.duplicates} (of {killing.under_way} under way at the kills, at most "
            f"{killing.most_under_way} at one; {killing.probed_again} of them the probe)"
        ),
        mark=f"≤ {most:,}",
        met=killing.duplicates <= killing.under_way <= most,
    )


# Faults.


def faults(size: Size) -> Iterator[Row]:
    pairs = size.pick(500, 100)
    candidates = labelling.write_candidates(size.folder / "faults.jsonl", pairs)
    patient = ("judge.timeout_s=2", "judge.concurrency=32")
    for cap, ends in ((5.0, True), (0.1, False)):
        folder = size.folder / f"faults-{cap}"
        with FakeServer(size.folder, faults=labelling.mishaps(0.3), seed=3) as server:
            settings = (*patient, f"judge.budget_usd={cap}")
            work = Labelling(
                server=server, candidates=candidates, workspace=folder, settings=settings
            )
            labelling.ended(work.start(), status=0 if ends else 1)
            stats, found, verdicts = server.stats(), books(work.ledger), work.verdicts()
            charged = labelling.charged(server)
        wrong = labelling.wrong_labels(candidates, verdicts)
        told = labelling.statuses(verdicts)
        rows = f"{len(verdicts)} of {pairs} rows have a status"
        if ends:
            met, share = sum(stats["faults"].values()), stats["received"]
            yield Row(
                what=f"30% of answers faulty ({met:,} of {share:,})",
                measured=f"{len(wrong)} labels wrong, {rows}: "
                + ", ".join(f"{n} {status}" for status, n in told.most_common()),
                mark="0 wrong, all rows",
                met=not wrong and len(verdicts) == pairs and set(told) <= set(STATUSES),
            )
        counted = found.spent + found.uncertain
        yield Row(
            what=f"… spending under budget_usd={cap:g}" + ("" if ends else ", which stops the run"),
            measured=f"${charged / 1e9:.4f} by the server's usage, "
            f"${counted / 1e9:.4f} by the ledger with its worst cases",
            mark=f"≤ ${cap:g}",
            met=not wrong and charged <= counted <= cap * 1e9,
        )


# Replay.


def replay(size: Size) -> Iterator[Row]:
    if not labelling.LLMBAR.is_dir():
        yield Row(what="GPT-4's stored answers", measured=f"skipped: no {labelling.LLMBAR}")
        return
    report, _ = labelling.replayed(size.folder)
    against = report["against"][0]
    one, both = against["one_order"], against["both_alike"]
    found = {
        "one order": (100 * one["agreement"]["mean"], one["kappa"]["mean"]),
        "both orders alike": (100 * both["agreement"]["mean"], both["kappa"]["mean"]),
    }
    share = 100 * report["position"]["consistent"]["mean"]
    told = "; ".join(f"{name} {a:.1f}%, κ {k:.2f}" for name, (a, k) in found.items())
    measured = f"{told}; {share:.1f}% of pairs alike"
    wanted = "one order 79.5%, κ 0.59; both orders alike 85.6%, κ 0.71; 87.0% of pairs alike"
    yield Row(
        what="GPT-4's stored answers against people, through server, SDK, parser, ledger, report",
        measured=measured,
        mark=wanted,
        met=measured == wanted,
    )


BENCHMARKS = {f.__name__: f for f in (overhead, rate, memory, kill, faults, replay)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--quick", action="store_true", help="a few minutes, figures for nobody")
    parser.add_argument("--kills", type=int, help="how many (100; 10 with --quick)")
    parser.add_argument("--markdown", type=Path, help="the table's file")
    given = parser.parse_args()
    heading = f"{machine()}: `python {' '.join(sys.argv)}`"
    print(heading, flush=True)
    rows = []
    for name in given.only:
        with tempfile.TemporaryDirectory(prefix="align-benchmark-") as folder:
            kills = given.kills or (10 if given.quick else 100)
            size = Size(quick=given.quick, kills=kills, folder=Path(folder))
            for row in BENCHMARKS[name](size):
                print(" | ".join(cell for cell in row.cells if cell), flush=True)
                rows.append(row)
    if given.markdown is not None:
        given.markdown.write_text(markdown(rows, heading), "utf-8")
    return 1 if any(row.met is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
