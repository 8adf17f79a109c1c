"""`python -m align.judge` as people type it."""

import csv
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.judge.fake_server import FakeServer
from tests.test_pipeline import ENVIRONMENT

ROOT = str(Path(__file__).parents[2])


def judge(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "align.judge", *words],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**ENVIRONMENT, "PYTHONPATH": ROOT, **environment},
        timeout=120,
    )


def at(server: FakeServer, *, node: str = "judge") -> list[str]:
    return [
        "judge=openai", f"{node}.model=fake", f"{node}.base_url={server.url}",
        f"{node}.price_in=1", f"{node}.price_out=2",
    ]  # fmt: skip


ROWS = [
    {"prompt": "Capital of France?", "responses": ["Paris.", "It is Paris, of course."]},
    {"id": "own", "messages": [{"role": "user", "content": "2+2?"}],
     "responses": [{"text": "4"}, {"text": "5, I think"}], "source": "exam"},
    {"prompt": "One answer", "responses": ["alone"]},
]  # fmt: skip


def write_rows(path: Path, rows: list, *extra: str) -> Path:
    lines = [json.dumps(row) for row in rows]
    path.write_text("\n".join([lines[0], *extra, *lines[1:]]) + "\n")
    return path


def preferences(folder: Path, name: str = "preferences.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_candidates_become_preferences_and_bad_rows_are_named_while_the_rest_goes_on(tmp_path):
    bad = ("not json", '{"prompt": "x"}', "[1]", '{"prompt": "x", "responses": [7]}', "")
    write_rows(tmp_path / "c.jsonl", ROWS, *bad)
    with FakeServer(tmp_path) as server:
        answer = judge(tmp_path, "candidates=c.jsonl", *at(server))
        assert answer.returncode == 0, answer.stderr
        again = judge(tmp_path, "candidates=c.jsonl", *at(server))
        assert server.stats()["received"] == 5  # a probe, and two pairs in two orders
    found = preferences(tmp_path)
    assert [(row["id"], row["chosen"]) for row in found] == [
        ("0000001", "It is Paris, of course."),
        ("own", "5, I think"),
    ]
    assert found[1]["meta"]["source"] == "exam" and 0.5 < found[0]["p"] < 1
    for number in (2, 3, 4, 5):
        assert f"c.jsonl:{number}: " in answer.stderr
    assert "2 preferences from 2 comparisons: preferences.jsonl" in answer.stdout
    assert "4 rows of c.jsonl left out" in answer.stdout
    assert "up to date" in again.stdout


def test_parquet_is_read_like_lines(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"prompt": row["prompt"], "responses": row["responses"]} for row in (ROWS[0], ROWS[2])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    with FakeServer(tmp_path) as server:
        assert judge(tmp_path, "candidates=c.parquet", *at(server)).returncode == 0
    assert [row["chosen"] for row in preferences(tmp_path)] == ["It is Paris, of course."]


def test_a_dry_run_needs_no_key_sends_nothing_and_knows_what_is_there(tmp_path):
    write_rows(tmp_path / "c.jsonl", ROWS)
    words = ["candidates=c.jsonl", "judge=openai", "judge.model=gpt-4.1-mini", "dry_run=true"]
    answer = judge(tmp_path, *words)
    assert answer.returncode == 0, answer.stderr
    assert "2 comparisons, 4 requests (0 answered already)" in answer.stdout
    assert "$0.4 and $1.6 per million tokens" in answer.stdout
    assert not (tmp_path / "preferences.jsonl").exists()
    with FakeServer(tmp_path) as server:
        judge(tmp_path, "candidates=c.jsonl", *at(server))
        sent = server.stats()["received"]
        dry = judge(tmp_path, "candidates=c.jsonl", *at(server), "dry_run=true")
        assert "(4 answered already)" in dry.stdout and "as measured" in dry.stdout
        assert server.stats()["received"] == sent


def test_failed_comparisons_are_asked_again_when_told_to(tmp_path):
    write_rows(tmp_path / "c.jsonl", ROWS)
    words = ["candidates=c.jsonl", "judge.max_attempts=1"]
    with FakeServer(tmp_path) as server:
        judge(tmp_path, "canaries", *at(server))  # the probe meets no fault
        server.plan(fault_sequence=["500"])
        first = judge(tmp_path, *words, *at(server))
        assert "without a verdict, so no preference: 1 failed" in first.stdout, first.stderr
        server.plan(fault_sequence=[])
        server.reset()
        second = judge(tmp_path, *words, *at(server), "retry=true")
        assert second.returncode == 0 and server.stats()["received"] == 1
    assert len(preferences(tmp_path)) == 2


def test_a_retry_that_goes_on_with_a_killed_run_asks_for_what_failed_before(tmp_path):
    write_rows(tmp_path / "c.jsonl", [{**ROWS[0], "prompt": str(i)} for i in range(6)])
    words = ["candidates=c.jsonl", "judge.max_attempts=1", "judge.concurrency=1"]
    with FakeServer(tmp_path) as server:
        server.plan(fault_sequence=[None, "500"])  # the probe is answered
        capped = judge(tmp_path, *words, *at(server), "judge.max_requests=8")
        assert capped.returncode == 1 and "judge.max_requests=8" in capped.stderr
        done = judge(tmp_path, *words, *at(server), "retry=true")
    assert done.returncode == 0, done.stderr
    assert "1 failed" in done.stdout and "1 comparisons failed and are asked again" in done.stdout
    assert len(preferences(tmp_path)) == 6


def test_when_all_comparisons_failed_the_same_command_asks_again(tmp_path):
    write_rows(tmp_path / "c.jsonl", ROWS)
    words = ["candidates=c.jsonl", "judge.max_attempts=1"]
    with FakeServer(tmp_path) as server:
        judge(tmp_path, "canaries", *at(server))
        server.plan(faults={"500": 1.0})
        first = judge(tmp_path, *words, *at(server))
        assert first.returncode == 1 and "no verdict on any of 2 comparisons" in first.stderr
        server.plan(faults={})
        second = judge(tmp_path, *words, *at(server))
        assert second.returncode == 0, second.stderr
    assert len(preferences(tmp_path)) == 2


def test_agreement_asks_again_where_the_judge_failed_when_told_to(tmp_path):
    rows = [{"prompt": "?", "first": "No.", "second": "No, never.", "label": 2}]
    write_rows(tmp_path / "pairs.jsonl", [*rows, {**rows[0], "prompt": "??"}])
    words = ["agreement", "pairs=pairs.jsonl", "judge.max_attempts=1"]
    with FakeServer(tmp_path) as server:
        judge(tmp_path, "canaries", *at(server))
        server.plan(fault_sequence=["500"])
        first = judge(tmp_path, *words, *at(server))
        assert "the judge failed at 1 of 2 pairs; to ask the failed ones again" in first.stderr
        server.plan(fault_sequence=[])
        server.reset()
        again = judge(tmp_path, *words, *at(server), "retry=true")
        assert again.returncode == 0 and server.stats()["received"] == 1
    report = json.loads((tmp_path / "agreement" / "agreement.json").read_text())
    assert report["statuses"] == {"ok": 2}
    (aside,) = (tmp_path / "agreement").glob("verdicts-*.retried-*")
    assert aside.read_text().count('"failed"') == 1


def test_status_tells_progress_spending_and_what_was_possibly_billed(tmp_path):
    write_rows(tmp_path / "c.jsonl", ROWS)
    with FakeServer(tmp_path) as server:
        judge(tmp_path, "canaries", *at(server))
        server.plan(fault_sequence=["cut"])
        judge(tmp_path, "candidates=c.jsonl", *at(server))
    told = judge(tmp_path, "status", "ledger=runs/judgments.sqlite").stdout
    assert "judge fake (asked by json_schema)" in told
    assert "possibly billed" in told and "for 1 attempts" in told
    assert "2 of 2 comparisons; done" in told


def test_status_lists_what_is_in_batches_and_a_foreign_ledger_cannot_steer_the_terminal(tmp_path):
    write_rows(tmp_path / "c.jsonl", ROWS)
    with FakeServer(tmp_path, batch_polls=10**6) as server:
        words = ["candidates=c.jsonl", *at(server), "judge.batch=true", "judge.batch_poll_s=0.1"]
        child = subprocess.Popen(
            [sys.executable, "-m", "align.judge", *words], cwd=tmp_path,
            env={**ENVIRONMENT, "PYTHONPATH": ROOT},
            stderr=subprocess.PIPE,
        )  # fmt: skip
        assert child.stderr is not None
        assert any(b"/4 done" in line for line in child.stderr)
        child.kill()
        child.communicate()
        told = judge(tmp_path, "status", "ledger=runs/judgments.sqlite").stdout
    assert "batches at providers" in told
    assert re.search(rf"fake at {server.url}: submitted \(batch_\S+\), 4 requests", told), told
    with closing(sqlite3.connect(tmp_path / "runs" / "judgments.sqlite")) as db, db:
        db.execute("UPDATE judge SET capability = '[]'")
    dry = judge(tmp_path, "candidates=c.jsonl", *at(server), "dry_run=true")
    assert dry.returncode == 1 and "says of fake what no probe can have found" in dry.stderr
    assert len(dry.stderr.splitlines()) == 1
    with closing(sqlite3.connect(tmp_path / "runs" / "judgments.sqlite")) as db, db:
        db.execute("UPDATE judge SET identity = 'evil' || char(27) || '[2J'")
    told = judge(tmp_path, "status", "ledger=runs/judgments.sqlite")
    assert told.returncode == 0 and "evil[U+001B][2J" in told.stdout, told.stderr


def test_the_candidates_are_never_overwritten(tmp_path):
    path = write_rows(tmp_path / "c.jsonl", ROWS)
    before = path.read_bytes()
    answer = judge(tmp_path, "candidates=c.jsonl", "judge=scripted", "out=./c.jsonl")
    assert answer.returncode == 1 and "which would be overwritten" in answer.stderr
    assert path.read_bytes() == before


def test_a_job_is_at_work_as_long_as_its_process_lives(tmp_path):
    write_rows(tmp_path / "c.jsonl", [{**ROWS[0], "prompt": str(i)} for i in range(40)])
    words = ["candidates=c.jsonl", "judge.concurrency=2"]
    with FakeServer(tmp_path, latency=0.2) as server:
        child = subprocess.Popen(
            [sys.executable, "-m", "align.judge", *words, *at(server)], cwd=tmp_path,
            env={**ENVIRONMENT, "PYTHONPATH": ROOT}, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        server.wait_for(20)
        during = judge(tmp_path, "status", "ledger=runs/judgments.sqlite").stdout
        child.kill()
        child.wait()
        after = judge(tmp_path, "status", "ledger=runs/judgments.sqlite").stdout
        server.plan(latency=0)
        capped = judge(tmp_path, *words, *at(server), "judge.max_requests=60")
        assert capped.returncode == 1
    assert "at work, " in during and "at work" not in after and "ended early" in after
    last = judge(tmp_path, "status", "ledger=runs/judgments.sqlite").stdout.split("jobs\n")[1]
    assert re.search(r"(\d+) of 40", last) and int(re.search(r"(\d+) of 40", last)[1]) > 10


def test_what_the_numbers_leave_out_is_said(tmp_path):
    row = {"prompt": "?", "responses": ["No.", "No.", "No, never.", " "]}
    write_rows(tmp_path / "c.jsonl", [row])
    with FakeServer(tmp_path) as server:
        words = ["candidates=c.jsonl", *at(server)]
        dry = judge(tmp_path, *words, "dry_run=true", "judge.budget_usd=0.0001").stdout
        assert "more than judge.budget_usd=0.0001" in dry
        told = judge(tmp_path, *words, "judge.prompt=correctness")
    assert "compared with none: 1 empty, 1 that repeat another" in told.stdout
    assert "prompt 0000001 has no meta.reference" in told.stderr
    assert "answers as JSON by a schema, with probabilities (one request to" in told.stderr


BROKEN = """
from dataclasses import dataclass
from align.records import Verdict

@dataclass(frozen=True, kw_only=True)
class Settings:
    name: str
    module: str | None
    how: str

async def compare(comparisons, *, settings):
    for c in comparisons:
        if settings.how == "nothing":
            return
        p = c.frist if settings.how == "typo" else 2.0
        yield Verdict(id=c.prompt.id, first=c.first_index, second=c.second_index,
                      status="ok", p_first=p, consistent=True, judge="x")
"""


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("typo", "own_judge.py:15 (AttributeError: 'Comparison' object has no attribute 'frist')"),
        ("range", "(ValueError: p_first is 2.0, not a probability)"),
        ("nothing", "judge=own: passed all 2 comparisons over"),
    ],
)
def test_a_mistake_in_a_judge_of_ones_own_is_one_line(tmp_path, how, says):
    write_rows(tmp_path / "c.jsonl", ROWS)
    (tmp_path / "own_judge.py").write_text(BROKEN)
    words = ["judge=none", "judge.name=own", "judge.module=own_judge", f"+judge.how={how}"]
    answer = judge(tmp_path, "candidates=c.jsonl", *words, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert answer.returncode == 1 and says in answer.stderr, answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_judge_of_the_first_place_is_named_as_the_cause(tmp_path):
    write_rows(tmp_path / "c.jsonl", ROWS)
    with FakeServer(tmp_path, answer="first") as server:
        answer = judge(tmp_path, "candidates=c.jsonl", *at(server))
    assert answer.returncode == 1 and "the order decides, not the answer" in answer.stderr
    assert "or type label.ties=keep" in answer.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["foo"], "foo: no such sub-command"),
        (["candidates", "=", "c.jsonl"], "no blanks stand around =; type candidates=VALUE"),
        (["dry-run"], "dry-run: no such sub-command"),
        (["candidates=c.jsonl", "dry-run"], "settings are typed key=value"),
        (["--dry-run"], "--dry-run: no such option; settings are typed dry_run=VALUE"),
        (["judge.model=x"], "none is chosen there, and none has no settings; type judge=NAME"),
        (["judge=openai", "judge.model=x", "n=4"], "n: no such setting"),
        (["judge=openai", "budget_usd=3"], "no such setting; did you mean judge.budget_usd?"),
        (["statsu"], "did you mean status?"),
        ([], "no candidates given"),
        (["candidates=c.jsonl"], "no judge given"),
        (["candidates=nope.jsonl", "judge=rubric"], "candidates=nope.jsonl: no such file"),
        (["candidates=c.jsonl", "judge=rubric", "out=no/x"], "out=no/x: cannot be written there"),
        (["candidates=c.jsonl", "judge=openai"], "judge.model has no value"),
        (["candidates=c.jsonl", "judge=openai", "judge.model=unheard-of"], "its price is not in"),
        (["candidates=c.jsonl", "judge=openai", "judge.model=o3"], "OPENAI_API_KEY"),
        (["candidates=c.jsonl", "judge=openai", "judge.model=o3", "judge.prompt=kindness"],
         "judge.prompt=kindness: neither one of correctness, harmlessness"),
        (["candidates=c.jsonl", "judge=openai", "judge.model=o3", "judge.prompt=c.jsonl"],
         "judge.prompt=c.jsonl: a template's name ends in .j2"),
        (["candidates=c.jsonl", "judge=openai", "judge.model=o3", "judge.prompt=blind.j2"],
         "judge.prompt=blind.j2: names no responses"),
        (["candidates=c.jsonl", "judge=openai", "judge.model=o3", "judge.scael=two"],
         "did you mean judge.scale?"),
        (["candidates=c.jsonl", "judge=openai", "judge.model=o3",
          "judge.base_url=http://127.0.0.1:9/v1", "judge.ledger=/proc/x/y"], "/proc"),
        (["candidates=bad.jsonl", "judge=rubric"], "bad.jsonl: no row has candidates"),
        (["status", "ledger=nope"], "ledger=nope: no such file"),
        (["status", "legder=x"], "did you mean ledger?"),
        (["status", "ledger=c.jsonl"], "cannot be used"),
        (["agreement"], "no pairs given"),
        (["agreement", "pairs=c.jsonl"], "a judge is asked, or its labels are read"),
        (["canaries"], "no judge given"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_status_1(tmp_path, words, says):
    write_rows(tmp_path / "c.jsonl", ROWS)
    (tmp_path / "blind.j2").write_text("Who is better, {{ labels | join(' or ') }}?")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}\n')
    answer = judge(tmp_path, *words, OPENAI_API_KEY="")
    told = [line for line in answer.stderr.splitlines() if line.startswith("error: ")]
    assert answer.returncode == 1 and len(told) == 1 and says in told[0], answer.stderr
    assert "Traceback" not in answer.stderr


