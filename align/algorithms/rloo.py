"""REINFORCE leave-one-out through TRL's trainer: an answer is worth what it scores above the mean
of its prompt's other answers. What it needs, and how it trains.

    A_i = R_i - 1/(k-1) sum_{j != i} R_j,    R_i = score_i - beta log(pi(y_i) / pi_ref(y_i))

Ahmadian et al. 2024, arXiv:2402.14740, section 2; `beta` weighs the same KL as PPO's. TRL clips
the probability ratio of whole answers, where the paper takes one step and no ratio.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.algorithms.needs import Needs
from align.algorithms.settings import Rloo
from align.records import Prompt

if TYPE_CHECKING:
    from align.algorithms.online import Online

NEEDS = Needs(records=Prompt, reference=False, reward=True)


def train(online: "Online", *, settings: Rloo, out: Path) -> None:
    """Writes out/adapter, curves.jsonl, samples.jsonl, timing.jsonl and metrics.json; goes on from
    out/checkpoints.
    """
    from trl import RLOOConfig, RLOOTrainer  # type: ignore[attr-defined]

    from align.algorithms.trl_online import OwnAnswers, run

    class Trainer(OwnAnswers, RLOOTrainer):  # type: ignore[misc]
        """TRL's trainer on our answers."""

        def _generate_single_turn(
            self, prompt_ids: Any, images: Any, multimodal_fields: Any
        ) -> list[list[int]]:
            return self.drawn()

    own = {"normalize_advantages": settings.whiten}
    run(online, settings=settings, out=out, trainer_class=Trainer, config=RLOOConfig, own=own)
