"""Writes shards: of all questions those that nobody has answered or is asking."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice

from align.judge import shards
from align.judge.asker import Asker
from align.judge.batch_api import BatchApi
from align.judge.entries import ANSWERED
from align.judge.intake import PERMANENT
from align.judge.owners import BATCH
from align.judge.request import Request, request
from align.judge.shards import Draft
from align.judge.verdicts import fitting, groups, questions
from align.records import Comparison

AT_ONCE = 256  # requests looked up together


@dataclass
class Scan:
    """What one look at all questions found.

    Attributes:
        waiting: the owners of the attempts that are open in batches, new ones included.
        fresh: those of them that were written now, with `written` requests.
        capped: the cap that let nothing more in.
    """

    seen: int = 0
    written: int = 0
    capped: str = ""
    waiting: dict[str, None] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)


@dataclass
class Room:
    """What the caps leave, reckoned while a draft is not yet in the ledger."""

    nano_usd: int | None
    attempts: int | None

    @classmethod
    def of(cls, asker: Asker) -> "Room":
        told = asker.ledger.spending(asker.settings.judge)
        usd, attempts = asker.caps.nano_usd, asker.caps.attempts
        return cls(
            nano_usd=None if usd is None else usd - told.spent - told.reserved - told.uncertain,
            attempts=None if attempts is None else attempts - told.attempts,
        )

    def take(self, reserve: int) -> str:
        """Takes a request's share, or names the cap that it would pass."""
        if self.attempts is not None and self.attempts < 1:
            return "requests"
        if self.nano_usd is not None and self.nano_usd < reserve:
            return "budget"
        self.attempts = None if self.attempts is None else self.attempts - 1
        self.nano_usd = None if self.nano_usd is None else self.nano_usd - reserve
        return ""


class Drafting:
    """Example: `found = await Drafting(comparisons, asker=asker, api=api, …).scan()`.

    Args:
        since: when the command began; what was refused later is not batched again.
        most: requests of one shard.
        pulse: raises where the run is to stop.
    """

    def __init__(
        self, comparisons: Iterable[Comparison], *, asker: Asker, api: BatchApi, since: float,
        most: int, pulse: Callable[[], None],
    ) -> None:  # fmt: skip
        self.comparisons, self.asker, self.api = comparisons, asker, api
        self.since, self.most, self.pulse = since, most, pulse
        self.ledger = asker.ledger
        self.place = shards.folder(asker.ledger.path)
        self.numbers = count()
        self.found = Scan()
        self.room = Room.of(asker)
        self.draft: Draft | None = None

    async def scan(self) -> Scan:
        """Goes through all questions: those without an answer go into shards, as far as the caps
        let them.
        """
        self.place.mkdir(exist_ok=True)
        await self.ledger.run(partial(shards.sweep, place=self.place, owner=self.ledger.owner))
        asked = self.requests()
        try:
            while not self.found.capped and (some := list(islice(asked, AT_ONCE))):
                self.pulse()
                known = await asyncio.gather(*map(self.asker.known, some))
                for wanted, answer in zip(some, known, strict=True):
                    self.found.seen += 1
                    if answer is None and self.free(wanted.key):
                        await self.add(wanted)
            await self.admit()
        finally:
            if self.draft is not None:
                self.draft.discard()
        return self.found

    def requests(self) -> Iterator[Request]:
        settings, able = self.asker.settings, self.asker.able
        for group in groups(self.comparisons, settings=settings):
            kept = fitting(group, settings=settings)
            if not kept.comparisons:
                continue
            for question in questions(kept, settings=settings, samples=settings.samples):
                yield request(question, settings=settings, able=able, limit=settings.max_chars)

    def free(self, key: bytes) -> bool:
        """Whether a batch may ask it; a batch that does so already is noted."""
        for owner, finished, status in shards.history(self.ledger, key):
            if finished is None:
                if owner.startswith(BATCH):
                    self.found.waiting.setdefault(owner)
                return False
            lately = finished >= self.since
            if status == ANSWERED or (status in PERMANENT and lately):
                return False
        return self.draft is None or key not in self.draft.entries

    async def add(self, wanted: Request) -> None:
        """Puts a request into the draft, if the caps let it."""
        reserve = wanted.worst(self.asker.price, self.asker.settings.max_tokens)
        self.found.capped = self.found.capped or self.room.take(reserve)
        if self.found.capped:
            return
        if self.draft is not None and not self.draft.add(wanted, reserve=reserve):
            await self.admit()
        if self.draft is None:
            if not self.found.fresh:
                await self.api.check()  # before anything is written down
            name = f"{self.ledger.owner.name}.{next(self.numbers)}.part"
            self.draft = Draft(self.place / name, most=self.most)
            self.draft.add(wanted, reserve=reserve)

    async def admit(self) -> None:
        """Makes the draft a shard, less what another process was faster with and what no longer
        fits.
        """
        draft = self.draft
        while draft is not None and draft.entries:
            shard = draft.close(lambda name: shards.exists(self.ledger, name))
            told = await self.ledger.run(
                partial(
                    shards.admit, draft=draft, shard=shard, identity=self.asker.settings.judge,
                    endpoint=self.asker.endpoint.url, caps=self.asker.caps, owner=self.ledger.owner,
                )
            )  # fmt: skip
            self.found.capped = self.found.capped or told.cap
            if told.whole:
                self.draft = None
                self.found.waiting.setdefault(shards.owner_of(shard))
                self.found.fresh.append(shards.owner_of(shard))
                self.found.written += len(draft.entries)
                return
            draft = self.draft = draft.only(told.going)
        if draft is not None:
            draft.discard()
        self.draft = None
