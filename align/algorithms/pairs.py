"""Pairs as the trainer sees them: pre-tokenized rows with cached reference log-probabilities, and
their batches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from align.models.logprobs import Row, collate


@dataclass(frozen=True, kw_only=True)
class PairData:
    """Rows for training and for measuring; `seed` orders the epochs."""

    train: "PairRows"
    held_out: "PairRows"
    seed: int


class PairRows(torch.utils.data.Dataset[dict[str, Any]]):
    """A view on the memory-mapped pairs: `indices` of them, each with the reference's
    log-probabilities.
    """

    def __init__(
        self, rows: Any, *, chosen: torch.Tensor, rejected: torch.Tensor, indices: Sequence[int]
    ) -> None:
        self.rows, self.chosen, self.rejected = rows, chosen, rejected
        self.indices = numpy.asarray(indices, dtype=numpy.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        where = int(self.indices[index])
        return {
            **self.rows[where],
            "reference_chosen": float(self.chosen[where]),
            "reference_rejected": float(self.rejected[where]),
        }

    def lengths(self) -> numpy.ndarray[Any, Any]:
        """Tokens of each pair's longer row, [N]."""
        return self.column("length")

    def have_margins(self) -> bool:
        """Whether a pair has a margin other than zero."""
        known = "margin" in self.rows.column_names
        return known and bool(numpy.nan_to_num(self.column("margin").astype(float)).any())

    def column(self, name: str) -> numpy.ndarray[Any, Any]:
        """One column of the pairs, [N]; no other one is read."""
        table = self.rows.select_columns(name).with_format("arrow")[:]
        found: numpy.ndarray[Any, Any] = table.column(name).to_numpy()[self.indices]
        return found


def collate_pairs(pairs: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of 2B rows, all chosen and then all rejected.

    Returns:
        input_ids, response_mask: [2B, T]; lengths (of prompt and answer together): [2B]; p, margin
        (0 where there is none), reference_chosen, reference_rejected, chosen_length,
        rejected_length: [B].
    """
    rows = [
        Row(prompt=pair["prompt_ids"], completion=pair[f"{side}_ids"])
        for side in ("chosen", "rejected")
        for pair in pairs
    ]
    packed = collate(rows)
    batch = {"input_ids": packed.input_ids, "response_mask": packed.response_mask}
    batch["lengths"] = torch.tensor([len(row) for row in rows])
    for key in ("p", "reference_chosen", "reference_rejected"):
        batch[key] = torch.tensor([pair[key] for pair in pairs], dtype=torch.float32)
    margins = [pair.get("margin") or 0.0 for pair in pairs]
    batch["margin"] = torch.tensor(margins, dtype=torch.float32)
    for side in ("chosen", "rejected"):
        counts = [len(pair[f"{side}_ids"]) for pair in pairs]
        batch[f"{side}_length"] = torch.tensor(counts, dtype=torch.float32)
    return batch


class GlobalBatchSampler(torch.utils.data.Sampler[int]):
    """Each epoch a fresh permutation, trimmed to whole global batches; within one, rows are sorted
    by length.

    Any split of it into micro-batches of one size, in order, over any number of processes, gives
    each optimizer step the same rows. Sorting within the step pads little and changes no gradient.
    The rows left over differ from epoch to epoch.
    """

    def __init__(
        self,
        lengths: numpy.ndarray[Any, Any],
        *,
        batch_size: int,
        seed: int,
        epoch: Callable[[], int],
    ) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths) // self.batch_size * self.batch_size

    def __iter__(self) -> Iterator[int]:
        order = numpy.random.default_rng([self.seed, self.epoch()]).permutation(len(self.lengths))
        for start in range(0, len(self), self.batch_size):
            step = order[start : start + self.batch_size]
            yield from step[numpy.argsort(-self.lengths[step], kind="stable")].tolist()
