"""Asks through the provider's Batch API: half the price, within a day, restarted at any moment.

Requests go into shards (`drafting.py`, `shards.py`), shards to the provider (`tending.py`,
`batch_api.py`), results into the ledger (`intake.py`). What no batch could answer is left to be
asked live.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterable, Iterator

from align.errors import JudgeError
from align.interrupt import deferred
from align.judge import shards
from align.judge.asker import Asker
from align.judge.batch_api import BatchApi, Full
from align.judge.drafting import Drafting, Scan
from align.judge.openai import Interrupted
from align.judge.tending import Tending
from align.notice import notice
from align.records import Comparison

ROUNDS = 3
FEW, FEW_SHARE = 100, 0.01  # so few are not worth another day
SMALLEST = 10  # requests; a provider that has no room for so many has none
SLICE_S = 0.2


async def answer_in_batches(comparisons: Iterable[Comparison], *, asker: Asker) -> None:
    """Has the provider answer, in batches, what the ledger does not know.

    Args:
        comparisons: iterated once a round.

    Raises:
        JudgeError: there is no Batch API, the key is refused, or nothing fits under a cap.
        KeyboardInterrupt: after a word about what goes on at the provider.
    """
    run = Run(comparisons, asker=asker)
    with interruptible(run):
        rounds = 0
        while rounds < ROUNDS:
            found = await run.scan()
            if not found.waiting:
                if found.capped:
                    raise asker.halt(asker.capped(found.capped))
                return
            try:
                await run.tend(found)
            except Full as error:
                run.halve(str(error))
                continue
            if not run.worth_more(found):
                return
            rounds += not found.capped  # a cap has room again: less was spent than feared


class Run:
    """One command's work with the Batch API."""

    def __init__(self, comparisons: Iterable[Comparison], *, asker: Asker) -> None:
        self.comparisons, self.asker = comparisons, asker
        self.api = BatchApi(asker, self.pause)
        self.since = time.time()
        self.most = shards.MOST_REQUESTS
        self.tending: Tending | None = None
        self.stopped = False

    async def scan(self) -> Scan:
        return await Drafting(
            self.comparisons, asker=self.asker, api=self.api, since=self.since, most=self.most,
            pulse=self.check,
        ).scan()  # fmt: skip

    async def tend(self, found: Scan) -> None:
        self.tending = Tending(found.waiting, fresh=found.fresh, asker=self.asker, api=self.api)
        await self.tending.tend()

    def worth_more(self, found: Scan) -> bool:
        """Whether what is left is enough for another round of batches."""
        assert self.tending is not None
        if found.capped:
            return found.written > FEW or len(found.waiting) > len(found.fresh)
        return self.tending.again > max(FEW, FEW_SHARE * found.seen)

    def halve(self, why: str) -> None:
        """Makes the shards smaller that the provider had no room for.

        Raises:
            JudgeError: they are small enough already.
        """
        assert self.tending is not None
        largest, url = self.tending.largest, self.asker.endpoint.url
        if largest <= SMALLEST:
            raise JudgeError(
                f"judge.batch=true: {url} has no room for {largest} requests ({why}); type the "
                "same command when the account's other batches have ended, or judge.batch=false"
            )
        self.most = max(SMALLEST, largest // 2)
        notice(f"{url} has no room for a batch of {largest:,} requests; trying {self.most:,}")

    def check(self) -> None:
        """
        Raises:
            Interrupted: somebody pressed Ctrl-C.
        """
        if self.stopped:
            raise self.asker.halt(Interrupted("interrupted"))

    async def pause(self, seconds: float) -> None:
        """Sleeps, unless the run is to stop."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.check()
            await asyncio.sleep(min(left, SLICE_S))
        self.check()

    def stop(self) -> None:
        self.stopped = True
        going = self.tending.running if self.tending is not None else 0
        notice(
            f"\n{going} batches go on at the provider; the same command takes them in (Ctrl-C "
            "again leaves at once)"
        )


@contextlib.contextmanager
def interruptible(run: Run) -> Iterator[None]:
    """Ctrl-C ends the waiting; the provider's batches go on."""
    with deferred(run.stop):
        yield
