"""Watches held-out prompts while the policy trains: what the reward model says of its answers, and
what a judge says. Where the first rises and the second falls, the reward is being exploited.
"""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from align.algorithms.online import Online, some_of
from align.algorithms.ppo.experience import POLICY, REFERENCE
from align.algorithms.ppo.rollout import Question, rollout, samples_of, sampling
from align.algorithms.ppo.seeds import derived
from align.algorithms.settings import OnAnswers
from align.errors import Interrupted, JudgeError
from align.judge.ask import verdicts_of
from align.models.roles import Roles
from align.notice import notice
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
    settings: OnAnswers
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
            won = self.win_probabilities(answers)
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

    def win_probabilities(self, answers: Sequence[Sample]) -> list[float]:
        """What the judge says, as far as it says anything: a judge that cannot work is told of, and
        training goes on without its curve.
        """
        try:
            return asyncio.run(self.judged(answers))
        except Interrupted:
            raise
        except JudgeError as error:
            notice(f"nobody judges the held-out prompts now, training goes on: {error}")
            return []

    async def judged(self, answers: Sequence[Sample]) -> list[float]:
        """Probabilities that the policy's answer is the better one; which is shown first
        alternates. Equal answers are a tie that nobody is asked about.
        """
        asked, won = [], []
        for i, (new, old) in enumerate(zip(answers, self.reference, strict=True)):
            if new.text == old.text:
                won.append(0.5)
                continue
            shown = Comparison(prompt=new.prompt, first=new.text, second=old.text)
            asked.append(shown.swap() if i % 2 else shown)
        async with contextlib.aclosing(verdicts_of(asked, settings=self.judge)) as found:
            async for verdict in found:
                if verdict.p_first is not None:
                    won.append(verdict.p_first if verdict.first == 0 else 1 - verdict.p_first)
        return won


def monitor_of(online: Online, roles: Roles, source: Source, *, settings: OnAnswers) -> Monitor:
    """Of the prompts that a training holds out."""
    return Monitor(
        roles=roles,
        tokenizer=online.tokenizer,
        questions=some_of(online.held_out, settings.monitor_prompts, seed=online.seed),
        source=source,
        judge=online.monitor,
        settings=settings,
        seed=derived(online.seed, "monitor"),
    )
