"""Bounded workers without barriers, whose results come in the order of what was asked."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


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
    iterator = iter(items)
    results: dict[int, R] = {}
    taken = given = 0
    working = workers
    failure: BaseException | None = None
    ready, room = asyncio.Event(), asyncio.Event()

    async def worker() -> None:
        nonlocal taken, failure
        while failure is None:
            if taken - given >= window:
                room.clear()
                await room.wait()
                continue
            try:
                item = next(iterator)
            except StopIteration:
                return
            index, taken = taken, taken + 1
            results[index] = await work(item)
            ready.set()

    async def guarded() -> None:
        nonlocal working, failure
        try:
            await worker()
        except BaseException as error:  # a cancelled part of the work is a result that is missing
            failure = failure or error
        finally:
            working -= 1
            ready.set()
            room.set()  # those who wait for it see that there is a failure

    tasks = [asyncio.create_task(guarded()) for _ in range(workers)]
    try:
        while True:
            while given in results:
                result = results.pop(given)
                given += 1
                room.set()
                yield result
            if not working and given not in results:
                break
            ready.clear()
            await ready.wait()
        if failure is not None:
            raise failure
    except (GeneratorExit, asyncio.CancelledError) as leaving:
        failure = failure or leaving
        if stop is not None:
            stop()
            room.set()
            await asyncio.gather(*tasks, return_exceptions=True)
        raise
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
