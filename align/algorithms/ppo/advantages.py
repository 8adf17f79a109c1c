"""From scores to advantages: pure functions on padded rows, in which padding changes nothing.

Legend: N answers, R tokens of the longest answer. `response_mask` [N, R] is True where a token
counts, the end of turn included; it comes from lengths.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Estimated:
    """What the policy and the value function learn from; each [N, R], 0 where no token counts."""

    advantages: torch.Tensor
    returns: torch.Tensor


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over what counts, a number; 0 where nothing does."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whiten(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean 0 and variance 1 over all tokens that count, [N, R]; a constant becomes 0.

    Deviation: TRL takes each process's own mean and variance; here the rows of all processes are
    at hand, so that one process and two give the same.
    """
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    return (values - mean) / (variance.sqrt() + 1e-8) * mask


def k1(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """log policy - log reference per token: unbiased for KL(policy || reference) on the policy's
    own tokens, of either sign. Schulman 2020, "Approximating KL divergence".
    """
    return logprobs - reference


def k3(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """r - 1 - log r with r = reference / policy: unbiased like k1, never negative, less variable.
    Schulman 2020. Good to look at; as a loss its gradient is not that of the KL.
    """
    log_ratio = reference - logprobs
    return log_ratio.exp() - 1 - log_ratio


def token_rewards(
    scores: torch.Tensor, kl: torch.Tensor, response_mask: torch.Tensor, *, beta: float
) -> torch.Tensor:
    """What each token earns, [N, R]:

        r_t = -beta kl_t  +  [t is the last token that counts] score

    Ziegler et al. 2019, arXiv:1909.08593, eq. 2, with the penalty token by token as in InstructGPT
    (Ouyang et al. 2022, arXiv:2203.02155, appendix C). The score stands on the end of turn itself;
    TRL 1.12 puts it on the padding behind it.

    Args:
        scores: [N], one an answer.
        kl: [N, R], k1 per token.
    """
    rewards = -beta * kl * response_mask
    last = response_mask.sum(-1) - 1
    return rewards.scatter_add(-1, last[:, None], scores[:, None].to(rewards.dtype))


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: torch.Tensor | None = None,
) -> Estimated:
    """Generalised advantage estimation.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t = delta_t + gamma lambda A_{t+1},    G_t = A_t + V_t

    Schulman et al. 2016, arXiv:1506.02438, eq. 16; V behind the last token is 0, for an answer that
    ended is a terminal state.

    Args:
        rewards, values: [N, R]; V_t is the value of the state in which token t is chosen.
        bootstrap: [N], the value behind the last token where an answer was cut rather than ended.
    """
    values = values * response_mask
    advantages = torch.zeros_like(values)
    last = (response_mask.sum(-1) - 1).clamp(min=0)  # of a row that teaches nothing none counts
    following = torch.zeros_like(values)
    following[:, :-1] = values[:, 1:]
    if bootstrap is not None:
        following.scatter_(-1, last[:, None], bootstrap[:, None].to(values.dtype))
    delta = (rewards + gamma * following - values) * response_mask
    running = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        running = delta[:, t] + gamma * lam * running * response_mask[:, t]
        advantages[:, t] = running
    return Estimated(advantages=advantages, returns=(advantages + values) * response_mask)


def leave_one_out(
    rewards: torch.Tensor, groups: torch.Tensor, response_mask: torch.Tensor
) -> Estimated:
    """Each answer against the mean of its prompt's other answers; needs no value function.

        A_i = G_i - 1/(n - 1) sum_{j != i} G_j,    G_i = sum_t r_t,    the same for all tokens of i

    Ahmadian et al. 2024 (RLOO), arXiv:2402.14740, eq. 8. An answer without siblings teaches
    nothing: its advantage is 0.

    Args:
        rewards: [N, R].
        groups: [N], equal for the answers to one prompt.
    """
    totals = (rewards * response_mask).sum(-1)
    _, group = torch.unique(groups, return_inverse=True)
    size = torch.bincount(group)[group]
    total = torch.zeros_like(totals).index_add(0, group, totals)[group]
    others = (total - totals) / (size - 1).clamp(min=1)
    own = torch.where(size > 1, totals - others, torch.zeros_like(totals))
    advantages = own[:, None] * response_mask
    return Estimated(advantages=advantages, returns=totals[:, None] * response_mask)


def explained_variance(values: torch.Tensor, returns: torch.Tensor, mask: torch.Tensor) -> float:
    """1 - Var[G - V] / Var[G] over the tokens that count: 1 foresees all, 0 no more than a
    constant, below 0 less. 0 where returns do not vary.
    """

    def variance(x: torch.Tensor) -> torch.Tensor:
        return masked_mean((x - masked_mean(x, mask)) ** 2, mask)

    whole = variance(returns)
    return float(1 - variance(returns - values) / whole) if whole > 0 else 0.0
