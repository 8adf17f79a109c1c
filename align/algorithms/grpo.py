"""Group relative policy optimization through TRL's trainer: an answer is worth what it scores above
the mean of its prompt's answers. What it needs, and how it trains.

    A_i = (score_i - mean(scores)) / std(scores),    loss = clipped ratio by token + beta KL

Shao et al. 2024, arXiv:2402.03300, equations 3 and 4. KL (k3, a token) stands in the loss and not
in the reward, so `beta` is on another scale than PPO's and RLOO's; and where scores are divided by
their deviation, calibration changes only what clipping and the penalty of cut answers do.

An answer without a score has no advantage but is still held to the reference.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from align.algorithms.needs import Needs
from align.algorithms.settings import Grpo
from align.records import Prompt

if TYPE_CHECKING:
    from align.algorithms.online import Online

NEEDS = Needs(records=Prompt, reference=False, reward=True)


def train(online: "Online", *, settings: Grpo, out: Path) -> None:
    """Writes out/adapter, curves.jsonl, samples.jsonl, timing.jsonl and metrics.json; goes on from
    out/checkpoints.
    """
    from trl import GRPOConfig, GRPOTrainer  # type: ignore[attr-defined]

    from align.algorithms.trl_online import OwnAnswers, run

    class Trainer(OwnAnswers, GRPOTrainer):  # type: ignore[misc]
        """TRL's trainer on our answers."""

        def _generate_single_turn(
            self, prompt_ids: Any, images: Any, multimodal_fields: Any, *given: Any, **named: Any
        ) -> tuple[list[list[int]], None]:
            return self.drawn(), None  # the sampler's log-probabilities correct for vLLM only

    own = {"loss_type": settings.loss, "scale_rewards": settings.scale_rewards}
    run(online, settings=settings, out=out, trainer_class=Trainer, config=GRPOConfig, own=own)
