"""What one iteration learns from: rollouts with log-probabilities, values, rewards and
advantages.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from align.algorithms.online import Calibration
from align.algorithms.ppo.advantages import (
    Estimated,
    gae,
    k1,
    leave_one_out,
    token_rewards,
    whiten,
)
from align.algorithms.ppo.loss import importance_weight
from align.algorithms.ppo.rollout import Rollouts
from align.algorithms.settings import CriticFree, OnAnswers, Ppo
from align.models.logprobs import (
    Row,
    collate,
    last_hidden,
    scored_tokens,
    token_budget_batches,
)
from align.models.roles import Roles
from align.rewards.source import Sample, Source

POLICY, REFERENCE, VALUE, REWARD = "policy", "reference", "value", "reward"


@dataclass(frozen=True, kw_only=True)
class Passes:
    """What the models say of the rollouts before any step; each [N, R], 0 behind the end.

    Attributes:
        logprobs: of the policy by the training forward, at the sampling temperature.
        values: [N, R], V of the state in which each token was chosen; 0 without a value function.
        behind: [N], V behind the last token; 0 where it is not asked for.
    """

    logprobs: torch.Tensor
    reference_logprobs: torch.Tensor
    values: torch.Tensor
    entropies: torch.Tensor
    behind: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Experience:
    """N answers of all processes, on the CPU.

    Attributes:
        scores: [N], calibrated and clipped, as they count.
        raw: [N], as their source gave them.
        taught: [N], False where there is no score, so that the answer teaches nothing.
    """

    rollouts: Rollouts
    passes: Passes
    scores: torch.Tensor
    raw: torch.Tensor
    taught: torch.Tensor

    def mask(self) -> torch.Tensor:
        """[N, R], True where a token counts and teaches."""
        return self.rollouts.response_mask() & self.taught[:, None]

    def kl(self) -> torch.Tensor:
        """[N, R], k1 to the reference."""
        found = k1(self.passes.logprobs, self.passes.reference_logprobs)
        return found * self.rollouts.response_mask()


def scored(
    rollouts: Rollouts,
    seen: Passes,
    raw: torch.Tensor,
    *,
    calibration: Calibration,
    settings: OnAnswers,
) -> Experience:
    """What an iteration learns from.

    Args:
        raw: [N], rewards as their source gave them; NaN where it gave none.
    """
    scores = final_scores(
        raw.nan_to_num(calibration.mean), rollouts.ended,
        mean=calibration.mean, std=calibration.std, settings=settings,
    )  # fmt: skip
    taught = ~raw.isnan()
    return Experience(rollouts=rollouts, passes=seen, scores=scores, raw=raw, taught=taught)


@torch.no_grad()
def passes(roles: Roles, rollouts: Rollouts, *, settings: Ppo | CriticFree) -> Passes:
    """One forward pass of policy and reference each, and of the value role where it has its own
    adapter.
    """
    rows, mask = rollouts.rows, rollouts.response_mask()
    seen = {key: torch.zeros(mask.shape) for key in (POLICY, REFERENCE, VALUE, "entropies")}
    behind = torch.zeros(len(rows))
    lengths = [len(row) for row in rows]
    for batch in token_budget_batches(lengths, budget=settings.micro_batch_tokens):
        chosen, where = [rows[i] for i in batch], torch.tensor(batch)
        for key, tokens in batch_passes(roles, chosen, settings=settings).items():
            part = torch.zeros(mask[where].shape)
            part[mask[where]] = tokens.float().cpu()
            seen[key][where] = part
        if settings.truncated == "bootstrap":
            behind[where] = last_value(roles, chosen).float().cpu()
    return Passes(
        logprobs=seen[POLICY],
        reference_logprobs=seen[REFERENCE],
        values=seen[VALUE],
        entropies=seen["entropies"],
        behind=behind,
    )


def batch_passes(
    roles: Roles, rows: Sequence[Row], *, settings: Ppo | CriticFree
) -> dict[str, torch.Tensor]:
    """Of each token that counts, row after row, [M]: log-probabilities, entropy and value."""
    packed = collate(rows, device=roles.model.device)
    given: dict[str, Any] = {
        "input_ids": packed.input_ids, "response_mask": packed.response_mask
    }  # fmt: skip
    with roles.role(POLICY) as model:
        policy = scored_tokens(model, **given, temperature=settings.temperature, entropies=True)
    with roles.role(REFERENCE) as model:
        reference = scored_tokens(model, **given, temperature=settings.temperature)
    assert policy.entropies is not None
    found = {
        POLICY: policy.logprobs, REFERENCE: reference.logprobs, "entropies": policy.entropies
    }  # fmt: skip
    if settings.value == "trunk":
        found[VALUE] = roles.head(VALUE)(policy.hidden)
    elif settings.value == "adapter":
        found[VALUE] = values_of(roles, **given)
    return found


def values_of(
    roles: Roles, *, input_ids: torch.Tensor, response_mask: torch.Tensor
) -> torch.Tensor:
    """[M], the value role's V of the state in which each token that counts was chosen: from the
    position before it.
    """
    given = {"input_ids": input_ids, "response_mask": response_mask}
    found: torch.Tensor = roles.head(VALUE)(hidden_before(roles, VALUE, **given))
    return found


def hidden_before(
    roles: Roles, role: str, *, input_ids: torch.Tensor, response_mask: torch.Tensor
) -> torch.Tensor:
    """[M, H], a role's last hidden state at the position before each token that counts."""
    rows, columns = response_mask[:, 1:].nonzero(as_tuple=True)
    with roles.role(role) as model:
        return last_hidden(model, input_ids)[rows, columns]


