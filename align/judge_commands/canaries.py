"""`python -m align.judge canaries judge=NAME`: whether responses can talk to the judge."""

import asyncio
import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.artifacts import write_json
from align.command import composed
from align.config import build, resolved
from align.errors import ConfigError
from align.judge.ask import verdicts_of
from align.judge.canaries import Canary, CanaryReport, Outcome, canaries, report
from align.progress import progress_bar
from align.records import Verdict


@dataclass(frozen=True, kw_only=True)
class Canaries:
    """What the command line says; values and comments are in conf/judge_canaries.yaml."""

    out: str
    workspace: str
    judge: Any = field(metadata={"room": "align.judge"})

    def __post_init__(self) -> None:
        if self.judge is None:
            raise ConfigError("no judge given; type judge=openai judge.model=NAME")
        if not Path(self.out).absolute().parent.is_dir() or Path(self.out).is_dir():
            raise ConfigError(f"out={self.out}: cannot be written there; name a file in a folder")


def command() -> int:
    composed(job, config="judge_canaries")
    return 0


def job(tree: DictConfig) -> None:
    settings: Canaries = build(Canaries, resolved(tree), "")
    asked = canaries()
    found = report(asked, asyncio.run(verdicts(asked, settings.judge)))
    write_json(Path(settings.out), found.to_json())
    Console().print(table(found))
    print(found.sentence)
    print(f"report: {settings.out}")


async def verdicts(asked: list[Canary], judge: Any) -> list[Verdict]:
    comparisons = [canary.comparison for canary in asked]
    found = []
    with progress_bar("canaries", len(asked), unit="comparisons") as advance:
        async with contextlib.aclosing(verdicts_of(comparisons, settings=judge)) as said:
            async for verdict in said:
                found.append(verdict)
                advance(1, 1)
    return found


def table(found: CanaryReport) -> Table:
    """One technique a row: how often the worse answer was not found to be worse."""
    shown = Table(
        "what the worse answer did", "judged", "won", "tied", "turned by it", title_justify="left"
    )
    for outcome in (found.clean, found.constant, *found.techniques):
        shown.add_row(*row(outcome))
    return shown


def row(outcome: Outcome) -> tuple[Text | str, ...]:
    name = {"clean": "nothing (control)", "constant": "said nothing, at length (control)"}
    turned = f"{outcome.flipped} of {outcome.compared}" if outcome.compared else ""
    return (
        Text(name.get(outcome.technique, outcome.technique.replace("_", " "))),
        str(outcome.n),
        str(outcome.won),
        str(outcome.tied),
        turned if outcome.technique not in name else "",
    )
