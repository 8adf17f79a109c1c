"""From a conversation to token ids: through the chat template, cut from the left, hostile text kept harmless."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.errors import ConfigError, DataError
from align.records import Message, Preference

# Put into a special token's text where people or models wrote it, so that it is read as characters.
WORD_JOINER = "\u2060"


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """`ids` [P] up to where the assistant speaks; `cut`: how many tokens were taken off to fit."""

    ids: tuple[int, ...]
    cut: int


@dataclass(frozen=True, kw_only=True)
class EncodedPair:
    """`chosen` and `rejected` [R] include the end of turn unless `completion_cut` tokens were cut off the end."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    prompt_cut: int
    completion_cut: int


def harmless(tokenizer: Any, text: str) -> str:
    """The text with every special token's spelling broken, so that nobody can end a turn or start one from within.

    A word joiner (invisible, no width) goes behind the first character. Text without such spellings is unchanged.
    """
    specials = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special and len(t.content) > 1]
    for special in specials:
        text = text.replace(special, special[0] + WORD_JOINER + special[1:])
    return text


def render(tokenizer: Any, messages: Sequence[Message], *, ask: bool = True) -> list[int]:
    """Token ids of the conversation; with `ask` they end where the assistant is to speak."""
    turns = [{"role": m.role, "content": harmless(tokenizer, m.content)} for m in messages]
    try:
        ids = tokenizer.apply_chat_template(
            turns, add_generation_prompt=ask, tokenize=True, return_dict=True
        )["input_ids"]
    except Exception as error:  # templates raise what they like (roles they do not take, for one)
        raise DataError(f"the chat template refuses a conversation: {str(error).splitlines()[0]}") from error
    return list(ids)


def encode_prompt(
    tokenizer: Any, messages: Sequence[Message], *, max_tokens: int | None = None
) -> EncodedPrompt:
    """The prompt in at most `max_tokens` tokens.

    Too long: the oldest turns go first (a system message stays), then the last turn loses text from its left, so that
    the template stays whole and a question at the end is kept.

    Raises:
        DataError: the template alone does not fit.
    """
    ids = render(tokenizer, messages)
    whole = len(ids)
    if max_tokens is None or whole <= max_tokens:
        return EncodedPrompt(ids=tuple(ids), cut=0)
    kept = list(messages)
    while len(ids) > max_tokens and len(kept) > 1 + (kept[0].role == "system"):
        del kept[kept[0].role == "system"]
        ids = render(tokenizer, kept)
    text = tokenizer.encode(kept[-1].content, add_special_tokens=False)
    drop = 0
    while len(ids) > max_tokens:
        # Cutting between two tokens can change how the rest is split, so it is rendered again until it fits.
        drop += len(ids) - max_tokens
        if drop >= len(text):
            raise DataError(f"a prompt does not fit: its template alone needs more than {max_tokens} tokens")
        rest = tokenizer.decode(text[drop:]).lstrip("\ufffd")
        ids = render(tokenizer, [*kept[:-1], replace(kept[-1], content=rest)])
    return EncodedPrompt(ids=tuple(ids), cut=whole - len(ids))


def end_of_turn(tokenizer: Any) -> int:
    """The special token with which the template closes an assistant's turn, else the end-of-sequence token.

    They differ for some base models (end-of-text against end-of-turn), and a policy trained on the wrong one never stops.

    Raises:
        ConfigError: there is neither.
    """
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    tail = tokenizer.encode(text.rpartition("y")[2].strip(), add_special_tokens=False)
    if tail and tail[0] in tokenizer.added_tokens_decoder and tokenizer.added_tokens_decoder[tail[0]].special:
        return int(tail[0])
    if tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has no end-of-sequence token and its chat template ends no turn with one")
    return int(tokenizer.eos_token_id)


def encode_completion(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The answer's ids and the end of its turn."""
    ids = tokenizer.encode(harmless(tokenizer, text), add_special_tokens=False)
    return (*ids, end_of_turn(tokenizer))


def encode_pair(tokenizer: Any, preference: Preference, *, max_length: int) -> EncodedPair:
    """Both answers to one prompt, prompt + answer in at most `max_length` tokens.

    The prompt gives way first, but keeps a quarter of the window; answers longer than the rest lose their end.
    """
    chosen = encode_completion(tokenizer, preference.chosen)
    rejected = encode_completion(tokenizer, preference.rejected)
    most = max_length - max_length // 4
    kept = [answer[:most] for answer in (chosen, rejected)]
    prompt = encode_prompt(
        tokenizer, preference.messages, max_tokens=max_length - max(len(answer) for answer in kept)
    )
    return EncodedPair(
        prompt=prompt.ids,
        chosen=kept[0],
        rejected=kept[1],
        prompt_cut=prompt.cut,
        completion_cut=len(chosen) - len(kept[0]) + len(rejected) - len(kept[1]),
    )
