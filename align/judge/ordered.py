"""Bounded workers without barriers, whose results come in the order of what was asked."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Pool(Generic[T, R]):
    """The workers, what they have come to, and how far the reader is behind them."""

    def __init__(
        self, items: Iterable[T], work: Callable[[T], Awaitable[R]], *, workers: int, window: int
    ) -> None:
        self.items, self.work, self.window = iter(items), work, window
        self.working, self.taken, self.given = workers, 0, 0
        self.results: dict[int, R] = {}
        self.failure: BaseException | None = None
        self.ready, self.room = asyncio.Event(), asyncio.Event()

    async def worker(self) -> None:
        """Takes items until there are none, or a worker failed."""
        try:
            while self.failure is None:
                if self.taken - self.given >= self.window:
                    self.room.clear()
                    await self.room.wait()
                    continue
                try:
                    item = next(self.items)
                except StopIteration:
                    return
                index, self.taken = self.taken, self.taken + 1
                self.results[index] = await self.work(item)
                self.ready.set()
        except BaseException as error:  # a cancelled part of the work is a result that is missing
            self.failure = self.failure or error
        finally:
            self.working -= 1
            self.ready.set()
            self.room.set()  # those who wait for it see that there is a failure

    async def read(self) -> AsyncGenerator[R, None]:
        """The results in order, up to the first that is missing when all workers have ended."""
        while True:
            while self.given in self.results:
                result = self.results.pop(self.given)
                self.given += 1
                self.room.set()
                yield result
            if not self.working and self.given not in self.results:
                return
            self.ready.clear()
            await self.ready.wait()


async def in_order(
    items: Iterable[T],
    work: Callable[[T], Awaitable[R]],
    *,
    workers: int,
    window: int,
    stop: Callable[[], None] | None = None,
) -> AsyncGenerator[R, None]:
    """The result of `work` for each item, in order; items are taken one at a time, as workers
    become free.

    After an error (of `work`, or of the items themselves) nothing new is begun; what is under way
    is finished, the results before the first gap are given, and then the error is raised.

    Args:
        window: how many items the workers may be ahead of the oldest that is unfinished, which
            bounds what is in memory.
        stop: called when the reader leaves early or is cancelled. What is under way is then
            finished (it may be paid for); without `stop` it is cancelled.
    """
    assert workers >= 1 and window >= 1
    pool = Pool(items, work, workers=workers, window=window)
    tasks = [asyncio.create_task(pool.worker()) for _ in range(workers)]
    try:
        async with contextlib.aclosing(pool.read()) as results:
            async for result in results:
                yield result
        if pool.failure is not None:
            raise pool.failure
    except (GeneratorExit, asyncio.CancelledError) as leaving:
        pool.failure = pool.failure or leaving
        if stop is not None:
            stop()
            pool.room.set()
            await asyncio.gather(*tasks, return_exceptions=True)
        raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
