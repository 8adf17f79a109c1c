"""`python -m align.judge status ledger=FILE`: progress, spending and failures, by the ledger."""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.config import did_you_mean
from align.errors import ConfigError
from align.judge.ledger import JobSeen, JudgeSeen, look
from align.judge.prices import usd

DEFAULT = "runs/judgments.sqlite"
HELP = f"""{__doc__}

Settings: ledger={DEFAULT}"""
FRESH_S = 10.0  # a job that gave a sign of life within this time is at work
MOST_JOBS = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    ledger: Path


def command(words: list[str]) -> int:
    """Prints the state of a ledger; returns the exit status."""
    if {"-h", "--help"} & set(words):
        print(HELP)
        return 0
    settings = parse(words)
    seen = look(settings.ledger)
    console = Console()
    console.print(Text(str(settings.ledger)), highlight=False)
    for judge in seen.judges:
        console.print(Text(told(judge)), highlight=False)
    if not seen.judges:
        console.print("nothing has been asked yet")
    if seen.jobs:
        console.print(jobs_table(seen.jobs[:MOST_JOBS]))
    return 0


def parse(words: list[str]) -> Settings:
    """
    Raises:
        ConfigError: an unknown setting, or no such file.
    """
    ledger = DEFAULT
    for word in words:
        key, equals, value = word.partition("=")
        if key != "ledger" or not equals:
            raise ConfigError(
                f"{word}: no such setting{did_you_mean(key, ['ledger'])}; type ledger=FILE"
            )
        ledger = value
    if not Path(ledger).is_file():
        raise ConfigError(
            f"ledger={ledger}: no such file; type ledger=FILE, by default "
            "WORKSPACE/judgments.sqlite"
        )
    return Settings(ledger=Path(ledger))


def told(judge: JudgeSeen) -> str:
    """One judge in a few lines."""
    lines = [
        "",
        f"judge {judge.identity}" + (f" (asked by {judge.mode})" if judge.mode else ""),
        f"  answered         {judge.judged:,} requests: "
        + (", ".join(f"{n:,} {status}" for status, n in judge.judgments.items()) or "none"),
        f"  sent             {judge.attempts:,} attempts: "
        + (", ".join(f"{n:,} {status}" for status, n in judge.outcomes.items()) or "none"),
        f"  spent            ${usd(judge.spent):,.4f}",
    ]
    if judge.uncertain:
        lines.append(
            f"  possibly billed  ${usd(judge.uncertain):,.4f} at worst, for {judge.unsure:,} "
            "attempts "
            "that were cut off or broke"
        )
    if judge.reserved:
        lines.append(f"  under way        ${usd(judge.reserved):,.4f} at worst")
    if judge.unanswered:
        lines.append(
            f"  without answer   {judge.unanswered:,} requests; the command that asked them asks "
            "again"
        )
    return "\n".join(lines)


def jobs_table(jobs: list[JobSeen]) -> Table:
    """The newest jobs, one a row."""
    table = Table(
        "begun", "judge", "what", "done", "without verdict", "", title="jobs", title_justify="left"
    )
    now = time.time()
    for job in jobs:
        begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started))
        share = f"{job.done:,} of {job.total:,}"
        finished = job.done >= job.total
        state = "done" if finished else "at work" if now - job.seen < FRESH_S else "ended early"
        if state == "at work" and job.done:
            left = (now - job.started) / job.done * (job.total - job.done)
            state += f", {left / 60:.0f} min left" if left > 90 else f", {left:.0f} s left"
        table.add_row(begun, Text(job.identity), Text(job.title), share, f"{job.failed:,}", state)
    return table
