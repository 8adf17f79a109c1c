"""What a source of rewards is given, and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from align.records import Prompt


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sampled answer.

    Attributes:
        text: decoded without special tokens; empty where the model ended its turn at once.
        prompt_ids, completion_ids: as the policy saw and drew them, the end of turn included where
            `finish` is "eos"; nothing stands behind it.
        base_logprob: of the answer under the bare base, in nats; None where nobody asked for it.
    """

    prompt: Prompt
    text: str
    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    finish: str
    base_logprob: float | None = None


class Source(Protocol):
    """Scores answers; higher is better. The samples of one prompt stand together."""

    name: str

    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        """One number a sample, in their order; None where there is none, and the sample then
        teaches nothing.
        """
        ...
