"""Rewards from a judge: how often an answer is preferred to the prompt's other ones."""

import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from itertools import combinations, groupby
from typing import Any

from align.judge.ask import verdicts_of
from align.judge.settings import called
from align.records import Comparison, Verdict
from align.rewards.source import Sample


class JudgeReward:
    """Every pair of a prompt's answers is compared; an answer's reward is the mean probability that
    it is the better one. Needs two answers a prompt.

    An answer on which there is no verdict gets no reward: a failure never becomes data. Equal
    texts are a tie that nobody is asked about.
    """

    def __init__(self, settings: Any) -> None:
        self.settings = settings
        self.name = str(called(settings))

    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        shares: list[list[float]] = [[] for _ in samples]
        places: dict[tuple[str, int, int], tuple[int, int]] = {}
        asked = []
        for group in grouped(samples):
            for i, j in combinations(group, 2):
                if samples[i].text == samples[j].text:
                    shares[i].append(0.5)
                    shares[j].append(0.5)
                    continue
                first, second = i - group[0], j - group[0]
                places[samples[i].prompt.id, first, second] = (i, j)
                asked.append(
                    Comparison(
                        prompt=samples[i].prompt,
                        first=samples[i].text,
                        second=samples[j].text,
                        first_index=first,
                        second_index=second,
                    )
                )
        for verdict in asyncio.run(self.asked(asked)):
            if verdict.p_first is not None:
                i, j = places[verdict.id, verdict.first, verdict.second]
                shares[i].append(verdict.p_first)
                shares[j].append(1 - verdict.p_first)
        return [sum(share) / len(share) if share else None for share in shares]

    async def asked(self, comparisons: list[Comparison]) -> list[Verdict]:
        async with contextlib.aclosing(verdicts_of(comparisons, settings=self.settings)) as found:
            return [verdict async for verdict in found]


def grouped(samples: Sequence[Sample]) -> Iterator[range]:
    """The places of each prompt's samples."""
    start = 0
    for _, group in groupby(samples, key=lambda sample: sample.prompt.id):
        size = sum(1 for _ in group)
        yield range(start, start + size)
        start += size
