"""Asks through the provider's Batch API: half the price, within a day, restarted at any moment.

Requests go into shards (`drafting.py`, `shards.py`), shards to the provider (`tending.py`,
`batch_api.py`), results into the ledger (`intake.py`). What no batch could answer is left to be
asked live.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence

from align.errors import Interrupted, JudgeError
from align.interrupt import deferred
from align.judge import shards
from align.judge.asker import Asker
from align.judge.batch_api import BatchApi, Full
from align.judge.drafting import Drafting, Scan
from align.judge.tending import Tending
from align.notice import notice
from align.records import Comparison

ROUNDS = 3
FEW, FEW_SHARE = 100, 0.01  # so few are not worth another day
SMALLEST = 10  # requests; a provider that has no room for so many has none
HELD = 32  # shards under way at once
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
        await rounds(run)
        run.check()


async def rounds(run: "Run") -> None:
    """Round after round, as long as another one is worth its day."""
    left = ROUNDS
    while left:
        found = await run.scan()
        if not found.waiting:
            if found.capped:
                raise run.asker.halt(run.asker.capped(found.capped))
            return
        try:
            await run.tend(found)
        except Full as error:
            run.halve(str(error))
            continue
        if not run.worth_more(found):
            return
        # Where a cap held something back, the answers that came have made room for it.
        left -= not (found.capped and run.answered)


class Run:
    """One command's work with the Batch API."""

    def __init__(self, comparisons: Iterable[Comparison], *, asker: Asker) -> None:
        self.comparisons, self.asker = comparisons, asker
        self.api = BatchApi(asker, self.pause)
        self.since = time.time()
        self.most = shards.MOST_REQUESTS
        self.tending: Tending | None = None
        self.again = 0.0
        self.answered = 0
        self.stopped = False

    async def scan(self) -> Scan:
        return await Drafting(
            self.comparisons, asker=self.asker, api=self.api, since=self.since, most=self.most,
            pulse=self.check,
        ).scan()  # fmt: skip

    async def tend(self, found: Scan) -> None:
        """Sees all shards through, `HELD` of them at a time, for each keeps a file open.

        Raises:
            Full: the provider has no room for shards so large; none is left that was not submitted.
        """
        waiting, self.again, self.answered = list(found.waiting), 0.0, 0
        while waiting:
            some, waiting = waiting[:HELD], waiting[HELD:]
            self.tending = self.tending_of(some, found)
            try:
                await self.tending.tend()
            except BaseException:
                for start in range(0, len(waiting), HELD):
                    await self.tending_of(waiting[start : start + HELD], found).withdraw()
                raise
            self.again += self.tending.again
            self.answered += self.tending.answered

    def tending_of(self, owners: Sequence[str], found: Scan) -> Tending:
        return Tending(owners, fresh=found.fresh, asker=self.asker, api=self.api)

    def worth_more(self, found: Scan) -> bool:
        """Whether what is left is enough for another round of batches."""
        if found.capped:
            return found.written > FEW or len(found.waiting) > len(found.fresh)
        return self.again > max(FEW, FEW_SHARE * found.seen)

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
