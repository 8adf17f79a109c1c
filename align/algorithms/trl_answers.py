"""The answers that one of TRL's trainers learns from: drawn by our sampler, scored by our sources
of rewards, measured as PPO's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from align.algorithms.online import (
    Calibration,
    Online,
    calibrated,
    calibration_questions,
    check_rewarded,
)
from align.algorithms.ppo.clock import Clock
from align.algorithms.ppo.experience import (
    POLICY,
    REFERENCE,
    Experience,
    passes,
    raw_rewards,
    scored,
)
from align.algorithms.ppo.gather import gathered
from align.algorithms.ppo.measures import measures, timing, told
from align.algorithms.ppo.rollout import Question, Rollouts, rollout, samples_of, sampling
from align.algorithms.ppo.seeds import derived
from align.algorithms.settings import CriticFree
from align.models.roles import Roles
from align.process_group import Ranks
from align.rewards.source import Sample, Source


@dataclass(kw_only=True)
class Answers:
    """One iteration's answers of this process, from question to score.

    TRL asks (`ask`), has them drawn (`draw`) and scored (`score`), in this order. What is measured
    costs a pass of policy and reference beside TRL's own, whose per-token KL is averaged in another
    way in each of its trainers.

    Attributes:
        calibration: of no effect until it is known.
    """

    online: Online
    settings: CriticFree
    roles: Roles
    source: Source
    ranks: Ranks
    calibration: Calibration = field(default_factory=Calibration)
    asked: list[Question] = field(default_factory=list)
    drawn: Rollouts | None = None
    samples: list[Sample] = field(default_factory=list)
    experience: Experience | None = None
    clock: Clock = field(default_factory=Clock)

    @torch.no_grad()
    def calibrate(self) -> Calibration:
        """Every process measures the same, so that nothing has to be sent."""
        few = calibration_questions(self.online, samples=self.settings.samples)
        with self.still(), self.roles.role(REFERENCE) as model:
            drawn = rollout(
                model, self.online.tokenizer, few, seed=derived(self.online.seed, "calibrate"),
                settings=sampling(self.settings, n=self.settings.samples),
            )  # fmt: skip
        raw = self.source.scores(samples_of(drawn, few, self.online.tokenizer))
        return calibrated(raw, name=self.source.name)

    # What TRL calls.

    def ask(self, places: Sequence[str]) -> list[list[int]]:
        """Prompts as token ids, one for each answer.

        Args:
            places: of the questions, as TRL's rows have them: `samples` times each, together.
        """
        n = self.settings.samples
        groups = [places[i : i + n] for i in range(0, len(places), n)]
        assert all(len(set(group)) == 1 and len(group) == n for group in groups), "scattered group"
        self.asked = [self.online.questions[int(group[0])] for group in groups]
        return [list(question.ids) for question in self.asked for _ in range(n)]

    def draw(self, iteration: int) -> list[list[int]]:
        """Answers to the questions that were asked last; the same whoever draws them, and
        whenever.
        """
        with self.clock.timed("generate"), self.still(), self.roles.role(POLICY) as model:
            self.drawn = rollout(
                model, self.online.tokenizer, self.asked,
                settings=sampling(self.settings, n=self.settings.samples),
                seed=derived(self.online.seed, "rollout", iteration),
            )  # fmt: skip
        return [list(row.completion) for row in self.drawn.rows]

    def score(self, prompts: Sequence[str], **rest: Any) -> list[float | None]:
        """TRL's reward function: calibrated scores; None where there is none, which TRL leaves out
        of the baseline and gives no advantage.
        """
        assert self.drawn is not None and len(prompts) == len(self.drawn.rows)
        self.samples = samples_of(self.drawn, self.asked, self.online.tokenizer)
        with self.clock.timed("score"), self.still():
            seen = passes(self.roles, self.drawn, settings=self.settings)
        with self.clock.timed("reward"), self.still():
            raw = raw_rewards(self.source, self.samples)
        found = scored(self.drawn, seen, raw, calibration=self.calibration, settings=self.settings)
        self.experience = found
        pairs = zip(found.scores.tolist(), found.taught.tolist(), strict=True)
        return [score if known else None for score, known in pairs]

    # What is told of them.

    def told(self, *, step: int) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, Any]]:
        """Measures over all processes, some answers, and what it took."""
        assert self.experience is not None
        everyone = gathered(self.experience, self.ranks)
        check_rewarded(everyone.taught, reward=self.source.name)
        nothing = torch.zeros_like(everyone.passes.values)
        measured = measures(everyone, nothing, calibration=self.calibration, settings=self.settings)
        measured.pop("explained_variance")  # there is no value function
        few = self.settings.logged_samples
        some = told(self.samples, everyone, step=step, few=few)
        took = timing(self.clock, everyone, step=step)
        self.clock.clear()
        return measured, some, took

    # How it is done.

    @contextmanager
    def still(self) -> Iterator[None]:
        """The model in evaluation mode: training mode would switch dropout on and, with recomputed
        activations, the sampler's cache off.
        """
        training = self.roles.model.training
        self.roles.model.eval()
        try:
            yield
        finally:
            self.roles.model.train(training)
