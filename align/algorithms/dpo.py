"""Direct preference optimization: what it needs, and how it trains a policy on pairs.

Deviations from TRL's trainer: soft labels and label smoothing, reference log-probabilities from the
data, adapters in float32, accumulation derived from the global batch, a mean over the pairs of a
global batch however it is split.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from align.algorithms.needs import Needs
from align.algorithms.settings import Dpo
from align.errors import StageError
from align.records import Preference

if TYPE_CHECKING:
    from align.algorithms.pairs import PairData
    from align.algorithms.preference_trainer import Policy

NEEDS = Needs(records=Preference, reference=True)


def train(policy: "Policy", data: "PairData", *, settings: Dpo, out: Path) -> None:
    """Writes out/adapter, out/curves.jsonl and out/metrics.json; goes on from out/checkpoints."""
    import torch

    from align.algorithms.dpo_loss import LOSSES, PairLogprobs, hard_labels, soft_label
    from align.algorithms.fit import fit
    from align.algorithms.preference_trainer import Results

    if settings.offset and not any(data.train[i].get("margin") for i in range(len(data.train))):
        raise StageError(
            f"algorithm.offset={settings.offset:g}: no pair has a margin that it could count; type "
            "judge.scale=five, or algorithm.offset=0"
        )

    def results(pairs: PairLogprobs, p: torch.Tensor) -> Results:
        p = p if settings.soft_labels else hard_labels(p)
        q = soft_label(p, label_smoothing=settings.label_smoothing)
        more = {"offset": settings.offset} if settings.offset else {}
        return Results(
            loss=LOSSES[settings.loss](pairs, beta=settings.beta, q=q, **more),
            chosen_reward=settings.beta * pairs.chosen_ratio.detach(),
            rejected_reward=settings.beta * pairs.rejected_ratio.detach(),
        )

    fit(policy, data, results=results, settings=settings, out=out, remedy=remedy(settings))


def remedy(settings: Dpo) -> str:
    """What to type when a run collapses."""
    return (
        f"lower algorithm.learning_rate (now {settings.learning_rate:g}; try "
        f"{settings.learning_rate / 4:g}) "
        f"or raise algorithm.beta (now {settings.beta:g}; try {settings.beta * 3:g})"
    )
