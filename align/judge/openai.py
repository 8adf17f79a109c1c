"""A judge behind any OpenAI-compatible endpoint: every question through the ledger, verdicts in the
order asked.
"""

import asyncio
import contextlib
import functools
import operator
import resource
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.errors import Interrupted, JudgeError, keyed
from align.interrupt import deferred
from align.judge.ask import key_of, verdicts_of
from align.judge.asker import Asker
from align.judge.endpoint import Endpoint
from align.judge.entries import Job
from align.judge.ledger import Ledger
from align.judge.ordered import in_order
from align.judge.prices import price_of, usd
from align.judge.probe import capability
from align.judge.request import Capability
from align.judge.settings import Openai
from align.judge.verdicts import (
    Answer,
    Group,
    fitting,
    groups,
    questions,
    verdicts,
    with_dropped,
)
from align.named import named_module
from align.notice import notice
from align.records import OK, TIE, Comparison, Verdict

AHEAD = 20_000  # comparisons that may be settled while an older one is still being asked
FILES = 100  # beside the connections: the ledger, batches, what the libraries keep open
HALVINGS = 4  # of the longest text, before what does not fit is given up
SIGN_OF_LIFE_S = 1.0


async def compare(comparisons: Iterable[Comparison], *, settings: Openai) -> AsyncIterator[Verdict]:
    """One verdict a comparison, in order.

    Raises:
        JudgeError: no key, a cap reached, an endpoint that is down or refuses; what was answered is
            kept.
    """
    async with opened(settings) as bench:
        if settings.batch:
            from align.judge.batch import answer_in_batches

            bench.asker.price = price_of(settings)
            await answer_in_batches(comparisons, asker=bench.asker)
            bench.asker.price = price_of(settings, live=True)
        total = operator.length_hint(comparisons, 0)
        tally = Tally(bench=bench, total=total)
        with draining(bench):
            found = in_order(
                groups(comparisons, settings=settings),
                bench.settle,
                workers=2 * settings.concurrency,
                window=AHEAD,
                stop=functools.partial(bench.halt, Interrupted("nothing more is wanted")),
            )
            try:
                async with contextlib.aclosing(found):
                    async for settled in found:
                        for verdict in settled:
                            await tally.count(verdict)
                            yield verdict
            finally:
                await tally.write()


@contextlib.asynccontextmanager
async def opened(settings: Openai) -> AsyncIterator["Bench"]:
    """The judge with its ledger and its endpoint, for as long as it is needed."""
    key = key_of(settings)
    with keyed(key):
        price = price_of(settings, live=True)
        open_files(settings.concurrency)
        endpoint = Endpoint(
            settings.base_url,
            api_key_env=settings.api_key_env,
            timeout_s=settings.timeout_s,
            connections=settings.concurrency,
        )
    if (warning := endpoint.warning()) is not None:
        notice(warning)
    try:
        with keyed(key):
            held = Ledger.open(Path(settings.ledger))
        with held as ledger:
            asker = Asker(settings, ledger, endpoint, price, Capability.assumed(settings))
            try:
                with keyed(key):
                    asker.able = await capability(asker)
                async with contextlib.AsyncExitStack() as stack:
                    other = None
                    if settings.escalate is not None:
                        other = await stack.enter_async_context(another(settings.escalate))
                    yield Bench(asker=asker, escalation=other)
            finally:
                tell_spending(asker)
    finally:
        await endpoint.close()


