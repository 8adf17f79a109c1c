"""Trains the policy on its own answers: prompts in, rewards from the source that the algorithm
names.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from align.algorithms.online import Online
from align.algorithms.ppo.rollout import Question
from align.errors import DataError, StageError
from align.jsonl import read_records
from align.models.chat import encode_prompt
from align.models.load import load_model, load_tokenizer, window
from align.named import named_module
from align.notice import notice
from align.records import Prompt
from align.split import is_held_out, prompt_key
from align.stages.hold_out import distinct_prompts
from align.stages.settings import OnlineStage


def run(settings: OnlineStage, inputs: dict[str, Path], out: Path) -> None:
    """Writes what the algorithm writes: adapter/, curves.jsonl, samples.jsonl, metrics.json.

    Raises:
        StageError: no prompt is left to train on, or the window has no room for one.
    """
    algorithm = named_module("align.algorithms", settings.algorithm.name, settings.algorithm.module)
    base, tokenizer = load_model(settings.model), load_tokenizer(settings.model)
    room = room_for_prompts(base, settings)
    train: list[Question] = []
    held_out: list[Question] = []
    cut = 0
    for question, shortened in questions(inputs, tokenizer, room):
        cut += shortened
        key = prompt_key(question.prompt.messages)
        (held_out if is_held_out(key, settings.algorithm.held_out) else train).append(question)
    if not train:
        raise StageError(
            f"algorithm.held_out={settings.algorithm.held_out}: leaves no prompt to train on; give "
            "more prompts"
        )
    if cut:
        notice(f"{cut} prompts of more than {room} tokens lose text from their left")
    reward = inputs["reward"] / "adapter" if "reward" in inputs else None
    online = Online(
        model=settings.model,
        adapter=settings.adapter,
        base=base,
        tokenizer=tokenizer,
        questions=train,
        held_out=held_out,
        reward_model=reward,
        judge=settings.judge,
        monitor=settings.monitor,
        seed=settings.seed,
    )
    algorithm.train(online, settings=settings.algorithm, out=out)


def room_for_prompts(base: Any, settings: OnlineStage) -> int:
    """Tokens that a prompt may have beside the longest answer.

    Raises:
        StageError: none.
    """
    most = min(settings.max_length or window(base), window(base))
    room = most - int(settings.algorithm.max_new_tokens)
    if room < 1:
        raise StageError(
            f"algorithm.max_new_tokens={settings.algorithm.max_new_tokens}: the window is {most} "
            "tokens, which leaves no room for a prompt; lower it"
        )
    return room


def questions(
    inputs: dict[str, Path], tokenizer: Any, room: int
) -> Iterator[tuple[Question, bool]]:
    """Each prompt with its token ids, and whether it was cut to fit."""
    if "prompts" in inputs:
        path = inputs["prompts"] / "prompts.jsonl"
        prompts: Iterator[Prompt] = read_records(path, Prompt.from_json)
    else:
        path = inputs["preferences"] / "preferences.jsonl"
        prompts = distinct_prompts(path)
    for prompt in prompts:
        try:
            encoded = encode_prompt(tokenizer, prompt.messages, max_tokens=room)
        except DataError as error:
            raise DataError(f"{path}: id {prompt.id!r}: {error}") from error
        yield Question(prompt=prompt, ids=encoded.ids), encoded.cut > 0
