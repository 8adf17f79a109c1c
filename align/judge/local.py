"""A judge that runs in this process: a causal language model, read at the token of its verdict.

It writes nothing. Its chat template opens the answer, the answer's first words are put into its
mouth ("Verdict:"), and what it finds probable as the next word is the verdict.
"""

import asyncio
import contextlib
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from align.errors import ConfigError, DataError, keyed
from align.judge.answers import OK, Reading
from align.judge.ask import key_of
from align.judge.forms import SCALAR, Form
from align.judge.prompts import Template, one_message
from align.judge.settings import Local
from align.judge.verdicts import (
    Answer,
    Group,
    Question,
    fitting,
    groups,
    questions,
    verdicts,
    windows,
    with_dropped,
)
from align.records import Comparison, Message, Verdict

WINDOW = 128  # pairs that are sorted by length together; a resumed file goes on at such a border
LEAST_SHOWN = 50  # characters of a text; what does not fit even so is given up
BUSY = threading.Lock()  # one model computes, or loads, at a time: they share the machine

T = TypeVar("T")


async def compare(comparisons: Iterable[Comparison], *, settings: Local) -> AsyncIterator[Verdict]:
    """One verdict a comparison, in order.

    Raises:
        ConfigError: no such model, or one without a chat template.
    """
    async with opened(settings) as bench:
        for window in windows(comparisons, least=WINDOW):
            for settled in await bench.settle_all(list(groups(window, settings=settings))):
                for verdict in settled:
                    yield verdict


@contextlib.asynccontextmanager
async def opened(settings: Local) -> AsyncIterator["Bench"]:
    """The judge with its model in memory, for as long as it is needed."""
    with keyed(key_of(settings)):
        bench = await apart(partial(load, settings))
    yield bench


async def apart(work: Callable[[], T]) -> T:
    """Heavy work in a thread, so that other judges' requests go on meanwhile."""

    def alone() -> T:
        with BUSY:
            return work()

    return await asyncio.to_thread(alone)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where comparisons are settled.

    Attributes:
        name: what the judge is called in verdicts.
        room: the most tokens of a sequence.
        system: whether the chat template takes a system message.
    """

    settings: Local
    model: Any
    tokenizer: Any
    name: str
    room: int
    system: bool
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def settle(self, group: Group) -> list[Verdict]:
        """One verdict a comparison of the group."""
        (found,) = await self.settle_all([group])
        return found

    async def settle_all(self, several: Sequence[Group]) -> list[list[Verdict]]:
        """The verdicts of several groups, whose questions are read in common batches."""
        kept = [fitting(group, settings=self.settings) for group in several]
        async with self.turn:
            asked = await apart(lambda: [self.prepared(group) for group in kept])
            flat = [question for _, prepared in asked for question in prepared]
            answers = iter(await self.answers(flat))
        settled = []
        for group, (fit, prepared) in zip(several, asked, strict=True):
            read = [next(answers) for _ in prepared]
            found = verdicts(fit, read, settings=self.settings, judge=self.name) if read else []
            settled.append(with_dropped(group, fit, found, judge=self.name))
        return settled

    def prepared(self, group: Group) -> tuple[Group, list["Prepared"]]:
        """What of the group fits the model's window, and its questions in tokens, their texts cut
        alike where that makes them fit.
        """
        if not group.comparisons:
            return group, []
        asked, limit = questions(group, settings=self.settings), self.settings.max_chars
        while True:
            found = [self.encoded(question, limit=limit) for question in asked]
            long = [place for place, question in enumerate(found) if question.size > self.room]
            if not long:
                return group, found
            if self.settings.on_overflow == "drop":
                return self.prepared(self.fitting(group, long))
            limit = min(limit, longest_shown(asked)) // 2
            if limit < LEAST_SHOWN:
                return Group(comparisons=()), []

    def fitting(self, group: Group, long: Sequence[int]) -> Group:
        """The group without what the questions at those places settle: of marks, each response's
        pairs; else all of it.
        """
        if self.settings.kind != SCALAR:
            return Group(comparisons=())
        indices = list(group.texts)
        gone = {indices[place] for place in long}
        kept = (c for c in group.comparisons if not gone & {c.first_index, c.second_index})
        return Group(comparisons=tuple(kept))

    def encoded(self, question: Question, *, limit: int) -> "Prepared":
        from align.judge.label_probabilities import label_tokens
        from align.models.chat import render

        template = Template(Path(self.settings.prompt), Path(self.settings.prompts))
        form = question.form
        messages = template.render(question.material, form=form, mode="line", limit=limit)
        turns = told(messages, system=self.system)
        tokens = label_tokens(self.tokenizer, form)
        return Prepared(ids=tuple(render(self.tokenizer, turns)), form=form, room=tokens.longest)

    async def answers(self, asked: Sequence["Prepared"]) -> list[Answer]:
        """The answers in the order of the questions, all of one form."""
        from align.judge.label_probabilities import (
            batches,
            label_tokens,
            probabilities,
            read_batch,
            rows,
        )

        if not asked:
            return []
        tokens = label_tokens(self.tokenizer, asked[0].form)
        numbered = [(i, row) for i, q in enumerate(asked) for row in rows(q.ids, tokens)]
        found: list[dict[str, float]] = [{} for _ in asked]
        sizes = [0] * len(asked)
        for batch in batches([row for _, row in numbered], batch_tokens=self.settings.batch_tokens):
            chosen = [numbered[k][1] for k in batch]
            read = await apart(partial(read_batch, self.model, chosen, tokens))
            for k, logprobs in zip(batch, read, strict=True):
                found[numbered[k][0]] |= logprobs
                sizes[numbered[k][0]] += len(numbered[k][1])
        return [
            answer(probabilities(logprobs, tokens), tokens=size)
            for logprobs, size in zip(found, sizes, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A question in tokens; `room`: how many more the answer takes."""

    ids: tuple[int, ...]
    form: Form
    room: int

    @property
    def size(self) -> int:
        return len(self.ids) + self.room


