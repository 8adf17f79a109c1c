"""Losses on pairs: pure functions from log-probabilities to a loss per pair."""

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid


@dataclass(frozen=True, kw_only=True)
class PairLogprobs:
    """Summed log-probabilities of both answers under policy and reference, the answers' lengths,
    and the judge's margin (0 where it gave none); each [B].

    Example: `PairLogprobs(policy_chosen=…, policy_rejected=…, reference_chosen=…,
    reference_rejected=…, chosen_length=…, rejected_length=…, margin=…)`
    """

    policy_chosen: torch.Tensor
    policy_rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    chosen_length: torch.Tensor
    rejected_length: torch.Tensor
    margin: torch.Tensor

    @property
    def chosen_ratio(self) -> torch.Tensor:
        """log policy(y_w | x) - log reference(y_w | x), [B]."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> torch.Tensor:
        """log policy(y_l | x) - log reference(y_l | x), [B]."""
        return self.policy_rejected - self.reference_rejected


def hard_labels(p: torch.Tensor) -> torch.Tensor:
    """1 for whatever was preferred, however surely; a tie stays one, for it prefers nothing. [B]"""
    return torch.where(p == 0.5, p, torch.ones_like(p))


def soft_label(p: torch.Tensor, *, label_smoothing: float) -> torch.Tensor:
    """Probability that chosen is truly better: q = p (1 - e) + (1 - p) e, for labels that flip with
    probability e.

    Args:
        p: [B], the judge's probability, 0.5 to 1.
        label_smoothing: e, below 0.5.
    """
    return p * (1 - label_smoothing) + (1 - p) * label_smoothing


def sigmoid_loss(
    pairs: PairLogprobs, *, beta: float, q: torch.Tensor, offset: float = 0.0
) -> torch.Tensor:
    """DPO with soft labels and offsets, [B].

        m = beta (chosen_ratio - rejected_ratio) - offset * margin
        loss = -q log sigmoid(m) - (1 - q) log sigmoid(-m)

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7 for q = 1 and offset 0; Mitchell 2023 ("cDPO") for
    q = 1 - e; Amini et al. 2024 ("ODPO"), arXiv:2402.10571, for an offset. Deviation: there the
    offset grows with the logarithm of the score difference in the main runs, here with the margin
    itself, which may be 0.
    """
    margin = beta * (pairs.chosen_ratio - pairs.rejected_ratio) - offset * pairs.margin
    return -q * logsigmoid(margin) - (1 - q) * logsigmoid(-margin)


def ipo_loss(pairs: PairLogprobs, *, beta: float, q: torch.Tensor) -> torch.Tensor:
    """IPO on log-ratios averaged over each answer's tokens, [B].

        h = chosen_ratio / |y_w| - rejected_ratio / |y_l|,
        loss = q (h - 1 / (2 beta))^2 + (1 - q) (h + 1 / (2 beta))^2

    Azar et al. 2023, arXiv:2310.12036, eq. 17 for q = 1. Deviation: the paper sums over tokens; the
    mean is what its authors recommended to implementers and what TRL computes. beta is the paper's
    tau.
    """
    h = pairs.chosen_ratio / pairs.chosen_length - pairs.rejected_ratio / pairs.rejected_length
    target = 1 / (2 * beta)
    return q * (h - target) ** 2 + (1 - q) * (h + target) ** 2


def hinge_loss(pairs: PairLogprobs, *, beta: float, q: torch.Tensor) -> torch.Tensor:
    """Hinge on the normalised margin, [B].

        m = beta (chosen_ratio - rejected_ratio),    loss = q max(0, 1 - m) + (1 - q) max(0, 1 + m)

    Zhao et al. 2023 (SLiC), arXiv:2305.10425, eq. 1, on DPO's rewards as in Liu et al. 2023 (RSO),
    arXiv:2309.06657.
    """
    margin = beta * (pairs.chosen_ratio - pairs.rejected_ratio)
    return q * torch.relu(1 - margin) + (1 - q) * torch.relu(1 + margin)


LOSSES = {"sigmoid": sigmoid_loss, "ipo": ipo_loss, "hinge": hinge_loss}
