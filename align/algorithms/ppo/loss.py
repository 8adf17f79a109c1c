"""PPO's losses: pure functions, token by token, of any shape; what counts and by how much is summed
outside.
"""

from dataclasses import dataclass

import torch

MOST_LOG_RATIO = 20.0  # exp(20) is finite in float32, and far beyond every clip


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """Per token: the loss, probability ratio new to old, and whether clipping took the gradient."""

    loss: torch.Tensor
    ratio: torch.Tensor
    clipped: torch.Tensor


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip: float,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """The clipped surrogate, to be minimised.

        r = exp(log policy - log old),    loss = max(-A r, -A clip(r, 1 - eps, 1 + eps))

    Schulman et al. 2017, arXiv:1707.06347, eq. 7. With `dual_clip` c > 1, where A < 0 it is at most
    -c A, so that one token that the policy came to like cannot outweigh a batch (Ye et al. 2020,
    arXiv:1912.09729, eq. 5). The log-ratio is held to +-20, so nothing overflows.
    """
    ratio = (logprobs - old_logprobs).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO).exp()
    free, held = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    loss, clipped = torch.maximum(free, held), held > free
    if dual_clip is not None:
        most = -dual_clip * advantages
        bounded = (advantages < 0) & (loss > most)
        loss, clipped = torch.where(bounded, most, loss), clipped | bounded
    return PolicyLoss(loss=loss, ratio=ratio.detach(), clipped=clipped.detach())


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, *, clip: float | None
) -> torch.Tensor:
    """Half the squared error, the larger of clipped and unclipped.

        loss = 1/2 max((V - G)^2, (V_old + clip(V - V_old, -eps, eps) - G)^2)

    As in the PPO of Schulman's baselines ("PPO2"); `clip` None leaves the plain error.
    """
    error = (values - returns) ** 2
    if clip is None:
        return 0.5 * error
    held = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.maximum(error, (held - returns) ** 2)


def kl_loss(
    logprobs: torch.Tensor, reference: torch.Tensor, old_logprobs: torch.Tensor
) -> torch.Tensor:
    """KL(policy || reference) as a loss: k2, weighted by how likely the policy still is to say it.

        loss = sg[exp(log policy - log old)] 1/2 (log policy - log reference)^2

    Its gradient is in expectation that of the KL: E[(log p - log q) grad log p]. Those of k1 (0 in
    expectation) and k3 (of the reverse KL) are not. The weight is 1 while the tokens are the
    policy's own.
    """
    weight = (logprobs - old_logprobs).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO).exp().detach()
    return weight * 0.5 * (logprobs - reference) ** 2


def importance_weight(
    old_logprobs: torch.Tensor, sampler_logprobs: torch.Tensor, *, most: float
) -> torch.Tensor:
    """Trainer's probability over the sampler's, at most `most`; 1 where they agree.

    Truncated importance sampling for tokens that another engine or precision drew (Ionides 2008;
    Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training").
    """
    return (old_logprobs - sampler_logprobs).exp().clamp(max=most)


def next_beta(beta: float, *, kl: float, target: float, answers: int, horizon: int) -> float:
    """The adaptive KL coefficient.

        e = clip(kl / target - 1, -0.2, 0.2),    beta <- beta (1 + e answers / horizon)

    Ziegler et al. 2019, arXiv:1909.08593, section 2.2.

    Args:
        kl, target: nats per answer.
        answers: sampled since the last change.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * answers / horizon)
