"""Proximal policy optimization with four roles on one base: what it needs, and how it trains.

Deviations from TRL 1.12's trainer are named beside the code of each step.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from align.algorithms.needs import Needs
from align.algorithms.settings import Ppo
from align.records import Prompt

if TYPE_CHECKING:
    from align.algorithms.online import Online

NEEDS = Needs(records=Prompt, reference=False, reward=True)


def train(online: "Online", *, settings: Ppo, out: Path) -> None:
    """Writes out/adapter, out/value, curves.jsonl, samples.jsonl, timing.jsonl and metrics.json;
    goes on from out/checkpoint.pt.
    """
    from align.algorithms.ppo.run import run

    run(online, settings=settings, out=out)