def open_files(connections: int) -> None:
    """Has the system let this process open so many connections, and the files that it needs beside.

    Raises:
        JudgeError: it does not.
    """
    needed = connections + FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft in (resource.RLIM_INFINITY, -1) or soft >= needed:
        return
    if hard not in (resource.RLIM_INFINITY, -1) and hard < needed:
        raise JudgeError(
            f"judge.concurrency={connections}: this process may open {hard} files, and needs "
            f"{needed}; type judge.concurrency={max(1, hard - FILES)}, or have the limit raised "
            f"(ulimit -Hn {needed})"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextlib.asynccontextmanager
async def another(settings: Any) -> AsyncIterator["Bench | Plain"]:
    """A second judge, opened once where it can be."""
    module = named_module("align.judge", settings.name, settings.module)
    if hasattr(module, "opened"):
        async with module.opened(settings) as bench:
            yield bench
    else:
        yield Plain(settings=settings)


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Any judge, asked one comparison at a time."""

    settings: Any

    async def settle(self, group: Group) -> list[Verdict]:
        return [v async for v in verdicts_of(group.comparisons, settings=self.settings)]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where comparisons are settled: all their questions asked, their answers made a verdict."""

    asker: Asker
    escalation: "Bench | Plain | None"

    def halt(self, error: JudgeError) -> None:
        """Begins nothing new, here and at the judge that it escalates to."""
        self.asker.halt(error)
        if self.escalation is not None and hasattr(self.escalation, "halt"):
            self.escalation.halt(error)

    async def settle(self, group: Group) -> list[Verdict]:
        settings = self.asker.settings
        kept = fitting(group, settings=settings)
        found: list[Verdict] = []
        if kept.comparisons:
            with keyed(key_of(settings)):
                answers = await self.answers(kept)
            found = verdicts(kept, answers, settings=settings, judge=settings.judge)
        if self.escalation is not None:
            found = [
                await self.escalated(comparison, verdict)
                for comparison, verdict in zip(kept.comparisons, found, strict=True)
            ]
        return with_dropped(group, kept, found, judge=settings.judge)

    async def answers(self, group: Group) -> Sequence[Answer]:
        """The answers to the group's questions; where the endpoint finds them too long, to shorter
        ones, all cut alike.
        """
        settings = self.asker.settings
        asked = questions(group, settings=settings, samples=settings.samples)
        limit = settings.max_chars
        for _ in range(HALVINGS):
            # Each is waited for, even when another one failed: what is under way is paid for.
            found = await asyncio.gather(
                *(self.asker.ask(question, limit=limit) for question in asked),
                return_exceptions=True,
            )
            answered: list[Answer] = []
            for answer in found:
                if isinstance(answer, BaseException):
                    raise answer
                answered.append(answer)
            too_long = any(answer.status == "overflow" for answer in answered)
            if not too_long or settings.on_overflow == "drop":
                break
            shown = max(len(t) for q in asked for t in (*q.material.responses, "")) // 2
            limit = min(limit // 2, max(shown, 1))
        return answered

    async def escalated(self, comparison: Comparison, verdict: Verdict) -> Verdict:
        """The other judge's verdict where this one's orders disagree; both are paid for. That they
        do, and what this one saw, stays with it.
        """
        if verdict.status not in (OK, TIE) or verdict.consistent:
            return verdict
        assert self.escalation is not None
        (other,) = await self.escalation.settle(Group(comparisons=(comparison,)))
        return replace(
            other,
            looks=verdict.looks,
            consistent=False,
            cost=verdict.cost + other.cost,
            tokens=verdict.tokens + other.tokens,
        )


@dataclass
class Tally:
    """How far a job is, told to the ledger about once a second."""

    bench: Bench
    total: int
    done: int = 0
    failed: int = 0
    told: float = 0.0

    async def count(self, verdict: Verdict) -> None:
        self.done += 1
        self.failed += verdict.status not in (OK, TIE)
        if time.monotonic() - self.told > SIGN_OF_LIFE_S:
            await self.write()

    async def write(self) -> None:
        self.told = time.monotonic()
        ledger, settings = self.bench.asker.ledger, self.bench.asker.settings
        await ledger.progress(
            Job(
                id=ledger.owner.name,
                title=f"{settings.kind}, {Path(settings.prompt).stem}",
                identity=settings.judge,
                total=max(self.total, self.done),
                done=self.done,
                failed=self.failed,
            )
        )


@contextlib.contextmanager
def draining(bench: Bench) -> Iterator[None]:
    """Ctrl-C stops asking and waits for what is under way, which is paid for; a second one leaves
    at once. The first is remembered by `align.interrupt`.
    """
    loop = asyncio.get_running_loop()

    def stop() -> None:
        notice(f"\nwaiting for {bench.asker.under_way} answers under way; Ctrl-C again leaves them")
        bench.halt(Interrupted("interrupted"))

    def first() -> None:
        loop.call_soon_threadsafe(stop)

    with deferred(first):
        yield


def tell_spending(asker: Asker) -> None:
    """One line about what this run sent, if anything, and what the judge has cost so far."""
    if not asker.sent:
        return
    told = asker.ledger.spending(asker.settings.judge)
    unsure = f", possibly {usd(told.uncertain):.4f} more" if told.uncertain else ""
    notice(
        f"{asker.settings.judge}: {asker.sent:,} requests sent now; ${usd(told.spent):.4f} spent"
        f"{unsure} over the life of {asker.ledger.path.name}"
    )
