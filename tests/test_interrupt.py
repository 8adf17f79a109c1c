"""Work that must come to an end of its own is told of an interrupt, however it is nested."""

import signal
from contextlib import ExitStack

import pytest

from align import interrupt
from align.interrupt import deferred


def test_overlapping_work_is_told_and_the_handler_comes_back_whoever_ends_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interrupt, "_seen", [])
    before, told = signal.getsignal(signal.SIGINT), []
    one, other = ExitStack(), ExitStack()
    one.enter_context(deferred(lambda: told.append("one")))
    other.enter_context(deferred(lambda: told.append("other")))
    signal.raise_signal(signal.SIGINT)
    assert told == ["one", "other"]
    one.close()
    assert signal.getsignal(signal.SIGINT) is not before
    other.close()
    assert signal.getsignal(signal.SIGINT) is before
