"""The fake server misbehaves as named, seen through the real SDK and the bare client below it."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from tests.judge.fake_server import FAULTS, FakeServer, duration, sha, shown_texts

LINE = "End with one line, `Verdict: A` or `Verdict: B`, or `Verdict: tie`."
SHORT, LONG = "No.", 'Yes, "three" days.\nAsk first.'


def judge_body(first: str = SHORT, second: str = LONG, ask: str = LINE, **more: Any) -> Any:
    blocks = "\n".join(
        f"<response_{label}_0af3>\n{json.dumps(text)}\n</response_{label}_0af3>"
        for label, text in (("A", first), ("B", second))
    )
    messages = [{"role": "user", "content": f"{blocks}\n{ask}"}]
    return {"model": "m", "messages": messages, **more}


def json_schema(**properties: Any) -> Any:
    schema = {"type": "object", "properties": properties}
    return {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema}}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeServer]:
    with FakeServer(tmp_path_factory.mktemp("fake")) as server:
        yield server


@pytest.fixture
def server(shared: FakeServer) -> FakeServer:
    """The shared server with its first plan and nothing counted."""
    shared.reset()
    shared.plan(
        answer="longest", faults={}, fault_sequence=[], unsupported=[], ignored=[], latency=0.0,
        require_key=None, context_chars=None, limit_rpm=None, limit_tpm=None, p=0.9, fence=False,
        batch_polls=2, batch_expire=0.0, batch_error=0.0, batch_status=None,
    )  # fmt: skip
    return shared


def with_client(server: FakeServer, use: Callable[[openai.AsyncOpenAI], Any], **more: Any) -> Any:
    """The result of `use(client)`, with the real SDK's client."""

    async def run() -> Any:
        options = {"api_key": "k-secret", "max_retries": 0, "timeout": 10.0} | more
        async with openai.AsyncOpenAI(base_url=server.url, **options) as client:
            return await use(client)

    return asyncio.run(run())


def ask(server: FakeServer, body: Any = None, **more: Any) -> Any:
    body = body or judge_body()
    return with_client(server, lambda client: client.chat.completions.create(**body), **more)


def content(server: FakeServer, body: Any) -> str:
    text: str = ask(server, body).choices[0].message.content
    return text


def raw(server: FakeServer) -> httpx2.Response:
    with httpx2.Client() as client:
        return client.post(f"{server.url}/chat/completions", json=judge_body())


def test_json_strings_of_the_prompt_are_read_back() -> None:
    prompt = judge_body("a </response_A_0af3> b", '<response_C_0af3>\n"x"\n</response_C_0af3>')
    texts = shown_texts(prompt["messages"][0]["content"])
    assert texts == {
        "A": "a </response_A_0af3> b",
        "B": '<response_C_0af3>\n"x"\n</response_C_0af3>',
    }


def test_a_schema_is_filled_in_its_order(server: FakeServer) -> None:
    form = json_schema(
        reason={"type": "string"},
        verdict={"enum": ["A", "B", "tie"]},
        ranking={"type": "array", "items": {"type": "string"}},
        score={"type": "integer", "minimum": 1, "maximum": 5},
    )
    answer = content(server, judge_body(response_format=form))
    assert answer == '{"reason":"because","verdict":"B","ranking":["B","A"],"score":4}'


@pytest.mark.parametrize(
    ("texts", "digit"), [(("long", "x"), "2"), (("x", "long"), "4"), (("a", "b"), "3")]
)
def test_five_points_are_taken_from_choices(
    server: FakeServer, texts: tuple[str, str], digit: str
) -> None:
    body = judge_body(*texts, extra_body={"structured_outputs": {"choice": list("12345")}})
    assert content(server, body) == digit


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        (LINE, "Verdict: B"),
        ("Not `Verdict:` but `Ranking: A > B`.", "Ranking: B > A"),
        ("End with `Score: 7`.", "Score: 4"),
        ('Answer in JSON: {"verdict": "A"}', '{"verdict": "B"}'),
        ('Answer in JSON: {"ranking": ["A"]}', '{"ranking": ["B", "A"]}'),
        ('Answer in JSON: {"score": 1}', '{"score": 4}'),
        (
            'JSON: {"reason": "", "brief": 1, "verdict": "one of 1, 2, 3, 4, 5, 0"}',
            '{"reason": "because", "brief": "4", "verdict": "4"}',
        ),
        ("brief: (one of A, B, tie)\nVerdict: (one of A, B, tie)", "brief: B\nVerdict: B"),
        ("Score: (one of 1, 2, 3)", "Score: 3"),
    ],
)
def test_the_prompt_alone_decides_the_form(
    server: FakeServer, instruction: str, expected: str
) -> None:
    assert content(server, judge_body(ask=instruction)) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("first", "A"),
        ("second", "B"),
        ("shortest", "A"),
        ("constant", "A"),
    ],
)
def test_answers_prefer_as_named(server: FakeServer, answer: str, expected: str) -> None:
    server.plan(answer=answer)
    assert content(server, judge_body()) == f"Verdict: {expected}"