def answer(probabilities: dict[str, float], *, tokens: int) -> Answer:
    """The likeliest label, or why there is none."""
    if not probabilities:
        reading = Reading(status="failed", why="the model gave no finite numbers")
    else:
        label = max(probabilities, key=lambda name: probabilities[name])
        reading = Reading(status=OK, label=label, probabilities=probabilities)
    return Answer(reading=reading, tokens=tokens)


def longest_shown(asked: Sequence[Question]) -> int:
    """Characters of the longest text in the questions."""
    return max(
        len(text)
        for question in asked
        for text in (
            *(message.content for message in question.material.messages),
            *question.material.responses,
            question.material.reference or "",
        )
    )


def told(messages: Sequence[dict[str, str]], *, system: bool) -> list[Message]:
    """The rendered prompt as turns; as one, for templates that take no system message."""
    kept = messages if system else one_message(messages)
    return [Message(role=m["role"], content=m["content"]) for m in kept]


def load(settings: Local) -> Bench:
    """The model in memory, a hub model at the commit that its verdicts name.

    Raises:
        ConfigError: no such model, or one without a chat template.
    """
    from align.models.identity import pinned
    from align.models.load import load_model, load_tokenizer, window

    try:
        chosen = pinned(settings.model)
        tokenizer = load_tokenizer(chosen)
        model = load_model(chosen)
    except ConfigError as error:  # it speaks of the policy's model
        line = re.sub(r"(?<![\w.])model\.(?=\w+=)", "judge.model.", str(error))
        raise ConfigError(line) from error
    return Bench(
        settings=settings,
        model=model,
        tokenizer=tokenizer,
        name=settings.identity or called(chosen.name, chosen.revision),
        room=window(model),
        system=takes_system(tokenizer),
    )


def called(name: str, revision: str | None) -> str:
    """A folder by its name, a hub model with the first letters of its commit."""
    if Path(name).is_dir():
        return Path(name).absolute().name
    return f"{name}@{(revision or '')[:8]}"


def takes_system(tokenizer: Any) -> bool:
    """Whether the chat template takes a system message before the user's."""
    from align.models.chat import render

    try:
        render(tokenizer, [Message(role=role, content="x") for role in ("system", "user")])
    except DataError:
        return False
    return True
