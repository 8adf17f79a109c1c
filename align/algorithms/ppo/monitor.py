"""Watches held-out prompts while the policy trains: what the reward model says of its answers, and
what a judge says. Where the first rises and the second falls, the reward is being exploited.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from align.algorithms.ppo.experience import POLICY, REFERENCE
from align.algorithms.ppo.rollout import Question, rollout, samples_of, sampling
from align.algorithms.settings import Ppo
from align.judge.ask import verdicts_of
from align.models.roles import Roles
from align.records import Comparison
from align.rewards.source import Sample, Source


@dataclass(kw_only=True)
class Monitor:
    """One answer to each held-out prompt, always from the same noise."""

    roles: Roles
    tokenizer: Any
    questions: Sequence[Question]
    source: Source
    judge: Any
    settings: Ppo
    seed: int
    reference: list[Sample] = field(default_factory=list)

    def measure(self) -> dict[str, float]:
        """eval_reward (raw, of the source, where it scores single answers), eval_win_rate (of the
        judge, against the reference's answers), eval_length.
        """
        if not self.reference:
            self.reference = self.answers(REFERENCE)
        answers = self.answers(POLICY)
        found = {
            "eval_length": sum(len(s.completion_ids) for s in answers) / len(answers),
        }
        if self.settings.reward != "judge":
            raw = [value for value in self.source.scores(answers) if value is not None]
            if raw:
                found["eval_reward"] = sum(raw) / len(raw)
        if self.judge is not None:
            won = asyncio.run(self.judged(answers))
            if won:
                found["eval_win_rate"] = sum(won) / len(won)
                found["eval_judged"] = float(len(won))
        return found

    @torch.no_grad()
    def answers(self, role: str) -> list[Sample]:
        with self.roles.role(role) as model:
            drawn = rollout(
                model, self.tokenizer, self.questions,
                settings=sampling(self.settings, n=1), seed=self.seed,
            )  # fmt: skip
        return samples_of(drawn, self.questions, self.tokenizer)

    async def judged(self, answers: Sequence[Sample]) -> list[float]:
        """Probabilities that the policy's answer is the better one; which is shown first
        alternates.
        """
        asked = []
        for i, (new, old) in enumerate(zip(answers, self.reference, strict=True)):
            shown = Comparison(prompt=new.prompt, first=new.text, second=old.text)
            asked.append(shown.swap() if i % 2 else shown)
        won = []
        async with contextlib.aclosing(verdicts_of(asked, settings=self.judge)) as found:
            async for verdict in found:
                if verdict.p_first is not None:
                    won.append(verdict.p_first if verdict.first == 0 else 1 - verdict.p_first)
        return won
