"""Ctrl-C ends a command with status 130 and the line that goes on, whatever a library makes of it.

The interrupt comes as KeyboardInterrupt wherever the program stands. An import that it hits is
reported as a module that does not exist, and CPython kills a process at its exit for an interrupt
within exec(), handled or not. So it is remembered that there was one.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

STATUS = 130
_seen: list[int] = []
_stops: list[Callable[[], None]] = []
_before: list[Callable[[int, FrameType | None], Any]] = []


def watch() -> None:
    """The first interrupt raises KeyboardInterrupt, so that files are closed; a second one ends the
    process at once. Where interrupts are ignored (nohup), they stay so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _seen:
        os._exit(STATUS)
    _seen.append(number)
    raise KeyboardInterrupt


@contextmanager
def deferred(first: Callable[[], None]) -> Iterator[None]:
    """Within it the first interrupt calls `first` and raises nothing, for work that must come to an
    end of its own; a second one ends the process at once. Several may overlap, and end in any
    order. Where interrupts are ignored, they stay so.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    if not _stops:
        _before[:] = [before]
        signal.signal(signal.SIGINT, _stop_all)
    _stops.append(first)
    try:
        yield
    finally:
        _stops.remove(first)
        if not _stops:
            signal.signal(signal.SIGINT, _before.pop())


def _stop_all(number: int, frame: FrameType | None) -> None:
    if _seen:
        os._exit(STATUS)
    _seen.append(number)
    for stop in list(_stops):
        stop()


def interrupted(error: BaseException | None = None) -> bool:
    """Whether there was one, or `error` is one."""
    return bool(_seen) or isinstance(error, KeyboardInterrupt)


def leave(line: str) -> NoReturn:
    """Says `line` and ends the process; nothing runs after it that could change the status."""
    print(f"\n{line}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STATUS)
