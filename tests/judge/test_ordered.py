"""Results come in order, whatever the workers do; what is under way is finished before an error."""

import asyncio
import contextlib
import random
from collections.abc import AsyncGenerator, Iterator

import pytest

from align.judge.ordered import in_order


async def taken(generator: AsyncGenerator[int, None]) -> tuple[list[int], BaseException | None]:
    """What was given, and what was raised in the end."""
    found: list[int] = []
    try:
        async for result in generator:
            found.append(result)
    except (Exception, asyncio.CancelledError) as error:
        return found, error
    return found, None


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, timeout=20))


@pytest.mark.parametrize(("workers", "window"), [(1, 1), (8, 1), (1, 8), (8, 3), (50, 1000)])
def test_the_order_is_kept_under_random_delays(workers, window):
    rng = random.Random(0)

    async def work(item: int) -> int:
        for _ in range(rng.randrange(6)):
            await asyncio.sleep(0)
        return item * 10

    found, error = run(taken(in_order(range(300), work, workers=workers, window=window)))
    assert found == [10 * i for i in range(300)] and error is None


def test_nothing_gives_nothing():
    async def work(item: int) -> int:
        raise AssertionError

    assert run(taken(in_order([], work, workers=3, window=3))) == ([], None)


def test_never_more_at_once_than_workers_and_all_of_them_are_used():
    active = most = 0

    async def work(item: int) -> int:
        nonlocal active, most
        active += 1
        most = max(most, active)
        await asyncio.sleep(0)
        active -= 1
        return item

    run(taken(in_order(range(100), work, workers=7, window=1000)))
    assert most == 7


def test_the_window_bounds_how_far_ahead_the_items_are_taken():
    drawn = 0

    def items() -> Iterator[int]:
        nonlocal drawn
        while drawn < 100:
            drawn += 1
            yield drawn

    async def main() -> None:
        gate = asyncio.Event()

        async def work(item: int) -> int:
            if item == 1:
                await gate.wait()
            return item

        found = in_order(items(), work, workers=4, window=10)
        first = asyncio.ensure_future(anext(found))
        for _ in range(200):
            await asyncio.sleep(0)
        assert drawn == 10 and not first.done(), "ten, the oldest of which is unfinished"
        gate.set()
        assert await first == 1
        for _ in range(200):
            await asyncio.sleep(0)
        assert drawn == 11, "one was given, so one more was taken"
        assert [item async for item in found] == list(range(2, 101))

    run(main())


def test_after_an_error_nothing_begins_what_is_under_way_ends_and_the_prefix_is_given():
    begun, ended = [], []

    async def main() -> tuple[list[int], BaseException | None]:
        failed = asyncio.Event()

        async def work(item: int) -> int:
            begun.append(item)
            if item == 2:
                await asyncio.sleep(0.01)
                failed.set()
                raise KeyError("two")
            await failed.wait()
            await asyncio.sleep(0.01)
            ended.append(item)
            return item

        return await taken(in_order(range(100), work, workers=4, window=100))

    found, error = run(main())
    assert begun == [0, 1, 2, 3] and sorted(ended) == [0, 1, 3]
    assert found == [0, 1] and isinstance(error, KeyError)


def test_the_first_of_several_errors_is_raised():
    async def work(item: int) -> int:
        await asyncio.sleep(0.02 if item == 0 else 0.001)
        raise ValueError(item)

    found, error = run(taken(in_order(range(2), work, workers=2, window=2)))
    assert found == [] and str(error) == "1"


def test_an_iterator_that_raises_is_an_error_too():
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("disk")

    async def work(item: int) -> int:
        await asyncio.sleep(0.01)
        return item

    for workers in (1, 2, 10):
        found, error = run(taken(in_order(items(), work, workers=workers, window=10)))
        assert found == [0, 1, 2] and isinstance(error, OSError)


def test_a_part_of_the_work_that_is_cancelled_is_no_silent_gap():
    async def work(item: int) -> int:
        if item == 3:
            raise asyncio.CancelledError
        return item

    found, error = run(taken(in_order(range(10), work, workers=2, window=4)))
    assert found == [0, 1, 2] and isinstance(error, asyncio.CancelledError)


def test_an_error_ends_those_who_wait_for_room():
    async def work(item: int) -> int:
        await asyncio.sleep(0.01)
        raise ValueError

    found, error = run(taken(in_order(range(10), work, workers=8, window=1)))
    assert found == [] and isinstance(error, ValueError)


def test_leaving_early_cancels_the_workers():
    cancelled = []

    async def main() -> None:
        async def work(item: int) -> int:
            if item == 0:
                return item
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(item)
                raise
            return item

        async with contextlib.aclosing(in_order(range(9), work, workers=4, window=9)) as found:
            async for item in found:
                assert item == 0
                await asyncio.sleep(0.01)
                break
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert sorted(cancelled) == [1, 2, 3, 4]


def test_with_a_stop_leaving_early_begins_nothing_new_and_finishes_what_is_under_way():
    begun, finished, stopped = [], [], []

    async def work(item: int) -> int:
        begun.append(item)
        await asyncio.sleep(0 if item == 0 else 0.05)
        finished.append(item)
        return item

    async def main() -> None:
        found = in_order(
            range(99), work, workers=4, window=9, stop=lambda: stopped.append(len(finished))
        )
        async with contextlib.aclosing(found):
            async for item in found:
                assert item == 0
                break
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert sorted(finished) == sorted(begun) and len(begun) <= 5
    assert stopped and stopped[0] < len(finished)


def test_cancelling_the_reader_cancels_the_workers():
    async def main() -> None:
        async def work(item: int) -> int:
            await asyncio.Event().wait()
            return item

        reader = asyncio.create_task(taken(in_order(range(9), work, workers=4, window=9)))
        await asyncio.sleep(0.01)
        reader.cancel()
        found, error = await reader
        assert found == [] and isinstance(error, asyncio.CancelledError)
        assert asyncio.all_tasks() <= {asyncio.current_task(), reader}

    asyncio.run(main())
