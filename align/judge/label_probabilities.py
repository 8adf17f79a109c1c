"""How probable a causal language model finds each label of a form as the next thing to say.

Every label is scored by teacher forcing behind a prompt and the words that announce the answer:

    log p(label) = sum_j log p(t_j | prompt, "Verdict:", t_<j),    P(label) = p(label) / sum p

Where one label begins another ("1" and "10"), the probability of the longer one is no evidence for
the shorter and is taken off it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from align.errors import ConfigError
from align.judge.forms import Form
from align.models.chat import encode_completion
from align.models.logprobs import (
    Row,
    collate,
    only_positions,
    token_budget_batches,
    unwrapped,
)

Ids = tuple[int, ...]


@dataclass(frozen=True)
class LabelTokens:
    """A form's answers as token ids.

    Attributes:
        forced: what every answer begins with ("Verdict:"), which the model is not asked about.
        labels: the rest of each, from where they differ.
    """

    forced: Ids
    labels: Mapping[str, Ids]

    @cached_property
    def stems(self) -> tuple[Ids, ...]:
        """What must stand behind `forced` for every token of every label to be predicted: labels
        without their last token, and of those only the ones that begin no other.
        """
        stems = {ids[:-1] for ids in self.labels.values()}
        return tuple(sorted(s for s in stems if not any(begins(s, other) for other in stems)))

    @cached_property
    def longer(self) -> dict[str, list[str]]:
        """By label, those that it begins, without any other label in between."""
        begun = {
            a: [b for b in self.labels if begins(self.labels[a], self.labels[b])]
            for a in self.labels
        }
        return {a: [c for c in more if not any(c in begun[b] for b in more)]
                for a, more in begun.items()}  # fmt: skip

    @cached_property
    def longest(self) -> int:
        """Tokens behind a prompt, at most."""
        return len(self.forced) + max(len(stem) for stem in self.stems)


def begins(ids: Ids, other: Ids) -> bool:
    """`other` goes on after `ids`."""
    return len(ids) < len(other) and other[: len(ids)] == ids


@lru_cache(maxsize=8)
def label_tokens(tokenizer: Any, form: Form) -> LabelTokens:
    """The form's answers as the tokenizer spells them behind a prompt, announced by their key.

    Raises:
        ConfigError: the tokenizer spells two labels alike.
    """
    announced = form.key.capitalize()
    # Together with what announces it: " A" is one token and not the one of "A".
    spelled = {
        label: encode_completion(tokenizer, f"{announced}: {label}")[:-1] for label in form.labels
    }
    shared = common_length(list(spelled.values()))
    labels = {label: ids[shared:] for label, ids in spelled.items()}
    if len(set(labels.values())) < len(labels) or () in labels.values():
        raise ConfigError(
            "judge.model.name: its tokenizer cannot tell the answers "
            f"{', '.join(form.labels)} apart; choose another model"
        )
    return LabelTokens(forced=next(iter(spelled.values()))[:shared], labels=labels)


def common_length(several: Sequence[Ids]) -> int:
    """How many tokens all begin with."""
    columns = zip(*several, strict=False)
    return next(
        (i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, several))
    )


def rows(prompt: Ids, tokens: LabelTokens) -> list[Row]:
    """The sequences to be read for one prompt, one for each stem."""
    return [Row(prompt=(*prompt, *tokens.forced), completion=stem) for stem in tokens.stems]


@torch.inference_mode()
def read_batch(model: Any, batch: Sequence[Row], tokens: LabelTokens) -> list[dict[str, float]]:
    """log p of each label that a row's stem predicts, for each row.

    Rows are padded on the right: causal attention alone keeps padding away from what is read, and
    positions count from 0, so no mask is needed (see align.models.logprobs).
    """
    packed = collate(batch, device=model.device)
    places = [(i, len(row.prompt) - 1 + j) for i, row in enumerate(batch)
              for j in range(len(row.completion) + 1)]  # fmt: skip
    at = {place: number for number, place in enumerate(places)}
    row_index, column = (
        torch.tensor(side, device=model.device) for side in zip(*places, strict=True)
    )
    with only_positions(unwrapped(model), row_index, column):
        logits = model(input_ids=packed.input_ids, use_cache=False).logits[0]
    logits = logits if logits.dtype == torch.float64 else logits.float()  # [N, V]
    wanted = [(i, label, at[i, len(row.prompt) - 1 + j], token)
              for i, row in enumerate(batch)
              for label, ids in tokens.labels.items() if predicted(ids, tuple(row.completion))
              for j, token in enumerate(ids)]  # fmt: skip
    number, target = torch.tensor([w[2] for w in wanted]), torch.tensor([w[3] for w in wanted])
    found = (logits[number, target] - logits.logsumexp(-1)[number]).tolist()
    sums: list[dict[str, float]] = [{} for _ in batch]
    for (i, label, _, _), value in zip(wanted, found, strict=True):
        sums[i][label] = sums[i].get(label, 0.0) + value
    return sums


def predicted(ids: Ids, stem: Ids) -> bool:
    """A row that ends in `stem` predicts every token of the label."""
    return stem[: len(ids) - 1] == ids[:-1]


def batches(all_rows: Sequence[Row], *, batch_tokens: int) -> list[list[int]]:
    """Indices of rows that are read together, the longest first."""
    return list(token_budget_batches([len(row) for row in all_rows], budget=batch_tokens))


def probabilities(logprobs: Mapping[str, float], tokens: LabelTokens) -> dict[str, float]:
    """Renormalised over the labels; empty where the model gave no numbers."""
    if not all(map(math.isfinite, logprobs.values())):
        return {}
    top = max(logprobs.values())
    whole = {label: math.exp(value - top) for label, value in logprobs.items()}
    mass = {
        label: max(0.0, value - sum(whole[longer] for longer in tokens.longer[label]))
        for label, value in whole.items()
    }
    total = sum(mass.values())
    return {label: value / total for label, value in mass.items()}
