"""What an iteration's phases took."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock(defaultdict[str, float]):
    """Seconds by phase."""

    def __init__(self) -> None:
        super().__init__(float)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds what happens within, to the end of what the GPU was given."""
        started = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self[phase] += time.perf_counter() - started
