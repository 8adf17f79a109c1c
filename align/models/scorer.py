"""Scores of conversations in text: our own reward models, and those that others made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from align.artifacts import read_json
from align.errors import StageError
from align.models.chat import encode_answers, render
from align.models.classifier import (
    is_encoder,
    load_classifier,
    load_reward_model,
    own_scores,
    scores,
    separator_of,
)
from align.models.implicit import implicit_scores, load_implicit
from align.models.load import load_config, load_tokenizer, room
from align.models.logprobs import (
    Row,
    collate,
    default_budget,
    token_budget_batches,
    unwrapped,
)
from align.models.settings import Model
from align.records import Message

REWARD = "reward.json"  # beside our adapters: how their scores are to be read, and their base
Conversation = tuple[Sequence[Message], str]  # the messages, and the answer that is scored


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """A reward model that reads text.

    Attributes:
        max_length: tokens of a conversation; of longer ones the prompt loses its beginning first.
        mean, std: of its scores over reference responses, once and for all; 0 and 1 where unknown.
        whole: it reads all that its template writes. Ours read up to the end of turn, as they were
            trained.
        own_pooling: transformers' classifier finds the token at which the score is read.
        beta: of an implicit reward, which `model`, an adapter on a language model, gives; None: a
            classifier's head gives the score.
    """

    model: Any
    tokenizer: Any
    max_length: int
    mean: float = 0.0
    std: float = 1.0
    whole: bool = False
    own_pooling: bool = False
    beta: float | None = None

    def scores(
        self,
        conversations: Sequence[Conversation],
        *,
        budget: int | None = None,
        advance: Callable[[int, int], None] = lambda rows, tokens: None,
    ) -> list[float]:
        """The raw score of each conversation, in their order; read in batches of like length.

        Args:
            budget: tokens of a batch, padding included; None: what suits the device.
            advance: is told of each batch, its rows and tokens.
        """
        rows = [self.encoded(messages, answer) for messages, answer in conversations]
        return self.row_scores(rows, budget=budget, advance=advance)

    @torch.no_grad()
    def row_scores(
        self,
        rows: Sequence[Row],
        *,
        budget: int | None = None,
        advance: Callable[[int, int], None] = lambda rows, tokens: None,
    ) -> list[float]:
        """The same of token ids."""
        lengths = [len(row) for row in rows]
        found = [0.0] * len(rows)
        for batch in token_budget_batches(
            lengths, budget=budget or default_budget(self.model.device)
        ):
            for i, score in zip(batch, self.read([rows[i] for i in batch]).tolist(), strict=True):
                found[i] = score
            advance(len(batch), sum(lengths[i] for i in batch))
        return found

    def normalised(self, raw: float) -> float:
        """(raw - mean) / std: about 0 for a usual answer, 1 for one a deviation better."""
        return (raw - self.mean) / self.std

    def encoded(self, messages: Sequence[Message], answer: str) -> Row:
        """Token ids of prompt and answer; what a template writes as a whole is all prompt."""
        if self.whole:
            told = (*messages, Message(role="assistant", content=answer))
            ids = render(self.tokenizer, told, answered=True)
            if len(ids) <= self.max_length:
                return Row(prompt=ids, completion=[])
        found = encode_answers(self.tokenizer, messages, [answer], max_length=self.max_length)
        return Row(prompt=found.prompt.ids, completion=found.answers[0])

    def read(self, rows: Sequence[Row]) -> torch.Tensor:
        """Scores of rows, [B]."""
        if self.beta is not None:
            packed = collate(rows, device=self.model.device)
            return implicit_scores(self.model, packed, beta=self.beta)
        width, device = max(map(len, rows)), self.model.device
        pad = unwrapped(self.model).config.get_text_config().pad_token_id
        whole = [[*row.prompt, *row.completion, *([pad] * (width - len(row)))] for row in rows]
        ids = torch.tensor(whole, device=device)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        separator = separator_of(self.model, self.tokenizer)
        if self.own_pooling:
            mask = torch.arange(width, device=device) < lengths[:, None]
            return own_scores(self.model, input_ids=ids, mask=mask, separator=separator)
        return scores(self.model, input_ids=ids, lengths=lengths, separator=separator)


def open_scorer(folder: Path, *, base: Model | None) -> Scorer:
    """The reward model in a folder: one of ours (an adapter), or a whole classifier of others.

    Args:
        base: what an adapter stands on; None: the one that it was trained on.

    Raises:
        StageError: the folder holds no reward model.
        ConfigError: the base cannot be loaded.
    """
    if (folder / "adapter_config.json").is_file():
        return open_adapter(folder, base=base)
    if not (folder / "config.json").is_file():
        raise StageError(
            f"{folder}: neither an adapter nor a model in Hugging Face format; give the adapter "
            "folder of a reward training (runs/reward/latest/reward_model), or a classifier's"
        )
    plain = Model(
        name=str(folder), revision=None, quantization="none", dtype="auto", chat_template=None
    )
    settings = replace(base, name=str(folder), revision=None) if base else plain
    config = load_config(settings)
    if config.num_labels != 1:
        raise StageError(
            f"{folder}: a classifier of {config.num_labels} classes, and a score is one number; "
            "give a reward model, which has num_labels=1"
        )
    pad = getattr(config.get_text_config(), "pad_token_id", None)
    model = load_classifier(settings, seed=None)
    encoder = is_encoder(model)
    tokenizer = load_tokenizer(settings, encoder=encoder)
    return Scorer(
        model=model,
        tokenizer=tokenizer,
        max_length=room(model, tokenizer),
        whole=True,
        # Without a padding token it was only ever asked one by one, and read the last token.
        own_pooling=encoder or pad is not None,
    )


def open_adapter(folder: Path, *, base: Model | None) -> Scorer:
    """A reward model of ours.

    Raises:
        StageError: nobody says what its base is, or it fits another one.
    """
    told = told_of(folder)
    settings = base or base_of(told, folder)
    beta = told.get("beta")
    load = load_reward_model if beta is None else load_implicit
    model = load(settings, folder)
    tokenizer = load_tokenizer(settings, encoder=beta is None and is_encoder(model))
    length = min(told.get("max_length") or room(model, tokenizer), room(model, tokenizer))
    return Scorer(
        model=model,
        tokenizer=tokenizer,
        max_length=length,
        mean=told.get("mean", 0.0),
        std=told.get("std", 1.0),
        beta=beta,
    )


def told_of(folder: Path) -> dict[str, Any]:
    """What the training wrote beside the adapter, {} where it is another one's.

    Raises:
        StageError: the file is damaged.
    """
    path = folder / REWARD
    try:
        return dict(read_json(path)) if path.is_file() else {}
    except (ValueError, TypeError) as error:
        raise StageError(
            f"{path}: damaged ({error}); give the folder that a reward training wrote, or run that "
            "training again"
        ) from error


def base_of(told: Mapping[str, Any], folder: Path) -> Model:
    """The base that an adapter was trained on, as `reward.json` names it.

    Raises:
        StageError: it does not, or not whole.
    """
    try:
        return Model(**told["base"])
    except (KeyError, TypeError) as error:
        reason = "" if "base" not in told else f" ({error})"
        raise StageError(
            f"{folder}: no {REWARD} that names its base{reason}; type +model@judge.model=hf "
            "judge.model.name=NAME"
        ) from error
