"""Samples answers with the policy as it stands, and keeps what they are learnt from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from align.algorithms.settings import OnAnswers
from align.models.logprobs import Row
from align.records import Prompt
from align.rewards.source import Sample
from align.samplers import hf
from align.samplers.settings import Hf


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and its token ids, cut to fit beside the longest answer."""

    prompt: Prompt
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """N answers, those to one prompt together. On the CPU.

    Attributes:
        rows: N prompts and answers as token ids; nothing stands behind the end of turn.
        groups: [N], equal for the answers to one prompt.
        ended: [N], True where the answer ended its turn, False where it was cut.
        sampler_logprobs: [N, R], as the sampler had them; 0 behind the end.
    """

    rows: Sequence[Row]
    groups: torch.Tensor
    ended: torch.Tensor
    sampler_logprobs: torch.Tensor

    def response_mask(self) -> torch.Tensor:
        """[N, R], True where a token counts; from lengths."""
        return mask_of([len(row.completion) for row in self.rows])


def mask_of(lengths: Sequence[int]) -> torch.Tensor:
    """[N, R] from N lengths."""
    return torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]


def padded(values: Sequence[Sequence[float]]) -> torch.Tensor:
    """[N, R], 0 behind the end of each."""
    width = max(len(row) for row in values)
    return torch.tensor([[*row, *([0.0] * (width - len(row)))] for row in values])


def sampling(settings: OnAnswers, *, n: int) -> Hf:
    return Hf(
        name="hf",
        module=None,
        n=n,
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        max_new_tokens=settings.max_new_tokens,
        batch_size=settings.sampler_batch_size,
    )


def rollout(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    settings: Hf,
    seed: int,
    first_group: int = 0,
) -> Rollouts:
    """`settings.n` answers to each question, in the questions' order.

    The noise of a token depends on (seed, prompt, sample, position) alone, so several processes
    that share the questions out draw what one would have drawn.
    """
    made: list[hf.Row] = []
    for i, question in enumerate(questions):
        for k in range(settings.n):
            noise = hf.noise(seed, question.prompt.id, k, settings.max_new_tokens)
            made.append(hf.Row(prompt=i, sample=k, noise=noise))
    order = sorted(range(len(questions)), key=lambda i: (-len(questions[i].ids), i))
    size = max(1, settings.batch_size // settings.n)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        batch = [made[i * settings.n + k] for i in chosen for k in range(settings.n)]
        prompts = [questions[i].ids for i in chosen]
        hf.draw(model, tokenizer, prompts, batch, settings=settings)
    return Rollouts(
        rows=[Row(prompt=questions[r.prompt].ids, completion=tuple(r.tokens)) for r in made],
        groups=torch.tensor([first_group + r.prompt for r in made]),
        ended=torch.tensor([r.finish == "eos" for r in made]),
        sampler_logprobs=padded([r.logprobs for r in made]),
    )


def samples_of(
    rollouts: Rollouts, questions: Sequence[Question], tokenizer: Any, *, first_group: int = 0
) -> list[Sample]:
    """What a source of rewards is shown."""
    found = []
    for row, group, ended in zip(
        rollouts.rows, rollouts.groups.tolist(), rollouts.ended.tolist(), strict=True
    ):
        text = str(tokenizer.decode(row.completion, skip_special_tokens=True)).strip()
        found.append(
            Sample(
                prompt=questions[group - first_group].prompt,
                text=text,
                prompt_ids=tuple(row.prompt),
                completion_ids=tuple(row.completion),
                finish="eos" if ended else "length",
            )
        )
    return found