def imported(folder: Path, *words: str) -> tuple[str, list[str]]:
    """What the command says, and which heavy packages it imports on its way."""
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['align.judge', *{list(words)!r}]\n"
        "try:\n    runpy.run_module('align.judge', run_name='__main__')\n"
        "finally:\n    print(*{'torch', 'openai', 'trl'} & sys.modules.keys(), file=sys.stderr)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=folder,
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": ROOT}, timeout=60,
    )  # fmt: skip
    return answer.stdout, answer.stderr.splitlines()[-1].split()


@pytest.mark.parametrize("words", [["--help"], ["status", "--help"], ["agreement", "--help"]])
def test_help_comes_in_a_second_without_torch(tmp_path, words):
    started = time.monotonic()
    told, heavy = imported(tmp_path, *words)
    assert time.monotonic() - started < 3  # half a second where nothing else runs
    assert "align.judge" in told and heavy == []


def test_labelling_imports_no_torch(tmp_path):
    write_rows(tmp_path / "c.jsonl", ROWS)
    with FakeServer(tmp_path) as server:
        told, heavy = imported(tmp_path, "candidates=c.jsonl", *at(server))
    assert "2 preferences from 2 comparisons" in told and heavy == ["openai"]


def test_a_judge_is_measured_against_the_labels_of_people(tmp_path):
    """The server prefers the longer answer; two of four people's labels do."""
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["question", "a", "b", "ann", "ben"])
        for number, (ann, ben) in enumerate([("1", "1"), ("2", "1"), ("1", "2"), ("2", "tie")]):
            rows.writerow([f"q{number}", "a longer answer", "short", ann, ben])
    words = ["agreement", "pairs=pairs.csv", "columns.prompt=question", "columns.first=a",
             "columns.second=b", "columns.human=[ann,ben]", "resamples=200"]  # fmt: skip
    with FakeServer(tmp_path) as server:
        answer = judge(tmp_path, *words, *at(server))
        assert answer.returncode == 0, answer.stderr
        assert judge(tmp_path, *words, *at(server)).returncode == 0
        assert server.stats()["received"] == 9
    report = json.loads((tmp_path / "agreement" / "agreement.json").read_text())
    rates = [column["final"]["agreement"]["mean"] for column in report["against"]]
    assert rates == [0.5, 0.5]
    assert (tmp_path / "agreement" / "agreement.html").is_file()


