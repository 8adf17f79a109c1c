"""Every process's experience, shown to all: advantages, whitening and minibatches are then the same
everywhere, as if one process had done it all.
"""

from collections.abc import Sequence

import torch

from align.algorithms.ppo.experience import Experience, Passes
from align.algorithms.ppo.rollout import Rollouts
from align.models.logprobs import Row
from align.process_group import Ranks


def gathered(experience: Experience, ranks: Ranks) -> Experience:
    """The experience of all processes, in their order."""
    if ranks.count == 1:
        return experience
    given, seen = experience.rollouts, experience.passes

    def joined(values: torch.Tensor) -> torch.Tensor:
        return torch.cat(ranks.gathered(values))

    def widened(values: torch.Tensor) -> torch.Tensor:
        parts = ranks.gathered(values)
        width = max(part.shape[1] for part in parts)
        return torch.cat(
            [torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts]
        )

    return Experience(
        rollouts=Rollouts(
            rows=rows_of_all(given.rows, ranks),
            groups=joined(given.groups),
            ended=joined(given.ended.long()).bool(),
            sampler_logprobs=widened(given.sampler_logprobs),
        ),
        passes=Passes(
            logprobs=widened(seen.logprobs),
            reference_logprobs=widened(seen.reference_logprobs),
            values=widened(seen.values),
            entropies=widened(seen.entropies),
            behind=joined(seen.behind),
        ),
        scores=joined(experience.scores),
        raw=joined(experience.raw),
        taught=joined(experience.taught.long()).bool(),
    )


def rows_of_all(rows: Sequence[Row], ranks: Ranks) -> list[Row]:
    """Prompts and answers of all processes: their ids end to end, and where each ends."""
    ids = [i for row in rows for part in (row.prompt, row.completion) for i in part]
    lengths = [len(part) for row in rows for part in (row.prompt, row.completion)]
    found = []
    for flat, sizes in zip(
        ranks.gathered(torch.tensor(ids)), ranks.gathered(torch.tensor(lengths)), strict=True
    ):
        parts = [tuple(part.tolist()) for part in torch.split(flat, sizes.tolist())]
        found += [
            Row(prompt=prompt, completion=completion)
            for prompt, completion in zip(parts[::2], parts[1::2], strict=True)
        ]
    return found
