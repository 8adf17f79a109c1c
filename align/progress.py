"""One progress bar for all long work: rate and eta on a terminal, a line now and then in a log
file.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOG_EVERY_S = 15.0


@contextmanager
def progress_bar(
    title: str, total: int, *, unit: str, done: int = 0
) -> Iterator[Callable[[int, int], None]]:
    """Yields `advance(steps, units)`: steps move the bar towards `total`, units are what the rate
    counts.

    Example: `with progress_bar("generate", 300, unit="tokens") as advance: advance(1, 57)`
    """
    console = Console(file=sys.stderr)
    started, units, steps, last = time.monotonic(), 0, done, time.monotonic()

    def rate() -> str:
        return f"{units / max(time.monotonic() - started, 1e-9):,.0f} {unit}/s"

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, completed=done, rate="")

        def advance(new_steps: int, new_units: int = 0) -> None:
            nonlocal units, steps, last
            steps, units = steps + new_steps, units + new_units
            bar.update(task, advance=new_steps, rate=rate())
            if not console.is_terminal and (
                steps >= total or time.monotonic() - last > LOG_EVERY_S
            ):
                last = time.monotonic()
                left = (last - started) / max(steps - done, 1) * (total - steps)
                console.print(
                    f"{title}: {steps}/{total}, {rate()}, {left:.0f} s left", highlight=False
                )

        yield advance
