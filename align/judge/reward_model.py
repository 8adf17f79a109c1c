"""A judge that scores each answer by itself: a reward model of ours, or a classifier that others
made.
"""

from collections.abc import AsyncIterator, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from align.errors import StageError, keyed
from align.judge.ask import key_of
from align.judge.local import apart
from align.judge.orders import leaning
from align.judge.settings import RewardModel
from align.records import OK, TIE, Comparison, Message, Verdict

if TYPE_CHECKING:
    from align.models.scorer import Scorer

WINDOW = 128  # pairs whose answers are read together; a resumed file goes on at such a border

Asked = tuple[tuple[Message, ...], str]


async def compare(
    comparisons: Iterable[Comparison], *, settings: RewardModel
) -> AsyncIterator[Verdict]:
    """One verdict a comparison, in order. Answers are scored apart, so no order can matter.

    Raises:
        StageError: the folder holds no reward model.
        ConfigError: its base cannot be loaded.
    """
    scorer = await apart(partial(load, settings))
    window: list[Comparison] = []
    for comparison in comparisons:
        window.append(comparison)
        if len(window) == WINDOW:
            for verdict in await apart(partial(verdicts, scorer, window, settings=settings)):
                yield verdict
            window = []
    if window:
        for verdict in await apart(partial(verdicts, scorer, window, settings=settings)):
            yield verdict


def load(settings: RewardModel) -> "Scorer":
    """The reward model in memory.

    Raises:
        StageError: the folder holds none.
        ConfigError: its base cannot be loaded.
    """
    from align.models.identity import pinned
    from align.models.scorer import open_scorer

    key = key_of(settings)
    with keyed(f"{key}.model", own="model"):
        base = None if settings.model is None else pinned(settings.model)
        try:
            return open_scorer(Path(settings.path), base=base)
        except StageError as error:
            raise StageError(f"{key}.path={error}") from error


def verdicts(scorer: "Scorer", window: list[Comparison], *, settings: RewardModel) -> list[Verdict]:
    """The verdicts of some comparisons; an answer that stands in several is read once."""
    asked: dict[Asked, float] = {}
    for comparison in window:
        for text in (comparison.first, comparison.second):
            asked.setdefault((comparison.prompt.messages, text), 0.0)
    found = scorer.scores(list(asked), budget=settings.batch_tokens)
    asked = dict(zip(asked, found, strict=True))
    return [verdict(scorer, comparison, asked, judge=settings.judge) for comparison in window]


def verdict(
    scorer: "Scorer", comparison: Comparison, scores: Mapping[Asked, float], *, judge: str
) -> Verdict:
    """p = sigmoid(r_first - r_second), Bradley and Terry's; too sure of a model that was trained
    with reward.margin, for the leads it was asked for are in its scores.
    """
    from math import tanh

    messages = comparison.prompt.messages
    first, second = (scores[messages, text] for text in (comparison.first, comparison.second))
    p = 0.5 + 0.5 * tanh((first - second) / 2)
    tied = leaning(p) == 0
    return Verdict(
        id=comparison.prompt.id,
        first=comparison.first_index,
        second=comparison.second_index,
        status=TIE if tied else OK,
        p_first=0.5 if tied else p,
        consistent=True,
        judge=judge,
        margin=abs(first - second),
        scores=tuple({"reward": scorer.normalised(raw)} for raw in (first, second)),
    )
