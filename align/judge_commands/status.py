"""`python -m align.judge status ledger=FILE`: progress, spending and failures, by the ledger."""

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from align.config import did_you_mean
from align.errors import ConfigError
from align.judge.ledger_view import BatchSeen, JobSeen, JudgeSeen, look
from align.judge.prices import usd
from align.progress import told_time
from align.unseen import printable

DEFAULT = "runs/judgments.sqlite"
HELP = f"""{__doc__}

Settings: ledger={DEFAULT}"""
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

    def show(text: str) -> None:
        console.print(Text(printable(text)), highlight=False, soft_wrap=True)

    show(str(settings.ledger))
    for judge in seen.judges:
        show(told(judge))
    if not seen.judges:
        console.print("nothing has been asked yet")
    if seen.batches:
        console.print("\nbatches at providers")
    for batch in seen.batches:
        show(told_batch(batch))
    if seen.jobs:
        console.print("\njobs")
    for job in seen.jobs[:MOST_JOBS]:
        show(told_job(job))
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
            "attempts that were cut off, broke or were filtered"
        )
    if judge.reserved:
        lines.append(f"  under way        ${usd(judge.reserved):,.4f} at worst")
    if judge.unanswered:
        lines.append(
            f"  without answer   {judge.unanswered:,} requests; the command that asked them asks "
            "again, with retry=true if it came to its end"
        )
    return "\n".join(lines)


def told_batch(batch: BatchSeen) -> str:
    """One batch in a line."""
    begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(batch.created))
    name = batch.id or "no name yet"
    return (
        f"  {begun}  {batch.identity} at {batch.endpoint}: {batch.status} ({name}), "
        f"{batch.requests:,} requests; the command that asked them takes it in"
    )


def told_job(job: JobSeen) -> str:
    """One job in a line."""
    now = time.time()
    begun = time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started))
    state = "done" if job.done >= job.total else "ended early"
    if state != "done" and job.alive:
        left = (now - job.started) / max(job.done, 1) * (job.total - job.done)
        state = f"at work, {told_time(left)} left"
    lacking = f", {job.failed:,} without a verdict" if job.failed else ""
    done = f"{job.done:,} of {job.total:,} comparisons{lacking}"
    return f"  {begun}  {job.identity}, {job.title}: {done}; {state}"