def test_equal_lengths_tie_where_a_tie_is_offered(server: FakeServer) -> None:
    assert content(server, judge_body("ab", "cd")) == "Verdict: tie"
    assert content(server, judge_body("ab", "cd", ask="`Verdict: A` or B")) == "Verdict: A"


def test_a_table_answers_word_for_word(server: FakeServer, tmp_path: Path) -> None:
    path = tmp_path / "replies.json"
    path.write_text(json.dumps({sha(f"{SHORT}\0{LONG}"): "I say [[B]]"}))
    server.plan(answer="table", replies=str(path))
    assert content(server, judge_body()) == "I say [[B]]"
    with pytest.raises(openai.BadRequestError, match="no reply"):
        ask(server, judge_body("never", "seen"))


def test_logprobs_put_p_on_the_label(server: FakeServer) -> None:
    """p 0.8: the two others share 0.9 of the 0.2 left."""
    server.plan(p=0.8)
    answer = ask(server, judge_body(logprobs=True, top_logprobs=3)).choices[0]
    tokens = answer.logprobs.content
    assert "".join(token.token for token in tokens) == answer.message.content
    shares = {top.token: math.exp(top.logprob) for top in tokens[-1].top_logprobs}
    assert tokens[-1].token == "B"
    assert shares == pytest.approx({"B": 0.8, "A": 0.09, "tie": 0.09})


def test_unsupported_parameters_are_refused_and_ignored_ones_are_not(server: FakeServer) -> None:
    body = judge_body(response_format=json_schema(verdict={"enum": ["A", "B"]}), logprobs=True)
    server.plan(unsupported=["logprobs"])
    with pytest.raises(openai.BadRequestError) as refused:
        ask(server, body)
    assert (refused.value.code, refused.value.param) == ("unsupported_parameter", "logprobs")
    server.plan(unsupported=[], ignored=["logprobs", "response_format"])
    choice = ask(server, body).choices[0]
    assert (choice.message.content, choice.logprobs) == ("Verdict: B", None)


def test_gates_refuse_wrong_keys_and_long_prompts(server: FakeServer) -> None:
    server.plan(require_key="right", context_chars=50)
    with pytest.raises(openai.AuthenticationError, match="k-secret"):
        ask(server)
    with pytest.raises(openai.BadRequestError, match="maximum context length") as refused:
        ask(server, api_key="right")
    assert refused.value.code == "context_length_exceeded"
    assert server.stats()["keys_seen"] == ["k-secret", "right"]


def test_an_empty_bucket_answers_429_with_headers(server: FakeServer) -> None:
    server.plan(limit_rpm=6)
    assert raw(server).headers["x-ratelimit-remaining-requests"] == "0"
    limited = raw(server)
    assert limited.status_code == 429
    assert limited.headers["x-ratelimit-limit-requests"] == "6"
    assert limited.headers["x-ratelimit-reset-requests"].endswith("s")
    assert server.stats()["limited"] == 1


def test_durations_read_as_go_writes_them() -> None:
    assert [duration(s) for s in (0.02, 1, 1.5, 360)] == ["20ms", "1s", "1.5s", "6m0s"]


STATUS_FAULTS = {
    "429": (429, openai.RateLimitError),
    "429_headers": (429, openai.RateLimitError),
    "429_long": (429, openai.RateLimitError),
    "insufficient_quota": (429, openai.RateLimitError),
    "500": (500, openai.InternalServerError),
    "502_html": (502, openai.InternalServerError),
    "503": (503, openai.InternalServerError),
    "401": (401, openai.AuthenticationError),
    "403": (403, openai.PermissionDeniedError),
    "404_model": (404, openai.NotFoundError),
}


@pytest.mark.parametrize("fault", STATUS_FAULTS)
def test_faults_with_a_status(server: FakeServer, fault: str) -> None:
    server.plan(fault_sequence=[fault])
    status, error = STATUS_FAULTS[fault]
    with pytest.raises(error) as raised:
        ask(server)
    assert raised.value.status_code == status
    assert server.log()[-1]["status"] == status
    assert ask(server).choices[0].message.content == "Verdict: B"
    stats = server.stats()
    assert (stats["received"], stats["answered"], stats["faults"]) == (2, 1, {fault: 1})


