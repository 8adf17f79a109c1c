"""Asks an endpoint through the ledger: known answers are free, all others are asked for once.

The one retry layer. A request waits for its pace, is written down, sent, and what comes back is
written down before anything else happens.
"""

import asyncio
import random
import time
from dataclasses import dataclass, field, replace

from align.errors import JudgeError
from align.judge import answers, endpoint
from align.judge.answers import MALFORMED, PARSER, Reading
from align.judge.endpoint import Endpoint, Reply
from align.judge.entries import Caps, Judgment
from align.judge.ledger import Ledger
from align.judge.outcome import ending, judgment_of
from align.judge.prices import Price, nano
from align.judge.request import Capability, Request, request, sound
from align.judge.schedule import Breaker, Pace, full_jitter
from align.judge.settings import Openai
from align.judge.verdicts import Answer, Question
from align.notice import notice

BUSY_S = 0.2  # between two looks at what another process is asking
POLLS = 25  # looks, before it is seen whether that process still lives
HOPELESS = 20  # requests refused for what they hold, without one that was not: the set-up is wrong
PATIENCE_S = 5.0  # a longer wait is told
MOST_DOUBLINGS = 4  # of a refused request's own wait, since the pace slows down all of them
FINAL = (endpoint.ANSWERED, endpoint.OVERFLOWED, endpoint.FILTERED, endpoint.REJECTED)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One attempt that was sent, and what its reply says."""

    reply: Reply
    judgment: Judgment | None


@dataclass
class Asker:
    """One judge at one endpoint, for as long as a command runs."""

    settings: Openai
    ledger: Ledger
    endpoint: Endpoint
    price: Price
    able: Capability
    pace: Pace = field(default_factory=Pace)
    breaker: Breaker = field(default_factory=Breaker)
    rng: random.Random = field(default_factory=random.Random)
    stop: JudgeError | None = None
    sent: int = 0
    under_way: int = 0
    rejected: int = 0
    good: int = 0
    told: float = 0.0
    refusing_since: float | None = None
    explained: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.slots = asyncio.Semaphore(self.settings.concurrency)
        self.caps = Caps(
            nano_usd=nano(self.settings.budget_usd), attempts=self.settings.max_requests
        )

    async def ask(self, question: Question, *, limit: int) -> Answer:
        """The answer to a question: from the ledger, else from the endpoint.

        Raises:
            JudgeError: a cap is reached, the key is refused, or the endpoint is down for good.
        """
        self.check()
        wanted = request(question, settings=self.settings, able=self.able, limit=limit)
        known = await self.known(wanted)
        return known if known is not None else await self.obtain(wanted)

    async def known(self, wanted: Request) -> Answer | None:
        """What the ledger says; read anew where the parser has become better since."""
        judgment = self.ledger.judgment(wanted.key) or await self.read_stored(wanted)
        if judgment is None:
            return None
        if judgment.parser != PARSER:
            judgment = await self.read_again(wanted, judgment)
        reading = sound(judgment, wanted.form)
        if reading is None:
            raise JudgeError(
                f"judge.ledger={self.ledger.path}: holds a judgment that no answer of this form "
                "can have led to, so somebody else wrote into it; name another file with "
                "judge.ledger=FILE"
            )
        return Answer(reading=reading, tokens=judgment.tokens, cost=judgment.cost)

    async def read_stored(self, wanted: Request) -> Judgment | None:
        """The judgment of an answer that a batch brought and that nobody has read yet."""
        for stored in self.ledger.from_batches(wanted.key):
            body = answers.completion(stored.raw)
            reading = None if body is None else answers.read(body, wanted.form)
            if reading is None or reading.status == MALFORMED:
                continue
            judgment = Judgment(
                status=reading.status, answer=reading.to_json(), parser=PARSER,
                tokens=stored.tokens, cost=stored.cost or 0, attempt=stored.attempt,
            )  # fmt: skip
            await self.ledger.judge(wanted.key, judgment)
            return judgment
        return None

    async def read_again(self, wanted: Request, judgment: Judgment) -> Judgment:
        body = answers.completion(self.ledger.raw(judgment.attempt))
        if body is None:  # an overflow, for instance: there is nothing to read
            return judgment
        reading = answers.read(body, wanted.form)
        anew = replace(judgment, status=reading.status, answer=reading.to_json(), parser=PARSER)
        await self.ledger.judge(wanted.key, anew)
        return anew

    async def obtain(self, wanted: Request) -> Answer:
        """Asks until there is an answer, or a status that tells why there is none."""
        while True:
            tried = await self.persist(wanted)
            if tried is None:
                known = await self.from_another(wanted)
                if known is not None:
                    return known
                continue
            if tried.reply.kind == endpoint.REJECTED:
                self.hopeless(tried.reply)
            judgment = tried.judgment
            if judgment is None:
                return self.without(Answer(reading=Reading(status="failed", why=tried.reply.why)))
            if judgment.status == MALFORMED:
                if self.ledger.answered(wanted.key) < self.settings.max_malformed:
                    continue
                await self.ledger.judge(wanted.key, judgment)
            reading = Reading.from_json(judgment.answer)
            return self.without(Answer(reading=reading, tokens=judgment.tokens, cost=judgment.cost))

    async def from_another(self, wanted: Request) -> Answer | None:
        """What another process is told that asks the same; None when it has died, or takes long
        enough to see whether it has.
        """
        for _ in range(POLLS):
            known = await self.known(wanted)
            if known is not None or not self.ledger.is_open(wanted.key):
                return known
            await self.wait(BUSY_S)
        return None

    def without(self, answer: Answer) -> Answer:
        """Tells why there is no verdict, the first time that a status comes up."""
        status, why = answer.status, answer.reading.why
        if status != answers.OK and status not in self.explained:
            self.explained.add(status)
            line = f"judge {self.settings.judge}: the first question without a verdict"
            notice(f"{line} ({status}): {' '.join(why.split())}")
        return answer

    async def persist(self, wanted: Request) -> "Attempt | None":
        """Attempts until the endpoint has no failure of its own to blame, or has had its chances;
        None where another process has the request.
        """
        failures = refusals = 0
        while True:
            tried = await self.once(wanted)
            if tried is None or tried.reply.kind in FINAL:
                return tried
            if tried.reply.kind != endpoint.LIMITED:
                failures += 1
                if failures >= self.settings.max_attempts:
                    return tried
                await self.wait(full_jitter(failures, self.rng))
            else:
                refusals += 1  # for how long they may go on is a matter of the whole run
                await self.wait(full_jitter(min(refusals, MOST_DOUBLINGS), self.rng))

    async def once(self, wanted: Request) -> "Attempt | None":
        """One attempt, from the wait for its turn to its entry in the ledger; None where another
        process asks the request, or has its answer.
        """
        async with self.slots:
            await self.turn(wanted)
            reserve = wanted.worst(self.price, self.settings.max_tokens)
            while True:
                self.check()
                begun = await self.ledger.begin(
                    wanted.key, identity=self.settings.judge, mode=wanted.mode,
                    endpoint=self.endpoint.url, reserve=reserve, caps=self.caps,
                )  # fmt: skip
                if begun.outcome == "go":
                    break
                if begun.outcome in ("busy", "known"):
                    return None
                if begun.outcome == "batched":
                    raise self.halt(self.batched())
                if begun.outcome == "requests" or not begun.under_way:
                    raise self.halt(self.capped(begun.outcome))
                await asyncio.sleep(0.05)  # what is under way may turn out cheaper than feared
            self.sent += 1
            self.under_way += 1
            try:
                reply = await self.endpoint.chat(wanted.body)
            finally:
                self.under_way -= 1
            self.learn(reply)
            judgment = None
            try:
                judgment = judgment_of(reply, wanted.form, price=self.price, attempt=begun.attempt)
            finally:  # stored even if it could not be read
                await self.write(wanted, reply, judgment, attempt=begun.attempt, reserve=reserve)
            if reply.kind == endpoint.STOP:
                raise self.halt(JudgeError(reply.why))
            return Attempt(reply=reply, judgment=judgment)

    async def turn(self, wanted: Request) -> None:
        """Waits until the breaker and the pace let the request go."""
        self.check()
        while (wait := self.breaker.wait(time.monotonic())) > 0:
            await asyncio.sleep(min(wait, 1.0))
            self.check()
        wait = self.pace.wait(wanted.characters // 4 + self.settings.max_tokens, time.monotonic())
        if wait > PATIENCE_S:
            self.tell(
                f"{self.endpoint.url} asks for slower requests; the next goes in {wait:.0f} s"
            )
        await self.wait(wait)
        while (pause := self.pace.paused_until - time.monotonic()) > 0:  # asked for meanwhile
            await self.wait(pause)

    async def wait(self, seconds: float) -> None:
        """Sleeps, unless the run is being stopped."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 1.0))
            self.check()

    def check(self) -> None:
        """
        Raises:
            JudgeError: the run is being stopped.
        """
        if self.stop is not None:
            raise self.stop

    def halt(self, error: JudgeError) -> JudgeError:
        """Stops the run; what is under way is still finished and kept."""
        self.stop = self.stop or error
        return self.stop

    def tell(self, line: str) -> None:
        """Says a line about the endpoint, one in ten seconds."""
        if time.monotonic() - self.told > 10:
            self.told = time.monotonic()
            notice(line)

    def capped(self, outcome: str) -> JudgeError:
        key = "budget_usd" if outcome == "budget" else "max_requests"
        value = getattr(self.settings, key)
        what = (
            f"the next request could pass the {value:g} dollars that judge {self.settings.judge} "
            "may "
            "cost over the life of the ledger"
            if outcome == "budget"
            else f"judge {self.settings.judge} has had its {value} requests"
        )
        return JudgeError(
            f"judge.{key}={value}: {what}; nothing is lost, raise judge.{key} and type the same "
            f"command (python -m align.judge status ledger={self.settings.ledger} tells what was "
            "spent)"
        )

    def batched(self) -> JudgeError:
        return JudgeError(
            f"judge.batch=false: some of the questions to {self.settings.judge} are in a batch, "
            "at the provider or on its way there; type judge.batch=true to take their answers in"
        )

    def learn(self, reply: Reply) -> None:
        """Lets pace and breaker learn from a reply."""
        now = time.monotonic()
        if reply.headers:
            self.pace.headers(reply.headers, now)
        if reply.kind == endpoint.ANSWERED:
            self.good += 1
            self.breaker.good()
            self.pace.good(now)
            self.refusing_since = None
        elif reply.kind == endpoint.LIMITED:
            self.breaker.good()  # it refuses, so it is up
            self.pace.refused(reply.wait, now)
            self.refusing_since = self.refusing_since or now
            self.give_up(now - self.refusing_since, reply)
            if reply.wait is not None and reply.wait > self.settings.give_up_after_s:
                self.halt(self.too_long(reply.wait))
        elif reply.kind in FINAL:
            self.breaker.good()
        elif reply.kind != endpoint.STOP:
            if self.breaker.bad(now):
                self.tell(f"{self.endpoint.url} fails ({reply.why}); waiting before the next try")
            self.give_up(self.breaker.down_for(now), reply)

    def too_long(self, wait: float) -> JudgeError:
        return JudgeError(
            f"judge.base_url={self.endpoint.url}: asks to be left alone for {wait:,.0f} s (a daily "
            "quota?), longer than judge.give_up_after_s; nothing is lost, type the same command "
            "then"
        )

    def give_up(self, seconds: float, reply: Reply) -> None:
        """Stops the run when no request has succeeded for too long."""
        if seconds > self.settings.give_up_after_s:
            self.halt(
                JudgeError(
                    f"judge.base_url={self.endpoint.url}: no answer for {seconds:.0f} s "
                    f"({reply.why}); nothing is lost, type the same command when it works again"
                )
            )

    async def write(
        self,
        wanted: Request,
        reply: Reply,
        judgment: Judgment | None,
        *,
        attempt: int,
        reserve: int,
    ) -> None:
        """The attempt's end."""
        final = judgment is not None and judgment.status != MALFORMED and not wanted.probe
        await self.ledger.finish(
            attempt,
            **ending(reply, identity=self.settings.judge, price=self.price, reserve=reserve),
            key=wanted.key,
            judgment=judgment if final else None,
        )

    def hopeless(self, reply: Reply) -> None:
        """Counts requests that were refused for what they hold.

        Raises:
            JudgeError: there were many, and none that was not: the set-up is wrong.
        """
        self.rejected += 1
        fresh = not self.good and not self.ledger.has_verdicts(self.settings.judge)
        if self.rejected >= HOPELESS and fresh:
            raise self.halt(
                JudgeError(
                    f"judge.base_url={self.endpoint.url}: refused the first {self.rejected} "
                    f"requests ({reply.why}); check judge.model and judge.answer"
                )
            )
