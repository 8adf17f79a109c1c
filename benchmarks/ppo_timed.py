"""PPO that learns for so many seconds rather than so many iterations: the shipped trainer, stopped.

An algorithm of its own (`algorithm.module=benchmarks.ppo_timed`). Looks at held-out prompts are not
counted. It writes reached.json: what was measured when the time was over.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from align.algorithms.ppo import NEEDS as NEEDS
from align.algorithms.settings import Ppo
from align.artifacts import write_json
from align.jsonl import read_lines

if TYPE_CHECKING:
    from align.algorithms.online import Online


@dataclass(frozen=True, kw_only=True)
class Settings(Ppo):
    """`seconds` of sampling, scoring and learning, if `iterations` do not end first."""

    seconds: float


def train(online: "Online", *, settings: Settings, out: Path) -> None:
    from align.algorithms.ppo.run import made
    from align.process_group import open_ranks

    trainer = made(online, settings=settings, out=out, ranks=open_ranks())
    trainer.begin()
    spent = 0.0
    while spent < settings.seconds and trainer.iteration < settings.iterations:
        started = time.perf_counter()
        trainer.iterate(trainer.iteration)
        spent += time.perf_counter() - started - watched(out)
    phases = [line for _, line in read_lines(out / "timing.jsonl")]
    reached = {
        "iterations": trainer.iteration,
        "seconds": spent,
        **{
            key: sum(line.get(key, 0.0) for line in phases)
            for key in ("generate_s", "reward_s", "score_s", "learn_s")
        },
        **{key: trainer.history[-1][key] for key in ("reward", "kl")},
        **trainer.monitor.measure(),
    }
    write_json(out / "reached.json", reached)
    trainer.close()


def watched(out: Path) -> float:
    """Seconds that the last iteration looked at held-out prompts."""
    last = [line for _, line in read_lines(out / "timing.jsonl")][-1]
    return float(last.get("watch_s", 0.0))
