"""The score that an adapter without a head gives: how much more probable than the base it makes an
answer.
"""

from pathlib import Path
from typing import Any

import torch

from align.models.adapters import load_adapter, without_adapter
from align.models.load import load_model
from align.models.logprobs import Batch, sequence_logprobs
from align.models.settings import Model


def implicit_reward(policy: torch.Tensor, reference: torch.Tensor, *, beta: float) -> torch.Tensor:
    """The reward for which this policy would be the best one against a KL penalty, [B].

        r(x, y) = beta (log pi(y | x) - log pi_ref(y | x))

    Rafailov et al. 2023, arXiv:2305.18290, eq. 5, without beta log Z(x): it is the same for all
    answers to a prompt, so no comparison of them can tell it.

    Args:
        policy, reference: [B], summed log-probabilities of the answers, in nats.
    """
    return beta * (policy - reference)


@torch.no_grad()
def implicit_scores(model: Any, batch: Batch, *, beta: float) -> torch.Tensor:
    """Of an adapter against the base that it stands on, [B]."""
    given = {"input_ids": batch.input_ids, "response_mask": batch.response_mask}
    policy = sequence_logprobs(model, **given)
    with without_adapter(model) as base:
        reference = sequence_logprobs(base, **given)
    return implicit_reward(policy, reference, beta=beta)


def load_implicit(settings: Model, folder: Path, *, device: torch.device | None = None) -> Any:
    """The base with a saved adapter, frozen, in evaluation mode.

    Raises:
        StageError: the folder holds no adapter, or one for another model.
    """
    model = load_adapter(load_model(settings, device=device), folder)
    return model.requires_grad_(False)