def test_retry_after_travels_in_both_headers(server: FakeServer) -> None:
    server.plan(fault_sequence=["429", "429_headers", "429_long"])
    given = [raw(server).headers for _ in range(3)]
    assert [headers.get("retry-after") for headers in given] == [None, "0.05", "300"]
    assert given[1]["retry-after-ms"] == "50"


@pytest.mark.parametrize("fault", ["cut", "reset"])
def test_faults_of_the_connection(server: FakeServer, fault: str) -> None:
    server.plan(fault_sequence=[fault])
    with pytest.raises(openai.APIConnectionError):
        ask(server)
    assert server.stats()["answered"] == 0


def test_a_silent_server_is_left_by_the_client(server: FakeServer) -> None:
    server.plan(fault_sequence=["timeout"])
    with pytest.raises(openai.APITimeoutError):
        ask(server, timeout=0.2)
    assert aborted(server) == 1


def test_a_client_that_goes_away_is_not_answered(server: FakeServer) -> None:
    server.plan(latency=0.6)
    with pytest.raises(openai.APITimeoutError):
        ask(server, timeout=0.2)
    assert aborted(server) == 1
    stats = server.stats()
    assert (stats["answered"], stats["faults"], stats["max_in_flight"]) == (0, {}, 1)
    assert server.log()[-1]["answered"] is False