def test_canaries_find_a_judge_that_the_longer_answer_sways(tmp_path):
    with FakeServer(tmp_path) as server:
        answer = judge(tmp_path, "canaries", *at(server))
    assert answer.returncode == 0, answer.stderr
    found = json.loads((tmp_path / "canaries.json").read_text())
    assert found["injected"]["flipped"] > 0 and "said nothing, at length" in answer.stdout


def test_the_environments_key_stands_in_no_file_of_the_run(tmp_path):
    key = "sk-live-0123456789abcdef"
    write_rows(tmp_path / "c.jsonl", ROWS)
    with FakeServer(tmp_path, require_key=key, keep_log=False) as server:
        words = ["candidates=c.jsonl", *at(server), "judge.api_key_env=MY_KEY"]
        assert judge(tmp_path, *words, MY_KEY="wrong-key-00000000").returncode == 1
        assert judge(tmp_path, *words, MY_KEY=key).returncode == 0
    for path in tmp_path.rglob("*"):
        if path.is_file() and "fake_server" not in str(path):
            assert key.encode() not in path.read_bytes(), path
            assert b"wrong-key-00000000" not in path.read_bytes(), path


def test_labels_that_are_made_again_are_moved_aside_and_kept(tmp_path):
    write_rows(tmp_path / "c.jsonl", ROWS)
    words = ["candidates=c.jsonl", "judge.max_attempts=1"]
    with FakeServer(tmp_path) as server:
        judge(tmp_path, "canaries", *at(server))
        server.plan(fault_sequence=["500"])
        judge(tmp_path, *words, *at(server))
        kept = judge(tmp_path, *words, *at(server), "retry=true")
    (aside,) = (tmp_path / "runs" / "artifacts" / "label").glob("*.retried-*")
    assert str(aside.relative_to(tmp_path)) in kept.stdout
    statuses = [v["status"] for v in preferences(aside, "verdicts.jsonl")]
    assert sorted(statuses) == ["failed", "ok"] and (aside / "manifest.json").is_file()


