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
) -> Iterator[Callable[..., None]]:
    """Yields `advance(steps, units, note)`: steps move the bar towards `total`, units are what the
    rate counts, the note is shown beside it.

    Example: `with progress_bar("generate", 300, unit="tokens") as advance: advance(1, 57)`
    """
    console = Console(file=sys.stderr)
    started, units, steps, last = time.monotonic(), 0, done, time.monotonic()

    def rate() -> str:
        speed = units / max(time.monotonic() - started, 1e-9)
        return f"{speed:,.{0 if speed >= 10 else 1}f} {unit}/s"

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total, completed=done, rate="", note="")

        def advance(new_steps: int, new_units: int = 0, note: str = "") -> None:
            nonlocal units, steps, last
            steps, units = steps + new_steps, units + new_units
            bar.update(task, advance=new_steps, rate=rate(), note=note)
            if not console.is_terminal and (
                steps >= total or time.monotonic() - last > LOG_EVERY_S
            ):
                last = time.monotonic()
                left = (last - started) / max(steps - done, 1) * (total - steps)
                told = f"{title}: {steps}/{total}, {rate()}, {told_time(left)} left"
                console.print(f"{told}, {note}" if note else told, highlight=False)

        yield advance


def told_time(seconds: float) -> str:
    """A time as people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
