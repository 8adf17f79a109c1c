"""Finds out once how an endpoint's model can be asked, by asking it.

Compatible servers differ: some hold answers to a JSON schema, some to a list of choices, some to
nothing; some give log-probabilities; they call the longest answer by two names. The best way is
tried first, so that an endpoint that can do everything is asked once.
"""

import asyncio
import contextlib
import fcntl
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, replace
from pathlib import Path

from align.errors import JudgeError
from align.judge import endpoint
from align.judge.answers import OK, Reading
from align.judge.asker import BUSY_S, Asker, Attempt
from align.judge.forms import Form
from align.judge.request import LIMITS, Capability, able_of, request
from align.judge.settings import Openai
from align.judge.verdicts import Group, Question, questions
from align.notice import notice
from align.records import Comparison, Message, Prompt

SAID = {"json_schema": "JSON by a schema", "json": "JSON", "choice": "one of the labels",
        "line": "a line of text"}  # fmt: skip
EXAMPLE = Comparison(
    prompt=Prompt(id="probe", messages=(Message(role="user", content="What is two plus two?"),)),
    first="Two plus two is four.",
    second="Two plus two is five.",
)


async def capability(asker: Asker) -> Capability:
    """What the ledger knows of this judge, else what a few small requests show.

    What is kept is what the endpoint can do, whatever the settings want of it, so that a run that
    wants less (no temperature, no probabilities, plain lines) leaves nothing behind for others.

    Raises:
        JudgeError: the endpoint refuses even the plainest request, does not answer, or gives no
            probabilities where they must be.
    """
    settings = asker.settings
    async with one_prober(asker.ledger.path):
        known = asker.ledger.capability(settings.judge)
        if known is None:
            prober = everything(asker)
            try:
                known = asdict(await probe(prober))
            finally:
                asker.sent += prober.sent
            await asker.ledger.remember(settings.judge, known)
            able = Capability(**known)
            likely = "with" if able.logprobs else "without"
            sent = "one request" if prober.sent == 1 else f"{prober.sent} requests"
            notice(
                f"judge {settings.judge}: answers as {SAID[able.mode]}, {likely} probabilities "
                f"({sent} to find that out)"
            )
    able = Capability.believed(known, ledger=asker.ledger.path, identity=settings.judge)
    if str(settings.logprobs).lower() == "true" and not able.logprobs:
        raise JudgeError(
            f"judge.logprobs=true: {asker.endpoint.url} gives none at the token of the verdict; "
            "type judge.logprobs=auto"
        )
    return able_of(settings, able)


@contextlib.asynccontextmanager
async def one_prober(ledger: Path) -> AsyncIterator[None]:
    """Has other processes at the same ledger wait, so that a probe is paid for once. Not a blocking
    lock: two judges of one process may be probed at the same time.
    """
    with ledger.with_name(f"{ledger.name}-probing").open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(BUSY_S)
        yield


def everything(asker: Asker) -> Asker:
    """One that asks a plain question for all that an endpoint may give, whatever the settings want
    to know. What it is answered is not counted as an answer to the questions, which have yet to be
    taken.
    """
    settings = asker.settings
    plain = Path(settings.prompts) / "helpfulness.j2"
    wanted = replace(
        settings, answer="auto", logprobs="auto", samples=1, kind="pairwise", scale="three",
        criteria=[], reason=False, prompt=str(plain) if plain.is_file() else settings.prompt,
        temperature=0.0 if settings.temperature is None else settings.temperature,
    )  # fmt: skip
    return replace(asker, settings=wanted)


async def probe(asker: Asker) -> Capability:
    best = Capability.assumed(asker.settings)
    question = questions(Group(comparisons=(EXAMPLE,)), settings=asker.settings)[0]
    modes = question.form.modes()
    best = replace(best, mode=modes[0])
    if works(await tried(asker, question, best), best, question.form):
        return best
    plain = await plainest(asker, question)
    able = None
    for mode in modes:
        way = replace(plain, mode=mode)
        attempt = await tried(asker, question, way)
        if works(attempt, way, question.form):
            able = way
            break
    if able is None:
        able = plain
        said = attempt.judgment.answer.get("why", "") if attempt.judgment else attempt.reply.why
        notice(
            f"judge {asker.settings.judge}: its answer to an example could not be read ({said}); "
            "expect questions without a verdict"
        )
    if best.logprobs:
        more = replace(able, logprobs=True)
        if works(await tried(asker, question, more), more, question.form):
            able = more
    return able


async def plainest(asker: Asker, question: Question) -> Capability:
    """The names and the parameters that the endpoint takes at all."""
    refusal = ""
    for able in plain_ways(asker.settings):
        attempt = await tried(asker, question, able)
        if attempt.reply.kind != endpoint.REJECTED:
            return able
        refusal = attempt.reply.why
    raise JudgeError(
        f"judge.base_url={asker.endpoint.url}: refuses even the plainest question ({refusal}); if "
        "the "
        "model takes no system message, type judge.system_role=false"
    )


def plain_ways(settings: Openai) -> Iterator[Capability]:
    temperatures = (True, False) if settings.temperature is not None else (False,)
    for temperature, limit in itertools.product(temperatures, LIMITS):
        yield Capability(mode="line", logprobs=False, limit=limit, temperature=temperature)


async def tried(asker: Asker, question: Question, able: Capability) -> Attempt:
    """The example, asked in one way.

    Raises:
        JudgeError: no answer came, however often it was asked.
    """
    settings = asker.settings
    attempt = None
    wanted = request(question, settings=settings, able=able, limit=settings.max_chars)
    wanted = replace(wanted, key=b"probe " + wanted.key[:26], probe=True)
    while attempt is None:
        attempt = await asker.persist(wanted)
    if attempt.reply.kind in (endpoint.ANSWERED, endpoint.REJECTED):
        return attempt
    if attempt.reply.kind in (endpoint.OVERFLOWED, endpoint.FILTERED):
        raise JudgeError(
            f"judge.model={settings.model}: takes not even a short example ({attempt.reply.why}); "
            "type a smaller judge.max_tokens, or give the server a longer window"
        )
    raise JudgeError(
        f"judge.base_url={asker.endpoint.url}: does not answer ({attempt.reply.why}); check the "
        "address, and that the server runs"
    )


def works(attempt: Attempt, able: Capability, form: Form) -> bool:
    """The answer was readable, held to its mode, and came with probabilities where they were
    wanted.
    """
    if attempt.reply.kind != endpoint.ANSWERED or attempt.judgment is None:
        return False
    reading = Reading.from_json(attempt.judgment.answer)
    if reading.status != OK or (able.logprobs and not reading.probabilities):
        return False
    return held(attempt.reply.body["choices"][0]["message"]["content"], able.mode, form)


def held(content: str, mode: str, form: Form) -> bool:
    """Whether the endpoint kept the model to the mode, rather than took no notice of it."""
    if mode == "choice":
        return content.strip() in form.labels
    if mode != "json_schema":
        return True
    try:
        return isinstance(json.loads(content), dict)
    except ValueError:
        return False
