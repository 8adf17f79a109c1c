"""From a conversation to token ids: through the chat template, cut from the left, hostile text kept
harmless.

What people and models wrote is text: where it spells a special token, that spelling is encoded as
characters, so that nobody can end a turn or start one from within. Limits: added tokens that are
not special (Qwen's <think>) stay tokens; a template that rewrites contents (trims, escapes) is
followed; whatever a template puts between an answer and its end of turn (Llama 2's space before
</s>) is not part of the answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from align.errors import ConfigError, DataError, first_line
from align.records import Message, Preference

PRIVATE_USE = range(0xE000, 0xF900)
ANSWER = "ALIGN0ANSWER"


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """`ids` [P] up to where the assistant speaks; `cut`: how many tokens were taken off to fit."""

    ids: tuple[int, ...]
    cut: int


@dataclass(frozen=True, kw_only=True)
class EncodedPair:
    """`chosen` and `rejected` [R] include the end of turn unless `completion_cut` tokens were cut
    off the end.
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    prompt_cut: int
    completion_cut: int


@dataclass(frozen=True, kw_only=True)
class EncodedAnswers:
    """Several answers to one prompt, [R] each; `cut` tokens of them were taken off to fit."""

    prompt: EncodedPrompt
    answers: Sequence[tuple[int, ...]]
    cut: int


@dataclass(frozen=True, kw_only=True)
class Turn:
    """How a template frames an answer.

    Attributes:
        opening: text of a short conversation up to where the assistant speaks.
        lead: white space that the template puts before an answer.
        end: the token that closes an answer.
    """

    opening: str
    lead: str
    end: int


def encode_prompt(
    tokenizer: Any, messages: Sequence[Message], *, max_tokens: int | None = None
) -> EncodedPrompt:
    """The prompt in at most `max_tokens` tokens.

    Too long: the oldest turns go first (a system message stays), then the last turn loses text from
    its left, so that the template stays whole and a question at the end is kept.

    Raises:
        DataError: the template alone does not fit.
    """
    ids = render(tokenizer, messages)
    whole = len(ids)
    if max_tokens is None or whole <= max_tokens:
        return EncodedPrompt(ids=tuple(ids), cut=0)
    kept = list(messages)
    first = int(kept[0].role == "system")
    while len(ids) > max_tokens and len(kept) > first + 1:
        del kept[first]
        # Many templates want a user's turn first.
        while len(kept) > first + 1 and kept[first].role != "user":
            del kept[first]
        ids = render(tokenizer, kept)
    text = encode_text(tokenizer, kept[-1].content)
    drop = 0
    while len(ids) > max_tokens:
        # Cutting between two tokens can change how the rest is split, so it is rendered again until
        # it fits.
        drop += len(ids) - max_tokens
        if drop >= len(text):
            raise DataError(
                f"a prompt of {whole} tokens does not fit into {max_tokens}: its template alone "
                "is longer; raise data.max_length, or where answers are sampled lower "
                "max_new_tokens"
            )
        rest = tokenizer.decode(text[drop:]).lstrip("\ufffd")
        ids = render(tokenizer, [*kept[:-1], replace(kept[-1], content=rest)])
    return EncodedPrompt(ids=tuple(ids), cut=whole - len(ids))


