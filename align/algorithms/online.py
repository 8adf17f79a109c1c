"""What every training on a policy's own answers shares: its prompts, its rewards, its judge."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from align.algorithms.ppo.rollout import Question
from align.algorithms.settings import CriticFree, Ppo
from align.errors import ConfigError, StageError
from align.models.roles import Roles
from align.models.scorer import REWARD, told_of
from align.models.settings import Full, Lora, Model
from align.notice import notice
from align.rewards.function import FunctionReward
from align.rewards.judge import JudgeReward
from align.rewards.role import RoleReward
from align.rewards.settings import FUNCTION, JUDGE, ROLE, kind_of
from align.rewards.source import Source

CALIBRATED_ON = 256  # answers of the starting policy


@dataclass(frozen=True, kw_only=True)
class Online:
    """A training on sampled answers, before any model is made for it.

    Attributes:
        base: the loaded base model, whole or quantized, in evaluation mode.
        questions, held_out: prompts to train on, and prompts to watch.
        reward_model: the folder that the reward stage wrote; None where there is none.
        judge: settings of the judge that gives rewards; `monitor`: of the one that watches.
    """

    model: Model
    adapter: Lora | Full
    base: Any
    tokenizer: Any
    questions: Sequence[Question]
    held_out: Sequence[Question]
    reward_model: Path | None
    judge: Any
    monitor: Any
    seed: int


def turn(iteration: int, *, count: int, prompts: int, seed: int) -> list[int]:
    """Places among `count` of the prompts of an iteration: the next ones of a permutation, drawn
    anew for each epoch.

    Those at its end that do not fill an iteration are left out, so that no iteration meets one
    prompt twice: its answers would be equal, and a judge would compare them as one prompt's.
    """
    epoch, part = divmod(iteration, count // prompts)
    order = numpy.random.default_rng([seed, epoch]).permutation(count)
    return [int(place) for place in order[part * prompts : (part + 1) * prompts]]


def calibration_questions(online: Online, *, samples: int, least: int = 1) -> list[Question]:
    """Those whose answers by the reference calibrate the rewards.

    Args:
        samples: answers to each.
        least: how many at least: one for each process.
    """
    wanted = max(least, math.ceil(CALIBRATED_ON / samples))
    return some_of(online.questions, wanted, seed=online.seed)


def some_of(questions: Sequence[Question], count: int, *, seed: int) -> list[Question]:
    """At most `count`, of a permutation: a file may be sorted by what it asks."""
    few = min(count, len(questions))
    places = turn(0, count=len(questions), prompts=few, seed=seed) if few else []
    return [questions[place] for place in places]


def check_rewarded(taught: torch.Tensor, *, reward: str) -> None:
    """
    Args:
        taught: [N], whether an answer has a reward.

    Raises:
        StageError: none has; training would go on without learning anything.
    """
    if not taught.any():
        raise StageError(
            f"algorithm.reward={reward}: none of the {len(taught)} answers of this iteration has a "
            "reward; see what the source of rewards says of them. The same command goes on from "
            "the last checkpoint"
        )


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Mean and standard deviation of raw rewards on the reference's answers, and their extremes;
    frozen.
    """

    mean: float = 0.0
    std: float = 1.0
    lowest: float | None = None
    highest: float | None = None

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


def calibrated(raw: Sequence[float | None], *, name: str) -> Calibration:
    """From the raw rewards of the reference's answers.

    Raises:
        StageError: there are fewer than two, or they are all the same.
    """
    known = torch.tensor([value for value in raw if value is not None], dtype=torch.float64)
    if len(known) < 2 or float(known.std()) < 1e-8:
        what = f"all {known[0].item():g}" if len(known) > 1 else f"only {len(known)}"
        raise StageError(
            f"algorithm.reward={name}: the rewards of {len(raw)} answers of the start are "
            f"{what}, so there is nothing to learn from; check the source of rewards, or type "
            "algorithm.calibrate=false if it only pays for answers that it never gives yet"
        )
    return Calibration(
        mean=float(known.mean()),
        std=float(known.std()),
        lowest=float(known.min()),
        highest=float(known.max()),
    )


def open_source(online: Online, roles: Roles, *, reward: str, budget: int | None = None) -> Source:
    """The source of rewards that `algorithm.reward` names.

    Args:
        budget: padded tokens that a role reads at once; None: what suits the device.

    Raises:
        ConfigError: there is none; StageError: the reward model does not fit the base.
    """
    kind = kind_of(reward)
    if kind == ROLE:
        if online.reward_model is None:
            raise ConfigError(
                "algorithm.reward=role: no reward model was trained; add reward to stages, or type "
                "algorithm.reward=FOLDER"
            )
        roles.load("reward", online.reward_model)
        beta = told_of(online.reward_model).get("beta")
        return RoleReward(roles, beta=beta, budget=budget)
    if kind == JUDGE:
        if online.judge is None:
            raise ConfigError("algorithm.reward=judge: judge=none; type judge=NAME")
        return JudgeReward(online.judge)
    if kind == FUNCTION:
        return FunctionReward(reward)
    from align.rewards.model import ModelReward

    return ModelReward(reward)


def saved_calibration(online: Online, *, reward: str) -> Calibration | None:
    """What the reward stage found on the reference's answers and saved with the reward model.

    Raises:
        StageError: it saved nothing.
    """
    if kind_of(reward) != ROLE or online.reward_model is None:
        return None
    found = told_of(online.reward_model)
    try:
        return Calibration(
            mean=float(found["mean"]),
            std=float(found["std"]),
            lowest=found.get("lowest"),
            highest=found.get("highest"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StageError(
            f"{online.reward_model / REWARD}: no calibration of the reward model ({error!r}); "
            "remove its artifact and run again"
        ) from error


def announce(
    online: Online, source: Source, calibration: Calibration, *, settings: Ppo | CriticFree
) -> None:
    """One line on what is trained, from what, against what."""
    value = {"trunk": "head on the policy", "adapter": "adapter of its own", "none": "none"}
    print(
        f"{len(online.questions)} prompts, {len(online.held_out)} watched; reference: base model, "
        f"adapter off; reward: {source.name}, {calibration.mean:.3g} ± {calibration.std:.3g} on "
        f"the reference's answers; value: {value[settings.value]}",
        flush=True,
    )
    if settings.top_p < 1 or settings.top_k > 0:
        notice(
            "algorithm.top_p, algorithm.top_k: answers are drawn from a part of the distribution "
            "and scored under the whole of it, so the ratio is biased by what was left out; type "
            "algorithm.top_p=1 algorithm.top_k=0"
        )
