"""A small run by one of TRL's trainers on a tiny model, for the tests and for the processes that
they start.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

from align.algorithms import grpo, rloo
from align.algorithms.online import Online
from align.algorithms.settings import CriticFree, Grpo, Rloo
from align.models.settings import Model
from tests.algorithms.ppo.running import online

CONF = Path(__file__).parents[2] / "conf" / "algorithm"
CLASSES: dict[str, type[CriticFree]] = {"rloo": Rloo, "grpo": Grpo}
MODULES: dict[str, Any] = {"rloo": rloo, "grpo": grpo}
SMALL: dict[str, Any] = {
    "reward": "tests.algorithms.ppo.running:even",
    "iterations": 4,
    "prompts": 4,
    "samples": 4,
    "max_new_tokens": 3,
    "truncated": "score",
    "learning_rate": 1e-2,
    "schedule": "constant",
    "epochs": 1,
    "minibatches": 2,
    "monitor_every": 2,
    "monitor_prompts": 3,
    "checkpoint_every": 1,
    "held_out": 0.2,
}


def settings(name: str, **changes: Any) -> CriticFree:
    """The shipped settings at a tiny size."""
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    node = {key: float(v) if key == "learning_rate" else v for key, v in node.items()}
    return CLASSES[name](**{**node, **SMALL, **changes})


def train(
    name: str, model: Model, out: Path, *, given: Online | None = None, **changes: Any
) -> Path:
    out.mkdir(exist_ok=True, parents=True)
    MODULES[name].train(given or online(model), settings=settings(name, **changes), out=out)
    return out


if __name__ == "__main__":
    import torch

    from tests.conftest import model_settings

    torch.set_num_threads(1)
    name, folder, where, *words = sys.argv[1:]
    changes = {key: yaml.safe_load(value) for key, value in (w.split("=", 1) for w in words)}
    train(name, model_settings(Path(folder)), Path(where), **changes)