def encode_completion(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The answer's ids as they stand behind a prompt, and the end of its turn.

    Raises:
        ConfigError: the tokenizer knows no end of turn.
    """
    turn = turn_frame(tokenizer)
    # Encoded behind an opening: some tokenizers put a space before whatever comes first in a text.
    before = encode_text(tokenizer, turn.opening, trusted=True)
    mark = unused_character(turn.opening + text)
    both = encode_marked(tokenizer, turn.opening + turn.lead + guard(tokenizer, text, mark), mark)
    if both[: len(before)] == before:
        return (*both[len(before) :], turn.end)
    return (*encode_text(tokenizer, turn.lead + text), turn.end)


def encode_pair(tokenizer: Any, preference: Preference, *, max_length: int) -> EncodedPair:
    """Both answers to one prompt, prompt + answer in at most `max_length` tokens.

    The prompt gives way first, but keeps a quarter of the window; answers longer than the rest lose
    their end.
    """
    texts = (preference.chosen, preference.rejected)
    found = encode_answers(tokenizer, preference.messages, texts, max_length=max_length)
    return EncodedPair(
        prompt=found.prompt.ids,
        chosen=found.answers[0],
        rejected=found.answers[1],
        prompt_cut=found.prompt.cut,
        completion_cut=found.cut,
    )


def encode_answers(
    tokenizer: Any, messages: Sequence[Message], texts: Sequence[str], *, max_length: int
) -> EncodedAnswers:
    """Answers to one prompt, cut as in `encode_pair`."""
    answers = [encode_completion(tokenizer, text) for text in texts]
    prompt = encode_prompt(tokenizer, messages)
    longest = max(map(len, answers))
    most = max(1, max_length - min(len(prompt.ids), max_length // 4))
    if len(prompt.ids) + longest > max_length:
        room = max_length - min(longest, most)
        prompt = encode_prompt(tokenizer, messages, max_tokens=room)
    cut = sum(max(0, len(answer) - most) for answer in answers)
    return EncodedAnswers(prompt=prompt, answers=[a[:most] for a in answers], cut=cut)


def end_of_turn(tokenizer: Any) -> int:
    """The special token with which the template closes an assistant's turn, else the
    end-of-sequence token.

    They differ for some base models (end-of-text against end-of-turn), and a policy trained on the
    wrong one never stops.

    Raises:
        ConfigError: there is neither.
    """
    return turn_frame(tokenizer).end


def render(tokenizer: Any, messages: Sequence[Message], *, answered: bool = False) -> list[int]:
    """Token ids of the conversation up to where the assistant is to speak; of all that the template
    writes where it is `answered` already.

    Raises:
        DataError: the template does not take such a conversation.
    """
    contents = "".join(message.content for message in messages)
    mark = unused_character(f"{contents}{tokenizer.chat_template}")
    turns = [{"role": m.role, "content": guard(tokenizer, m.content, mark)} for m in messages]
    try:
        text = tokenizer.apply_chat_template(
            turns, add_generation_prompt=not answered, tokenize=False
        )
    except (TemplateError, ValueError, TypeError) as error:
        roles = " → ".join(message.role for message in messages)
        reason = first_line(error)
        raise DataError(
            f"the chat template refuses a conversation of {roles} ({reason}); "
            "mend the prompt's messages or give model.chat_template=FILE"
        ) from error
    return encode_marked(tokenizer, str(text), mark)


def encode_text(tokenizer: Any, text: str, *, trusted: bool = False) -> list[int]:
    """Ids of a text alone; special tokens come about only where the text is `trusted`."""
    if trusted:
        return list(tokenizer.encode(text, add_special_tokens=False))
    mark = unused_character(text)
    return encode_marked(tokenizer, guard(tokenizer, text, mark), mark)


def guard(tokenizer: Any, text: str, mark: str) -> str:
    """The text with `mark` around each spelling of a special token; ordinary text comes back as it
    is.
    """
    for special in special_spellings(tokenizer):
        if special in text:
            parts = text.split(mark)
            # Inside of marks nothing is touched again: a longer spelling may hold a shorter one.
            parts[::2] = [part.replace(special, mark + special + mark) for part in parts[::2]]
            text = mark.join(parts)
    return text


def encode_marked(tokenizer: Any, text: str, mark: str) -> list[int]:
    """Ids of a rendered text in which every second piece between marks is to be read as
    characters.
    """
    ids: list[int] = []
    for i, piece in enumerate(text.split(mark)):
        if piece:
            ids += (
                encode_characters(tokenizer, piece)
                if i % 2
                else encode_text(tokenizer, piece, trusted=True)
            )
    return ids


def encode_characters(tokenizer: Any, piece: str) -> list[int]:
    """Ids of a special token's spelling as ordinary text."""
    ids = list(tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=True))
    if set(ids) & special_ids(tokenizer):  # a tokenizer that does not know the option
        ids = [i for c in piece for i in tokenizer.encode(c, add_special_tokens=False)]
    return ids


def unused_character(text: str) -> str:
    """A private-use character that the text does not have."""
    return next(chr(code) for code in PRIVATE_USE if chr(code) not in text)


@lru_cache(maxsize=8)
def special_tokens(tokenizer: Any) -> dict[int, str]:
    """Special tokens that a text could spell, the longest first. Cached, because asking the
    tokenizer is slow.
    """
    found = {
        int(i): str(token.content)
        for i, token in tokenizer.added_tokens_decoder.items()
        if token.special and len(token.content) > 1
    }
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def special_spellings(tokenizer: Any) -> Iterator[str]:
    yield from special_tokens(tokenizer).values()


def special_ids(tokenizer: Any) -> set[int]:
    return set(special_tokens(tokenizer))


def turn_frame(tokenizer: Any) -> Turn:
    """How the tokenizer's template frames an answer.

    Raises:
        ConfigError: the template ends no turn with a special token, and there is no end-of-sequence
        token.
    """
    return _turn_frame(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _turn_frame(tokenizer: Any, template: str) -> Turn:
    asked = [{"role": "user", "content": "x"}]
    answered = [*asked, {"role": "assistant", "content": ANSWER}]
    opening = str(tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False))
    before, _, after = str(tokenizer.apply_chat_template(answered, tokenize=False)).partition(
        ANSWER
    )
    lead = before.removeprefix(opening) if before.startswith(opening) else ""
    tail = encode_text(tokenizer, after.strip(), trusted=True)
    end = tail[0] if tail and tail[0] in special_ids(tokenizer) else tokenizer.eos_token_id
    if end is None:
        raise ConfigError(
            "the tokenizer has no end-of-sequence token and its chat template ends no turn with a "
            "special one, so "
            "answers would never stop; give model.chat_template=FILE with a template that ends "
            "turns"
        )
    # More than white space (an empty block of thoughts, say) is for the model to write.
    return Turn(opening=opening, lead=lead if lead.isspace() else "", end=int(end))
