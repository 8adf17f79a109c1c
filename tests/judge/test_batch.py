"""The Batch API: half the price, nothing asked twice, whatever is killed or expires."""

import asyncio
import os
import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.errors import JudgeError
from align.judge import batch, batch_api, endpoint, intake, openai, shards, tending
from align.judge.asker import Asker
from align.judge.batch import answer_in_batches
from align.judge.endpoint import Endpoint
from align.judge.estimate import estimate
from align.judge.ledger import Ledger
from align.judge.outcome import ending, unasked
from align.judge.prices import price_of
from align.judge.request import Capability
from align.judge.settings import Openai
from align.judge_commands.label import told_estimate
from align.records import Comparison, Message, Prompt, Verdict
from tests.judge.fake_server import FakeServer

CONF = Path(__file__).parents[2] / "conf"
DEFAULTS: dict[str, Any] = {
    "name": "openai", "module": None, "identity": None, "prompt": "helpfulness",
    "prompts": str(CONF / "judge" / "prompts"), "kind": "pairwise", "scale": "three", "lowest": 1,
    "highest": 10, "criteria": [], "reason": False, "reference": "reference",
    "on_disagreement": "tie", "escalate": None, "max_chars": 40000, "on_overflow": "truncate",
    "model": "gpt-4.1-mini", "api_key_env": "ALIGN_TEST_KEY", "samples": 1, "answer": "auto",
    "logprobs": "auto", "temperature": 0.0, "max_tokens": 64, "system_role": True,
    "concurrency": 8, "timeout_s": 10, "max_attempts": 3, "max_malformed": 2,
    "give_up_after_s": 5, "budget_usd": None, "max_requests": None, "price_in": None,
    "price_out": None, "prices": str(CONF / "prices.yaml"), "batch": True, "batch_poll_s": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with FakeServer(tmp_path_factory.mktemp("fake")) as server:
        yield server


@pytest.fixture
def server(shared: FakeServer, monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    shared.reset()
    shared.plan(
        answer="longest", faults={}, fault_sequence=[], context_chars=None, require_key=None,
        batch_polls=1, batch_expire=0.0, batch_error=0.0, batch_status=None,
    )  # fmt: skip
    monkeypatch.setenv("ALIGN_TEST_KEY", "k-secret-k")
    return shared


def pairs(n: int, *, start: int = 0) -> list[Comparison]:
    """The first is longer in every other one."""
    return [
        Comparison(
            prompt=Prompt(id=str(i), messages=(Message(role="user", content=f"Question {i}?"),)),
            first=f"No {i}." + " Indeed." * (i % 2),
            second=f"Yes {i}, é \ud800.",
        )
        for i in range(start, start + n)
    ]


def settings_of(server: FakeServer, ledger: Path, **more: Any) -> Openai:
    return Openai(**(DEFAULTS | {"base_url": server.url, "ledger": str(ledger)} | more))


def judged(comparisons: list[Comparison], settings: Openai) -> list[Verdict]:
    async def run() -> list[Verdict]:
        return [verdict async for verdict in openai.compare(comparisons, settings=settings)]

    return asyncio.run(run())


def batched(comparisons: list[Comparison], settings: Openai) -> Asker:
    """The batches alone, at an endpoint that can do everything."""

    async def run() -> Asker:
        at = Endpoint(
            settings.base_url, api_key_env=settings.api_key_env, timeout_s=10, connections=4
        )
        with Ledger.open(Path(settings.ledger)) as ledger:
            able = Capability.assumed(settings)
            asker = Asker(settings, ledger, at, price_of(settings), able)
            try:
                await answer_in_batches(comparisons, asker=asker)
            finally:
                await at.close()
        return asker

    return asyncio.run(run())


def rows(ledger: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(ledger)) as db:
        return db.execute(query).fetchall()


def statuses(ledger: Path) -> dict[str, int]:
    return dict(rows(ledger, "SELECT status, count(*) FROM attempt GROUP BY 1"))


def left(ledger: Path) -> list[str]:
    return sorted(path.name for path in shards.folder(ledger).iterdir())


def on_server(server: FakeServer) -> list[dict[str, Any]]:
    """All batches, newest first."""
    return list(server.ask("GET", "/v1/batches?limit=100")["data"])


def told(verdicts: list[Verdict]) -> list[Any]:
    return [(v.id, v.status, v.p_first, v.consistent, v.tokens) for v in verdicts]


def test_batches_give_the_verdicts_of_the_live_judge_at_half_the_cost(
    server: FakeServer, tmp_path: Path
) -> None:
    cheap = judged(pairs(9), settings_of(server, tmp_path / "batch.sqlite"))
    assert (server.stats()["batched"], len(on_server(server))) == (18, 1)
    answered = server.stats()["answered"]  # the probe alone
    dear = judged(pairs(9), settings_of(server, tmp_path / "live.sqlite", batch=False))
    assert answered == 1 and server.stats()["answered"] == 1 + 1 + 18
    assert told(cheap) == told(dear) and {v.status for v in dear} == {"ok"}
    assert [2 * v.cost for v in cheap] == pytest.approx([v.cost for v in dear], abs=1e-8)
    looks = "SELECT key, status, answer FROM judgment ORDER BY key"
    assert rows(tmp_path / "batch.sqlite", looks) == rows(tmp_path / "live.sqlite", looks)


def test_a_dry_run_promises_no_seconds(server: FakeServer, tmp_path: Path) -> None:
    settings = settings_of(server, tmp_path / "l.sqlite")
    found = estimate(pairs(2), settings=settings)
    assert told_estimate(settings, found).endswith("within a day a batch")
    live = replace(settings, batch=False)
    assert "64 at a time" in told_estimate(replace(live, concurrency=64), found)


def test_shards_are_seen_through_a_few_at_a_time(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider with little room halves them until there are thousands; each keeps a file open."""
    monkeypatch.setattr(batch, "HELD", 2)
    monkeypatch.setattr(shards, "MOST_REQUESTS", 2)
    real, most = shards.lock, [0]

    def counted(path: Path) -> Any:
        held = len([name for name in os.listdir("/proc/self/fd") if "-batches" in target(name)])
        most[0] = max(most[0], held + 1)
        return real(path)

    monkeypatch.setattr(shards, "lock", counted)
    batched(pairs(6), settings_of(server, tmp_path / "l.sqlite"))
    assert len(on_server(server)) == 6 and statuses(tmp_path / "l.sqlite") == {"answered": 12}
    assert most[0] == 2 and left(tmp_path / "l.sqlite") == []


def target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return ""


def test_what_was_never_submitted_is_withdrawn_when_an_earlier_shard_stops_the_run(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "HELD", 2)
    monkeypatch.setattr(shards, "MOST_REQUESTS", 2)
    server.plan(batch_status="failed")
    with pytest.raises(JudgeError, match="has no room for 2 requests"):
        batched(pairs(6), settings_of(server, tmp_path / "l.sqlite"))
    assert statuses(tmp_path / "l.sqlite") == {} and left(tmp_path / "l.sqlite") == []
    assert rows(tmp_path / "l.sqlite", "SELECT * FROM batch") == []


def test_a_provider_that_answers_nothing_ends_the_rounds_under_a_cap_too(
    server: FakeServer, tmp_path: Path
) -> None:
    server.plan(batch_expire=1.0)
    batched(pairs(150), settings_of(server, tmp_path / "l.sqlite", budget_usd=0.06))
    assert len(on_server(server)) == batch.ROUNDS


def test_ctrl_c_while_the_last_batch_is_taken_in_stops_before_the_live_requests(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = tending.take_in

    async def take_in(*given: Any, **named: Any) -> Any:
        counts = await real(*given, **named)
        found.stop()
        return counts

    class Watched(batch.Run):
        def __init__(self, *given: Any, **named: Any) -> None:
            nonlocal found
            super().__init__(*given, **named)
            found = self

    found: Any = None
    monkeypatch.setattr(tending, "take_in", take_in)
    monkeypatch.setattr(batch, "Run", Watched)
    server.plan(batch_expire=0.3)
    with pytest.raises(JudgeError, match="interrupted"):
        judged(pairs(20), settings_of(server, tmp_path / "l.sqlite"))
    assert server.stats()["answered"] == 1  # the probe alone
    assert rows(tmp_path / "l.sqlite", "SELECT DISTINCT status FROM batch") == [("taken",)]


@pytest.mark.parametrize(
    ("code", "cost", "status"),
    [("content_filter", None, "refusal"), ("context_length_exceeded", 0, "overflow")],
)
def test_what_a_filter_held_may_be_charged_and_is_not_batched_again(
    server: FakeServer, tmp_path: Path, code: str, cost: int | None, status: str
) -> None:
    """Azure charges for prompts that its filter refuses with 400; too long ones cost nothing."""
    settings = settings_of(server, tmp_path / "l.sqlite")
    asker = batched(pairs(0), settings)
    body = {"error": {"message": "no", "code": code}}
    reply = intake.answered({"status_code": 400, "body": body}, asker.endpoint)
    end = ending(reply, identity="j", price=asker.price, reserve=7)
    assert end["cost"] == cost
    assert reply.kind in intake.PERMANENT
    assert unasked(reply, attempt=1).status == status


def test_a_finished_run_asks_nothing_again(server: FakeServer, tmp_path: Path) -> None:
    settings = settings_of(server, tmp_path / "l.sqlite")
    first = judged(pairs(5), settings)
    before = server.stats()
    assert told(judged(pairs(5), settings)) == told(first)
    after = server.stats()
    assert (after["batched"], after["received"]) == (before["batched"], before["received"])
    assert left(tmp_path / "l.sqlite") == []
    assert rows(tmp_path / "l.sqlite", "SELECT reserved, uncertain FROM judge") == [(0, 0)]


def test_a_shard_is_named_by_its_bytes_and_holds_each_request_once(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MOST_REQUESTS", 7)
    batched([*pairs(10), *pairs(3)], settings_of(server, tmp_path / "l.sqlite"))
    made = on_server(server)
    assert [b["request_counts"]["total"] for b in made] == [6, 7, 7]
    labels = {b["metadata"]["align_shard"] for b in made}
    assert labels == {row[0] for row in rows(tmp_path / "l.sqlite", "SELECT shard FROM batch")}
    assert statuses(tmp_path / "l.sqlite") == {"answered": 20}
    assert server.stats()["batched"] == 20


def test_shards_are_as_small_as_asked(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MOST_BYTES", 8_000)
    batched(pairs(10), settings_of(server, tmp_path / "l.sqlite"))
    files = server.ask("GET", "/v1/files?limit=100")["data"]
    sizes = [file["bytes"] for file in files if file["purpose"] == "batch"]
    assert len(sizes) > 2 and max(sizes) <= 8_000


def test_what_an_expired_batch_did_is_kept_and_the_rest_asked_live(
    server: FakeServer, tmp_path: Path
) -> None:
    server.plan(batch_expire=0.3)
    verdicts = judged(pairs(10), settings_of(server, tmp_path / "l.sqlite"))
    assert {v.status for v in verdicts} == {"ok"}
    assert len(on_server(server)) == 1 and server.stats()["batched"] == 14
    assert statuses(tmp_path / "l.sqlite") == {"answered": 14 + 6 + 1, "expired": 6}
    assert server.stats()["answered"] == 6 + 1
    assert rows(tmp_path / "l.sqlite", "SELECT sum(cost) FROM attempt WHERE status='expired'") == [
        (0,)
    ]
    twice = "SELECT key FROM attempt WHERE status='answered' GROUP BY 1 HAVING count(*) > 1"
    assert rows(tmp_path / "l.sqlite", twice) == []


def test_many_expired_requests_go_into_further_rounds(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "FEW", 2)
    server.plan(batch_expire=0.5)
    batched(pairs(10), settings_of(server, tmp_path / "l.sqlite"))
    assert [b["request_counts"]["total"] for b in on_server(server)] == [5, 10, 20]
    assert server.stats()["batched"] == 10 + 5 + 3
    assert statuses(tmp_path / "l.sqlite") == {"answered": 18, "expired": 10 + 5 + 2}


def test_the_same_requests_again_are_another_shard(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "FEW", 2)
    server.plan(batch_expire=1.0)
    batched(pairs(4), settings_of(server, tmp_path / "l.sqlite"))
    assert len({b["metadata"]["align_shard"] for b in on_server(server)}) == 3
    assert statuses(tmp_path / "l.sqlite") == {"expired": 24}


def test_errors_cost_nothing_and_overflow_is_final(server: FakeServer, tmp_path: Path) -> None:
    server.plan(batch_error=0.25)
    batched(pairs(4), settings_of(server, tmp_path / "a.sqlite"))
    assert statuses(tmp_path / "a.sqlite") == {"answered": 6, "rejected": 2}
    server.plan(batch_error=0.0, context_chars=10)
    batched(pairs(4), settings_of(server, tmp_path / "b.sqlite"))
    assert statuses(tmp_path / "b.sqlite") == {"overflow": 8}
    assert rows(tmp_path / "b.sqlite", "SELECT DISTINCT status FROM judgment") == [("overflow",)]
    assert rows(tmp_path / "b.sqlite", "SELECT reserved, spent, uncertain FROM judge") == [
        (0, 0, 0)
    ]


def test_unreadable_answers_are_charged_and_asked_again_live(
    server: FakeServer, tmp_path: Path
) -> None:
    server.plan(answer="malformed")
    settings = settings_of(server, tmp_path / "l.sqlite")
    batched(pairs(3), settings)
    assert rows(tmp_path / "l.sqlite", "SELECT count(*) FROM judgment") == [(0,)]
    ((cheapest, paid),) = rows(tmp_path / "l.sqlite", "SELECT min(cost), sum(cost) FROM attempt")
    assert cheapest > 0
    assert rows(tmp_path / "l.sqlite", "SELECT spent, reserved FROM judge") == [(paid, 0)]
    server.plan(answer="longest")
    assert {v.status for v in judged(pairs(3), settings)} == {"ok"}
    assert server.stats()["batched"] == 6


def killed(server: FakeServer, ledger: Path, where: str, *, n: int = 3) -> None:
    """A process that dies just before `where` (module.function) is called the first time."""
    module, _, name = where.partition(".")
    script = f"""
        import os
        from pathlib import Path
        from align.judge import batch_api, intake, shards, tending
        from tests.judge.test_batch import batched, pairs, settings_of
        def die(*args, **more):
            os._exit(9)
        owner = {module}
        for part in {name!r}.split(".")[:-1]:
            owner = getattr(owner, part)
        setattr(owner, {name!r}.split(".")[-1], die)
        class Server:
            url = {server.url!r}
        batched(pairs({n}), settings_of(Server, Path({str(ledger)!r})))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 9, done.stderr


@pytest.mark.parametrize(
    "where",
    [
        "shards.move", "batch_api.BatchApi.upload", "batch_api.BatchApi.create",
        "batch_api.BatchApi.retrieve", "batch_api.BatchApi.download", "intake.put", "intake.close",
        "intake.forget",
    ],
)  # fmt: skip
def test_a_run_killed_anywhere_creates_no_batch_twice(
    server: FakeServer, tmp_path: Path, where: str
) -> None:
    ledger = tmp_path / "l.sqlite"
    killed(server, ledger, where)
    batched(pairs(3), settings_of(server, ledger))
    assert len(on_server(server)) == 1 and server.stats()["batched"] == 6
    assert statuses(ledger) == {"answered": 6}
    assert left(ledger) == []
    spent = rows(ledger, "SELECT sum(cost) FROM attempt")[0][0]
    assert rows(ledger, "SELECT attempts, spent, reserved FROM judge") == [(6, spent, 0)]


def test_a_batch_whose_id_was_never_saved_is_adopted(server: FakeServer, tmp_path: Path) -> None:
    ledger = tmp_path / "l.sqlite"
    killed(server, ledger, "batch_api.BatchApi.retrieve")
    with closing(sqlite3.connect(ledger)) as db, db:
        db.execute("UPDATE batch SET id = NULL, status = 'creating'")
    other = tmp_path / "other.sqlite"
    for start in (10, 20):
        batched(pairs(2, start=start), settings_of(server, other))
    batched(pairs(3), settings_of(server, ledger))
    assert len(on_server(server)) == 3
    assert statuses(ledger) == {"answered": 6}


def test_a_lost_answer_to_create_makes_no_second_batch(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, lost = batch_api.checked, []

    def forgetful(found: Any) -> Any:
        if not lost:
            lost.append(found.id)
            raise ValueError("the line broke")
        return honest(found)

    monkeypatch.setattr(batch_api, "checked", forgetful)
    batched(pairs(3), settings_of(server, tmp_path / "l.sqlite"))
    assert lost and len(on_server(server)) == 1
    assert statuses(tmp_path / "l.sqlite") == {"answered": 6}


def test_results_taken_in_half_way_are_not_charged_twice(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "AT_ONCE", 2)
    honest, done = intake.put, []

    def put(*args: Any, **more: Any) -> None:
        if len(done) == 2:
            raise sqlite3.OperationalError("the disk is full")
        done.append(honest(*args, **more))

    settings = settings_of(server, tmp_path / "l.sqlite")
    monkeypatch.setattr(intake, "put", put)
    with pytest.raises(JudgeError, match="the disk is full"):
        batched(pairs(3), settings)
    monkeypatch.setattr(intake, "put", honest)
    assert statuses(tmp_path / "l.sqlite") == {"answered": 4, "open": 2}
    batched(pairs(3), settings)
    assert statuses(tmp_path / "l.sqlite") == {"answered": 6} and server.stats()["batched"] == 6
    assert rows(tmp_path / "l.sqlite", "SELECT spent FROM judge") == rows(
        tmp_path / "l.sqlite", "SELECT sum(cost) FROM attempt"
    )


def test_strange_lines_are_told_and_left_out(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    honest = batch_api.BatchApi.download

    async def download(self: Any, file: str, path: Path) -> None:
        await honest(self, file, path)
        lines = path.read_bytes().splitlines(keepends=True)
        strange = [b"<html>\n", b'{"custom_id": "zz"}\n', b"[]\n", b"\xff\n", b"[" * 9999 + b"\n"]
        unknown = lines[0].replace(b'"custom_id":"', b'"custom_id":"00')
        path.write_bytes(b"".join([*strange, unknown, lines[0], *lines[:-1]]))

    monkeypatch.setattr(batch_api.BatchApi, "download", download)
    batched(pairs(3), settings_of(server, tmp_path / "l.sqlite"))
    assert statuses(tmp_path / "l.sqlite") == {"answered": 5, "possibly billed": 1}
    errors = capsys.readouterr().err
    assert "5 lines that are no results" in errors and "1 lines of requests" in errors


def test_a_key_in_a_result_is_struck_out(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = batch_api.BatchApi.download

    async def download(self: Any, file: str, path: Path) -> None:
        await honest(self, file, path)
        path.write_bytes(path.read_bytes().replace(b"chatcmpl", b"k-secret-k"))

    monkeypatch.setattr(batch_api.BatchApi, "download", download)
    batched(pairs(2), settings_of(server, tmp_path / "l.sqlite"))
    raw = [row[0] for row in rows(tmp_path / "l.sqlite", "SELECT raw FROM attempt")]
    assert all(b"[key]" in line and b"k-secret-k" not in line for line in raw)


def test_a_cap_lets_in_what_fits_and_then_stops(server: FakeServer, tmp_path: Path) -> None:
    settings = settings_of(server, tmp_path / "l.sqlite", max_requests=7)
    with pytest.raises(JudgeError, match=r"judge\.max_requests=0"):
        batched(pairs(2, start=100), settings_of(server, tmp_path / "l.sqlite", max_requests=0))
    batched(pairs(10), settings)
    assert server.stats()["batched"] == 7
    with pytest.raises(JudgeError, match=r"judge\.max_requests=7"):
        batched(pairs(10), settings)
    assert server.stats()["batched"] == 7 and left(tmp_path / "l.sqlite") == []


def test_a_budget_is_never_passed_and_used_in_rounds(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "FEW", 3)
    free = tmp_path / "free.sqlite"
    batched(pairs(20), settings_of(server, free))
    ((worst, spent),) = rows(free, "SELECT sum(reserved), sum(cost) FROM attempt")
    server.reset()
    budget = (worst * 0.6) / 1e9
    assert spent < worst * 0.6
    batched(pairs(20), settings_of(server, tmp_path / "l.sqlite", budget_usd=budget))
    assert statuses(tmp_path / "l.sqlite") == {"answered": 40}
    made = [b["request_counts"]["total"] for b in on_server(server)]
    assert len(made) >= 2 and 20 <= made[-1] <= 28


def test_smaller_shards_are_tried_where_there_is_no_room(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "SMALLEST", 2)
    honest = batch_api.BatchApi.retrieve

    async def retrieve(self: Any, id: str) -> Any:
        found = await honest(self, id)
        total = found.request_counts.total
        server.plan(batch_status="failed" if total > 5 else None)
        return found

    monkeypatch.setattr(batch_api.BatchApi, "retrieve", retrieve)
    server.plan(batch_status="failed")
    batched(pairs(8), settings_of(server, tmp_path / "l.sqlite"))
    assert statuses(tmp_path / "l.sqlite") == {"answered": 16}
    assert server.stats()["batched"] == 16


def test_no_room_at_all_is_one_error_and_leaves_nothing_behind(
    server: FakeServer, tmp_path: Path
) -> None:
    server.plan(batch_status="failed")
    ledger = tmp_path / "l.sqlite"
    with pytest.raises(JudgeError, match="no room for 6 requests"):
        batched(pairs(3), settings_of(server, ledger))
    assert (statuses(ledger), left(ledger)) == ({}, [])
    assert rows(ledger, "SELECT attempts, reserved FROM judge") == [(0, 0)]
    server.plan(batch_status=None)
    assert {v.status for v in judged(pairs(3), settings_of(server, ledger, batch=False))} == {"ok"}


def test_a_shard_waits_until_another_one_has_ended(
    server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "MOST_REQUESTS", 6)
    honest, refused = batch_api.BatchApi.create, []

    async def create(self: Any, shard: str, **more: Any) -> Any:
        if any(b["status"] != "completed" for b in on_server(server)):
            refused.append(shard)
            raise batch_api.Full("Enqueued token limit reached")
        return await honest(self, shard, **more)

    monkeypatch.setattr(batch_api.BatchApi, "create", create)
    batched(pairs(9), settings_of(server, tmp_path / "l.sqlite"))
    assert refused and len(on_server(server)) == 3 and server.stats()["batched"] == 18
    assert statuses(tmp_path / "l.sqlite") == {"answered": 18}


def test_an_endpoint_without_a_batch_api_is_told_before_anything_is_written(
    server: FakeServer, tmp_path: Path
) -> None:
    settings = settings_of(server, tmp_path / "l.sqlite", base_url=f"{server.url}/none")
    with pytest.raises(JudgeError, match=r"has no Batch API; type judge\.batch=false"):
        batched(pairs(3), settings)
    assert statuses(tmp_path / "l.sqlite") == {}


def test_a_refused_key_is_one_error_and_leaves_nothing_behind(
    server: FakeServer, tmp_path: Path
) -> None:
    server.plan(require_key="another")
    with pytest.raises(JudgeError, match="refuses the key"):
        batched(pairs(3), settings_of(server, tmp_path / "l.sqlite"))
    assert statuses(tmp_path / "l.sqlite") == {}


def test_live_runs_say_that_a_batch_holds_the_question(server: FakeServer, tmp_path: Path) -> None:
    ledger = tmp_path / "l.sqlite"
    killed(server, ledger, "batch_api.BatchApi.retrieve")
    with pytest.raises(JudgeError, match=r"type judge\.batch=true"):
        judged(pairs(3), settings_of(server, ledger, batch=False))
    with pytest.raises(JudgeError, match=f"type judge.base_url={server.url}"):
        batched(pairs(3), settings_of(server, ledger, base_url=f"{server.url}/x"))
    judged(pairs(3), settings_of(server, ledger))
    assert server.stats()["batched"] == 6


def test_a_batch_that_is_gone_is_given_up_when_its_file_is_deleted(
    server: FakeServer, tmp_path: Path
) -> None:
    ledger = tmp_path / "l.sqlite"
    killed(server, ledger, "batch_api.BatchApi.retrieve")
    server.reset()
    with pytest.raises(JudgeError, match="does not know batch"):
        batched(pairs(3), settings_of(server, ledger))
    for name in left(ledger):
        (shards.folder(ledger) / name).unlink()
    batched(pairs(3), settings_of(server, ledger))
    assert statuses(ledger) == {"possibly billed": 6}
    assert {v.status for v in judged(pairs(3), settings_of(server, ledger))} == {"ok"}


def test_two_processes_submit_a_shard_once(server: FakeServer, tmp_path: Path) -> None:
    server.plan(batch_polls=20)
    ledger = tmp_path / "l.sqlite"
    script = f"""
        import sys
        from pathlib import Path
        from tests.judge.test_batch import judged, pairs, settings_of
        class Server:
            url = {server.url!r}
        found = judged(pairs(4), settings_of(Server, Path({str(ledger)!r}), batch_poll_s=0.05))
        assert {{v.status for v in found}} == {{"ok"}}, found
    """
    both = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script)], cwd=Path(__file__).parents[2]
        )
        for _ in range(2)
    ]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len(on_server(server)) == 1 and server.stats()["batched"] == 8


def test_ctrl_c_leaves_the_batch_to_go_on(server: FakeServer, tmp_path: Path) -> None:
    server.plan(batch_polls=10_000)
    ledger = tmp_path / "l.sqlite"
    script = f"""
        from pathlib import Path
        from align import interrupt
        from tests.judge.test_batch import judged, pairs, settings_of
        interrupt.watch()
        class Server:
            url = {server.url!r}
        try:
            judged(pairs(3), settings_of(Server, Path({str(ledger)!r}), batch_poll_s=60))
        except Exception as error:
            assert interrupt.interrupted(), error
            interrupt.leave("interrupted")
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not on_server(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    os.kill(process.pid, 2)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "1 batches go on at the provider; the same command takes them in" in errors
    server.plan(batch_polls=0)
    judged(pairs(3), settings_of(server, ledger))
    assert len(on_server(server)) == 1


def test_rankings_and_marks_go_through_batches_too(server: FakeServer, tmp_path: Path) -> None:
    for kind in ("listwise", "scalar"):
        cheap = judged(pairs(3), settings_of(server, tmp_path / f"{kind}.a", kind=kind))
        live = settings_of(server, tmp_path / f"{kind}.b", kind=kind, batch=False)
        assert told(cheap) == told(judged(pairs(3), live))
    assert len(on_server(server)) == 2


def test_replies_of_all_kinds_are_sorted(server: FakeServer) -> None:
    at = Endpoint(server.url, api_key_env=None, timeout_s=1, connections=1)

    def kind(status: Any, body: Any) -> str:
        return intake.answered({"status_code": status, "body": body}, at).kind

    message = {"choices": [{"message": {"content": "A"}}]}
    wrong = {"error": {"message": "no", "code": "x"}}
    assert kind(200, message) == endpoint.ANSWERED
    assert kind(200, None) == kind(200, {"choices": None}) == endpoint.GARBLED
    assert kind(400, wrong) == kind(400, "text") == endpoint.REJECTED
    assert kind(429, wrong) == endpoint.LIMITED
    assert kind(500, None) == endpoint.DOWN
    assert kind(None, wrong) == kind(7, wrong) == kind("200", wrong) == intake.FAILED
    assert kind(400, {"error": {"message": "", "code": "context_length_exceeded"}}) == (
        endpoint.OVERFLOWED
    )
    asyncio.run(at.close())
