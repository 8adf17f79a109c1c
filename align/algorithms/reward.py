"""A reward model: a score for an answer, learnt from pairs of them.

Deviations from TRL's trainer: soft labels and label smoothing, the end of turn counted where it is
also the padding, the head saved with the adapter and kept in float32, a mean over the pairs of a
global batch however it is split.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.algorithms.needs import Needs
from align.algorithms.settings import Reward
from align.errors import StageError
from align.records import Preference

if TYPE_CHECKING:
    import torch

    from align.algorithms.pairs import PairData
    from align.algorithms.preference_trainer import Batch, Objective, Policy, Values

NEEDS = Needs(records=Preference, reference=False)
NAMES = ("loss", "accuracy", "reward_margin", "chosen_reward", "rejected_reward")


def train(policy: "Policy", data: "PairData", *, settings: Reward, out: Path) -> None:
    """Writes out/adapter (with the head in it, if there is one), out/curves.jsonl and
    out/metrics.json; goes on from out/checkpoints. `policy.model` has an adapter: it is a
    classifier, or for an implicit score a language model.
    """
    from align.algorithms.fit import minimise
    from align.models.classifier import separator_of

    if settings.margin and not data.train.have_margins():
        raise StageError(
            f"algorithm.margin={settings.margin:g}: no pair has a margin that it could count; type "
            "judge.scale=five, or algorithm.margin=0"
        )
    separator = separator_of(policy.model, policy.tokenizer)
    goal = objective(settings, seed=data.seed, separator=separator)
    minimise(policy, data, objective=goal, settings=settings, out=out, title="reward")


def objective(settings: Reward, *, seed: int, separator: int | None = None) -> "Objective":
    """The Bradley-Terry loss and what is measured beside it; `separator`: see `separator_of`."""
    from align.algorithms.preference_trainer import Objective, no_number

    return Objective(
        measure=lambda model, batch: measure(model, batch, settings=settings, separator=separator),
        names=NAMES,
        logged=means,
        collapsed=no_number,
        batch_size=settings.batch_size,
        seed=seed,
        remedy=(
            f"lower algorithm.learning_rate (now {settings.learning_rate:g}; try "
            f"{settings.learning_rate / 4:g})"
        ),
    )


def measure(
    model: Any, batch: "Batch", *, settings: Reward, separator: int | None = None
) -> "Values":
    """What is known of each pair, [B] each.

    With implicit scores and neither margin nor centring this is DPO's loss (Rafailov et al. 2023,
    arXiv:2305.18290, eq. 7).
    """
    from align.algorithms.dpo_loss import hard_labels, soft_label
    from align.algorithms.preference_trainer import ranked_right
    from align.algorithms.reward_loss import bradley_terry

    chosen, rejected = scored(model, batch, settings=settings, separator=separator).chunk(2)
    p = batch["p"] if settings.soft_labels else hard_labels(batch["p"])
    loss = bradley_terry(
        chosen,
        rejected,
        q=soft_label(p, label_smoothing=settings.label_smoothing),
        margin=batch["margin"],
        scale=settings.margin,
        centre=settings.centre,
    )
    return {
        "loss": loss,
        "accuracy": ranked_right(chosen - rejected, batch["p"]),
        "reward_margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
    }


def scored(
    model: Any, batch: "Batch", *, settings: Reward, separator: int | None = None
) -> "torch.Tensor":
    """Scores of chosen and then of rejected answers, [2B]."""
    import torch

    from align.models.classifier import scores
    from align.models.implicit import implicit_reward
    from align.models.logprobs import sequence_logprobs

    if not settings.implicit:
        given = {"input_ids": batch["input_ids"], "lengths": batch["lengths"]}
        return scores(model, **given, separator=separator)
    found = sequence_logprobs(
        model, input_ids=batch["input_ids"], response_mask=batch["response_mask"]
    )
    reference = torch.cat([batch["reference_chosen"], batch["reference_rejected"]])
    return implicit_reward(found, reference, beta=settings.beta)


def means(sums: Mapping[str, float]) -> dict[str, float]:
    return {key: value / sums["pairs"] for key, value in sums.items() if key != "pairs"}
