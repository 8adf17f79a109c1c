"""What a PPO run is made of before its first iteration: roles, value function, optimizer,
learning rates.
"""

import math
from dataclasses import replace
from typing import Any

import torch

from align.algorithms.online import Calibration, Online
from align.algorithms.ppo.experience import POLICY, REFERENCE, REWARD, VALUE
from align.algorithms.ppo.seeds import derived
from align.algorithms.settings import OnAnswers, Ppo
from align.errors import ConfigError
from align.models.load import load_model
from align.models.roles import Head, Roles
from align.models.settings import Lora


def add_policy(roles: Roles, online: Online) -> None:
    """The policy starts as the reference, which is the bare base: with a fresh adapter on it, or
    with a copy of all its weights, in float32.
    """
    roles.bind(REFERENCE)
    if isinstance(online.adapter, Lora):
        roles.add(POLICY, settings=online.adapter, seed=online.seed)
        return
    whole = load_model(replace(online.model, dtype="float32"))
    whole.requires_grad_(True)
    roles.bind(POLICY, model=whole)


def add_value(roles: Roles, online: Online, settings: Ppo, calibration: Calibration | None) -> None:
    """The value function: a head on the policy's trunk, or an adapter and a head of its own, which
    start as the reward model where that is a role with a head.

    Its head is the reward's in calibrated units, so that at first V behind the end of an answer is
    the answer's score. Without one it starts at 0, the mean of calibrated rewards.
    """
    width = online.base.config.get_text_config().hidden_size
    fresh = Head(torch.zeros(width, device=roles.model.device))
    start = roles.bound.get(REWARD)
    if settings.value == "trunk":
        roles.attach(VALUE, POLICY, head=fresh)
    elif settings.value == "adapter" and start is not None and start.head is not None:
        reward, known = start.head, calibration or Calibration()
        head = Head(reward.weight / known.std, bias=(float(reward.bias) - known.mean) / known.std)
        roles.copy(VALUE, REWARD, head=head)
    elif settings.value == "adapter":
        if not isinstance(online.adapter, Lora):
            raise ConfigError(
                f"algorithm.value=adapter: adapter={online.adapter.name} describes none; type "
                "algorithm.value=trunk"
            )
        roles.add(VALUE, settings=online.adapter, seed=derived(online.seed, "value"), head=fresh)


def optimizer_of(roles: Roles, settings: Ppo) -> torch.optim.Optimizer:
    """Policy and value function each with its own learning rate."""
    rates = {POLICY: settings.learning_rate, VALUE: settings.value_learning_rate}
    groups = [
        {"params": roles.parameters(name), "lr": rate, "whole_lr": rate, "role": name}
        for name, rate in rates.items()
        if name in roles.bound
    ]
    if settings.optimizer == "paged_adamw_8bit":
        from bitsandbytes.optim.adamw import PagedAdamW8bit

        paged: Any = PagedAdamW8bit
        made: torch.optim.Optimizer = paged(groups, weight_decay=settings.weight_decay)
        return made
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)


def set_learning_rates(optimizer: torch.optim.Optimizer, iteration: int, *, settings: Ppo) -> float:
    """By iteration, because how many steps an iteration has may change (`target_kl`); returns the
    policy's. Neither the first iteration nor the last one is wasted on a rate of 0.
    """
    share = share_of_rate(iteration, settings=settings)
    for group in optimizer.param_groups:
        group["lr"] = share * group["whole_lr"]
    return float(optimizer.param_groups[0]["lr"])


def share_of_rate(iteration: int, *, settings: OnAnswers) -> float:
    """Rises evenly over the warm-up, then stays or decays to nearly 0."""
    warm = math.ceil(settings.warmup * settings.iterations)
    if iteration < warm:
        return (iteration + 1) / (warm + 1)
    done = (iteration - warm) / (settings.iterations - warm)
    decayed = {
        "constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))
    }  # fmt: skip
    return decayed[settings.schedule]
