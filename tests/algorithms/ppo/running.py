"""A small PPO run on a tiny model, for the tests and for the processes that they start."""

import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml

from align.algorithms import ppo
from align.algorithms.online import Online
from align.algorithms.ppo.rollout import Question
from align.algorithms.settings import Ppo
from align.models.chat import encode_prompt
from align.models.load import load_model, load_tokenizer
from align.models.settings import Lora, Model
from align.records import Message, Prompt

CONF = Path(__file__).parents[3] / "conf" / "algorithm" / "ppo.yaml"
LORA = Lora(name="lora", rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
SMALL: dict[str, Any] = {
    "reward": "tests.algorithms.ppo.running:even",
    "iterations": 4,
    "prompts": 4,
    "samples": 2,
    "max_new_tokens": 3,
    "truncated": "score",
    "learning_rate": 1e-2,
    "value_learning_rate": 1e-2,
    "monitor_every": 2,
    "monitor_prompts": 3,
    "checkpoint_every": 1,
    "minibatches": 2,
    "held_out": 0.2,
}


def settings(**changes: Any) -> Ppo:
    """The shipped settings at a tiny size."""
    node = yaml.safe_load(CONF.read_text())
    node = {key: float(v) if key.endswith("learning_rate") else v for key, v in node.items()}
    return Ppo(**{**node, **SMALL, **changes})


def even(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """A reward that a policy can learn: the share of letters from the first half of the
    alphabet.
    """
    return [sum(c < "n" for c in text) / max(len(text), 1) for text in responses]


def chance(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """As `even`, with noise from the generators that a user's function may draw from."""
    noise = [random.random() + float(numpy.random.random()) for _ in responses]
    return [r + 0.1 * n for r, n in zip(even(prompts, responses), noise, strict=True)]


def picky(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
    """As `even`, and nothing for some."""
    given = zip(even(prompts, responses), responses, strict=True)
    return [None if sum(map(ord, text)) % 4 == 0 else value for value, text in given]


def sparing(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
    """As `even`, and nothing for every fourth."""
    given = enumerate(even(prompts, responses))
    return [None if i % 4 == 1 else value for i, value in given]


def nothing(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[None]:
    return [None for _ in responses]


def prompts(count: int) -> list[Prompt]:
    return [
        Prompt(
            id=f"p{i}", messages=(Message(role="user", content=f"Question {i}, " * (1 + i % 3)),)
        )
        for i in range(count)
    ]


def online(model: Model, *, lora: Any = LORA, seed: int = 0, **changes: Any) -> Online:
    tokenizer = load_tokenizer(model)
    asked = [Question(prompt=p, ids=encode_prompt(tokenizer, p.messages).ids) for p in prompts(13)]
    made = Online(
        model=model,
        adapter=lora,
        base=load_model(model),
        tokenizer=tokenizer,
        questions=asked[:10],
        held_out=asked[10:],
        reward_model=None,
        judge=None,
        monitor=None,
        seed=seed,
    )
    return replace(made, **changes)


def likely_to_end(model: Any, eos: int, *, push: float = 5.0) -> None:
    """About every sixth token is then an end of turn."""

    def pushed(module: Any, given: Any, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone()
        logits[..., eos] += push
        return logits

    model.get_output_embeddings().register_forward_hook(pushed)


def train(model: Model, out: Path, *, given: Online | None = None, **changes: Any) -> Path:
    out.mkdir(exist_ok=True, parents=True)
    ppo.train(given or online(model), settings=settings(**changes), out=out)
    return out


if __name__ == "__main__":
    from tests.conftest import model_settings

    torch.set_num_threads(1)
    folder, quantization, where, *words = sys.argv[1:]
    changes = {key: yaml.safe_load(value) for key, value in (w.split("=", 1) for w in words)}
    model = model_settings(Path(folder), quantization=quantization)
    given = online(model)
    if changes.pop("ragged", False):
        likely_to_end(given.base, given.tokenizer.eos_token_id)
    train(model, Path(where), given=given, **changes)
