"""What is measured of a policy that learns from pairs: its log-probabilities against the
reference's, and when it is lost.
"""

from collections.abc import Mapping
from typing import Any

import torch

from align.algorithms.dpo_loss import PairLogprobs
from align.algorithms.preference_trainer import (
    Batch,
    Objective,
    PairLoss,
    Results,
    Values,
    no_number,
    ranked_right,
)
from align.algorithms.settings import PreferenceTraining
from align.models.logprobs import sequence_logprobs

SIDES = ("chosen", "rejected")
# Losing rejected answers is the aim, so they may lose this many times what chosen ones may.
REJECTED_MAY_DROP = 5

NAMES = (
    "loss",
    "accuracy",
    "reward_margin",
    "chosen_reward",
    "rejected_reward",
    "chosen_logps",
    "rejected_logps",
    "kl",
    "chosen_drop",
    "rejected_drop",
    "chosen_tokens",
    "rejected_tokens",
)


def policy_objective(
    results: PairLoss, *, settings: PreferenceTraining, seed: int, remedy: str
) -> Objective:
    """The objective whose loss is what `results` makes of a batch's log-probabilities and labels p
    [B].
    """

    def measure(model: Any, batch: Batch) -> Values:
        pairs = pair_logprobs(model, batch)
        return values(pairs, results(pairs, batch["p"]), p=batch["p"])

    return Objective(
        measure=measure,
        names=NAMES,
        logged=logged,
        collapsed=lambda logs: collapsed(logs, max_drop=settings.max_drop),
        batch_size=settings.batch_size,
        seed=seed,
        remedy=remedy,
    )


def pair_logprobs(model: Any, batch: Batch) -> PairLogprobs:
    """Log-probabilities of a batch's answers under the policy, beside the reference's."""
    found = sequence_logprobs(
        model, input_ids=batch["input_ids"], response_mask=batch["response_mask"]
    )
    chosen, rejected = found.chunk(2)
    given = (
        "reference_chosen", "reference_rejected", "chosen_length", "rejected_length", "margin",
    )  # fmt: skip
    return PairLogprobs(
        policy_chosen=chosen, policy_rejected=rejected, **{key: batch[key] for key in given}
    )


def values(pairs: PairLogprobs, results: Results, *, p: torch.Tensor) -> Values:
    """What is known of each pair, [B] each; `p` [B] are the labels.

    `kl` is log reference - log policy, the mean of both answers: KL(reference || policy) where the
    reference sampled them, a measure of drift where it did not.
    """
    margin = results.chosen_reward - results.rejected_reward
    return {
        "loss": results.loss,
        "accuracy": ranked_right(margin, p),
        "reward_margin": margin,
        "chosen_reward": results.chosen_reward,
        "rejected_reward": results.rejected_reward,
        "chosen_logps": pairs.policy_chosen,
        "rejected_logps": pairs.policy_rejected,
        "kl": -(pairs.chosen_ratio + pairs.rejected_ratio) / 2,
        "chosen_drop": -pairs.chosen_ratio,
        "rejected_drop": -pairs.rejected_ratio,
        "chosen_tokens": pairs.chosen_length,
        "rejected_tokens": pairs.rejected_length,
    }


def logged(sums: Mapping[str, float]) -> dict[str, float]:
    """Means over pairs; what is lost per token is a mean over tokens."""
    found = dict(sums)
    count = found.pop("pairs")
    tokens = {side: found.pop(f"{side}_tokens") for side in SIDES}
    drops = {side: found.pop(f"{side}_drop") for side in SIDES}
    return {
        **{key: value / count for key, value in found.items()},
        "chosen_logps_per_token": found["chosen_logps"] / tokens["chosen"],
        **{f"{side}_drop_per_token": drops[side] / tokens[side] for side in SIDES},
    }


def collapsed(logs: Mapping[str, float], *, max_drop: float) -> str | None:
    """Why a run cannot recover: numbers that are none, chosen answers that are lost, or a margin
    that runs away because rejected ones are lost without end; None where all is well.
    """
    if (reason := no_number(logs)) is not None:
        return reason
    for side, times in (("chosen", 1), ("rejected", REJECTED_MAY_DROP)):
        lost = logs[f"{side}_drop_per_token"]
        if lost > times * max_drop:
            allowed = f"{times} times " if times > 1 else ""
            return (
                f"{side} answers lost {lost:.2f} nats per token against the reference "
                f"(more than {allowed}algorithm.max_drop={max_drop:g})"
            )
    return None