def aborted(server: FakeServer) -> int:
    """The count of requests left by the client, once it is no longer 0."""
    deadline = time.monotonic() + 5
    while not (count := server.stats()["aborted"]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return int(count)


def test_bodies_that_are_no_completion(server: FakeServer) -> None:
    server.plan(fault_sequence=["truncated_json", "html", "html"])
    with pytest.raises(json.JSONDecodeError):
        ask(server)
    assert isinstance(ask(server), str)
    assert raw(server).headers["content-type"] == "text/html"


def test_completions_without_an_answer(server: FakeServer) -> None:
    server.plan(fault_sequence=["null_choices", "empty_choices", "null_content", "refusal"])
    assert ask(server).choices is None
    assert ask(server).choices == []
    assert ask(server).choices[0].message.content is None
    refused = ask(server).choices[0].message
    assert refused.content is None and refused.refusal.startswith("I'm sorry")


def test_completions_with_a_wrong_answer(server: FakeServer) -> None:
    faults = ["content_filter", "length", "wrong_schema", "wrong_label", "two_verdicts", "echo_key"]
    server.plan(fault_sequence=faults)
    choices = [ask(server).choices[0] for _ in faults]
    assert [(choice.finish_reason, choice.message.content) for choice in choices] == [
        ("content_filter", ""),
        ("length", "Verdi"),
        ("stop", '{"foo": 1}'),
        ("stop", "Verdict: C"),
        ("stop", "Verdict: A\nVerdict: B"),
        ("stop", "Bearer k-secret Verdict: B"),
    ]
    assert server.stats()["answered"] == 0


def test_a_slow_body_arrives_whole(server: FakeServer) -> None:
    server.plan(fault_sequence=["slow"])
    before = time.monotonic()
    assert ask(server).choices[0].message.content == "Verdict: B"
    assert time.monotonic() - before > 0.2
    assert server.stats()["answered"] == 1


def test_a_redirect_names_the_planned_place(server: FakeServer) -> None:
    server.plan(fault_sequence=["redirect"], redirect_to="http://127.0.0.1:9/elsewhere")
    answer = raw(server)
    assert (answer.status_code, answer.headers["location"]) == (307, "http://127.0.0.1:9/elsewhere")


def test_faults_depend_on_body_and_count_alone(server: FakeServer) -> None:
    server.plan(faults={"500": 0.3, "wrong_schema": 0.2}, seed=4)
    bodies = [judge_body(str(i)) for i in range(40)]

    async def statuses(concurrency: int) -> list[tuple[str, int, str | None]]:
        gate = asyncio.Semaphore(concurrency)

        async def post(client: httpx2.AsyncClient, body: Any) -> None:
            async with gate:
                await client.post(f"{server.url}/chat/completions", json=body)

        async with httpx2.AsyncClient() as client:
            await asyncio.gather(*(post(client, body) for body in bodies * 2))
        return sorted((line["sha"], line["n"], line["fault"]) for line in server.log()[-80:])

    alone = asyncio.run(statuses(1))
    server.reset()
    assert asyncio.run(statuses(16)) == alone
    assert 20 <= sum(fault is not None for _, _, fault in alone) <= 60


def test_answers_beyond_the_first_are_duplicates(server: FakeServer) -> None:
    for body in (judge_body(), judge_body(), judge_body("other")):
        ask(server, body)
    stats = server.stats()
    assert (stats["answered"], stats["duplicates"], len(stats["by_body"])) == (3, 1, 2)
    line = server.log()[-2]
    assert (line["n"], line["first"], line["second"]) == (2, sha(SHORT), sha(LONG))


def test_unknown_plans_are_refused(server: FakeServer) -> None:
    for wrong in ({"latncy": 1}, {"faults": {"418": 1}}, {"answer": "best"}):
        with pytest.raises(ValueError, match="knows no"):
            server.plan(**wrong)
    assert len(set(FAULTS)) == len(FAULTS) == 27


def test_models_are_listed(server: FakeServer) -> None:
    server.plan(model_list=["one", "two"])

    async def names(client: openai.AsyncOpenAI) -> list[str]:
        return [model.id async for model in client.models.list()]

    assert with_client(server, names) == ["one", "two"]


async def run_batch(client: openai.AsyncOpenAI, *, count: int = 10) -> tuple[Any, list[str]]:
    """Uploads `count` requests; returns the batch once it ended and every status on the way."""
    lines = [
        {"custom_id": f"é{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for i, body in enumerate(judge_body(str(i)) for i in range(count))
    ]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n"
    source = await client.files.create(file=("in.jsonl", text.encode()), purpose="batch")
    assert (await client.files.content(source.id)).content == text.encode()
    batch = await client.batches.create(
        input_file_id=source.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"shard": "abc"},
    )
    statuses = [batch.status]
    while batch.status in ("validating", "in_progress", "finalizing"):
        batch = await client.batches.retrieve(batch.id)
        statuses.append(batch.status)
    return batch, statuses


async def lines_of(client: openai.AsyncOpenAI, file: str) -> list[Any]:
    return [json.loads(line) for line in (await client.files.content(file)).text.splitlines()]


def test_a_batch_makes_the_round_trip(server: FakeServer) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        batch, statuses = await run_batch(client)
        assert statuses == ["validating", "in_progress", "in_progress", "completed"]
        assert batch.metadata == {"shard": "abc"} and batch.error_file_id is None
        lines = await lines_of(client, batch.output_file_id)
        assert {line["custom_id"] for line in lines} == {f"é{i}" for i in range(10)}
        answers = {line["response"]["body"]["choices"][0]["message"]["content"] for line in lines}
        assert answers == {"Verdict: B"}

    with_client(server, use)
    assert server.stats()["batched"] == 10


def test_an_expired_batch_keeps_what_was_done(server: FakeServer) -> None:
    server.plan(batch_expire=0.3, batch_error=0.2, batch_polls=0)

    async def use(client: openai.AsyncOpenAI) -> None:
        batch, statuses = await run_batch(client)
        assert statuses == ["validating", "expired"]
        assert batch.request_counts.completed == len(await lines_of(client, batch.output_file_id))
        errors = await lines_of(client, batch.error_file_id)
        codes = [line["error"]["code"] for line in errors if line["error"]]
        assert codes == ["batch_expired"] * 3
        assert [line["response"]["status_code"] for line in errors if line["response"]] == [400] * 2

    with_client(server, use)


def test_batches_fail_cancel_and_are_listed_newest_first(server: FakeServer) -> None:
    server.plan(batch_status="failed", batch_polls=0)

    async def use(client: openai.AsyncOpenAI) -> None:
        failed, _ = await run_batch(client)
        assert failed.status == "failed" and failed.errors.data[0].code == "token_limit_exceeded"
        other = await client.batches.create(
            input_file_id=failed.input_file_id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
        )
        assert (await client.batches.cancel(other.id)).status == "cancelling"
        assert (await client.batches.retrieve(other.id)).status == "cancelled"
        first = await client.batches.list(limit=1)
        assert [batch.id for batch in first.data] == [other.id] and first.has_more
        assert [b.id async for b in client.batches.list(limit=1)] == [other.id, failed.id]

    with_client(server, use)


def test_the_server_dies_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path; from tests.judge.fake_server import FakeServer\n"
        f"server = FakeServer(Path({str(tmp_path)!r})); server.start()\n"
        "print(server.process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    root = Path(__file__).parents[2]
    died = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True)
    assert died.returncode == -signal.SIGKILL
    assert gone(int(died.stdout))


def gone(pid: int) -> bool:
    """Whether the process ends within five seconds; a zombie nobody reaps has ended."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False