def last_value(roles: Roles, rows: Sequence[Row]) -> torch.Tensor:
    """[B], V of the state behind each row's last token."""
    ids = collate(rows, device=roles.model.device).input_ids
    ends = torch.tensor([len(row) - 1 for row in rows], device=ids.device)
    # A value on the trunk is a role with the policy's adapter.
    with roles.role(VALUE) as model:
        hidden = last_hidden(model, ids)[torch.arange(len(rows), device=ids.device), ends]
        found: torch.Tensor = roles.head(VALUE)(hidden)
    return found


def estimate(experience: Experience, *, beta: float, settings: Ppo) -> Estimated:
    """Advantages and returns over the rows of all processes."""
    mask = experience.mask()
    rewards = token_rewards(
        experience.scores, experience.kl(), experience.rollouts.response_mask(), beta=beta
    )
    if settings.value == "none":
        found = leave_one_out(rewards * mask, taught_groups(experience), mask)
    else:
        bootstrap = None
        if settings.truncated == "bootstrap":
            bootstrap = experience.passes.behind * ~experience.rollouts.ended
        found = gae(
            rewards * mask,
            experience.passes.values,
            mask,
            gamma=settings.gamma,
            lam=settings.lam,
            bootstrap=bootstrap,
        )
    if settings.whiten:
        found = replace(found, advantages=whiten(found.advantages, mask))
    return found


def taught_groups(experience: Experience) -> torch.Tensor:
    """[N]; an answer without a score is nobody's sibling."""
    groups = experience.rollouts.groups
    alone = groups.max() + 1 + torch.arange(len(groups))
    return torch.where(experience.taught, groups, alone)


def sampler_weights(experience: Experience, *, settings: Ppo) -> torch.Tensor:
    """[N, R], truncated importance weights of the trainer's distribution over the sampler's; 1
    where they are switched off.
    """
    old, drawn = experience.passes.logprobs, experience.rollouts.sampler_logprobs
    if settings.importance_cap is None:
        return torch.ones_like(old)
    return importance_weight(old, drawn, most=settings.importance_cap)


def raw_rewards(source: Source, samples: Sequence[Sample]) -> torch.Tensor:
    """[N], what a source gives; NaN where it gives nothing."""
    given = source.scores(samples)
    return torch.tensor([math.nan if value is None else value for value in given])


def final_scores(
    raw: torch.Tensor, ended: torch.Tensor, *, mean: float, std: float, settings: OnAnswers
) -> torch.Tensor:
    """[N], what a source's scores count: calibrated, clipped, and where an answer was cut, what the
    settings say.

        s = clip((raw - mean) / std, -c, c);    a cut answer scores exactly `penalty` with
        truncated=penalty, 0 with bootstrap (the value goes on for it), s with score
    """
    scores = ((raw - mean) / std).clamp(-settings.reward_clip, settings.reward_clip)
    if settings.truncated == "penalty":
        return torch.where(ended, scores, torch.full_like(scores, settings.penalty))
    if settings.truncated == "bootstrap":
        return torch.where(ended, scores, torch.zeros_like(scores))
    return scores