def member(name: str, *words: str) -> list[str]:
    return [f"+judge@judge.members.{name}=openai",
            *(word.replace("judge.", f"judge.members.{name}.") for word in words)]  # fmt: skip


def test_a_dry_run_of_a_jury_is_the_sum_over_its_members_that_are_paid(tmp_path):
    write_rows(tmp_path / "c.jsonl", ROWS)
    words = [
        "candidates=c.jsonl", "dry_run=true", "judge=jury", "+judge@judge.members.c=scripted",
        *member("a", "judge.model=gpt-4.1-mini"),
        *member("b", "judge.model=own", "judge.price_in=1000", "judge.price_out=1000"),
    ]  # fmt: skip
    told = judge(tmp_path, *words)
    assert told.returncode == 0, told.stderr
    assert told.stdout.count("2 comparisons, 4 requests (0 answered already)") == 2
    assert "gpt-4.1-mini: 2 comparisons" in told.stdout and "all 2: about $" in told.stdout


def test_a_dry_run_tells_what_an_escalation_may_add(tmp_path):
    write_rows(tmp_path / "c.jsonl", ROWS)
    other = ["judge.on_disagreement=escalate", "+judge@judge.escalate=openai"]
    own = ["judge.escalate.model=own", "judge.escalate.price_in=1000", "judge.escalate.price_out=0"]
    words = ["candidates=c.jsonl", "dry_run=true", "judge=openai", "judge.model=gpt-4.1-mini"]
    told = judge(tmp_path, *words, *other, *own)
    assert told.returncode == 0, told.stderr
    assert "own, if every pair comes to it: 2 comparisons, 4 requests" in told.stdout
    whole = re.search(r"all 2: about \$(.*) and what is escalated, at worst \$(.*)", told.stdout)
    assert whole and float(whole[1]) < 0.01 and float(whole[2]) > 1


OWN = """
from dataclasses import dataclass

@dataclass(frozen=True, kw_only=True)
class Settings:
    name: str
    module: str | None

async def compare(comparisons, *, settings):
    yield
"""


def test_a_dry_run_never_calls_a_judge_free_that_it_does_not_know(tmp_path):
    write_rows(tmp_path / "c.jsonl", ROWS)
    (tmp_path / "own_judge.py").write_text(OWN)
    words = ["candidates=c.jsonl", "dry_run=true"]
    own = judge(tmp_path, *words, "judge=none", "judge.name=own", "judge.module=own_judge",
                PYTHONPATH=f"{ROOT}:{tmp_path}")  # fmt: skip
    assert own.returncode == 1 and "judge.module=own_judge takes cannot be estimated" in own.stderr
    free = judge(tmp_path, *words, "judge=scripted")
    assert free.returncode == 1 and "judge=scripted sends no requests; it is free" in free.stderr
