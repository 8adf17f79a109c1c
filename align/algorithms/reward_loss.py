"""The reward model's loss on pairs: a pure function from scores to a loss per pair."""

import torch
from torch.nn.functional import logsigmoid


def bradley_terry(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    q: torch.Tensor,
    margin: torch.Tensor,
    scale: float,
    centre: float,
) -> torch.Tensor:
    """How improbable the labels are under the scores, and how far the scores stray from zero, [B].

        d = r_w - r_l - scale * margin
        loss = -q log sigmoid(d) - (1 - q) log sigmoid(-d) + centre * (r_w + r_l)^2

    Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1 for q = 1; the margin is
    Touvron et al. 2023 (Llama 2), arXiv:2307.09288, eq. 2; the last term Eisenstein et al. 2023,
    arXiv:2312.09244, eq. 8: a loss on differences leaves the level of the scores to chance.
    Deviation from both: soft labels, as in `sigmoid_loss`.

    Args:
        chosen, rejected: [B], scores r_w and r_l.
        q: [B], probability that chosen is truly better.
        margin: [B], the judge's, 0 where it gave none.
    """
    d = chosen - rejected - scale * margin
    return -q * logsigmoid(d) - (1 - q) * logsigmoid(-d) + centre * (chosen + rejected) ** 2
