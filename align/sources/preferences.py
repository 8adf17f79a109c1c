"""Preferences from a local file: pairs that humans or another system labelled already."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.errors import DataError
from align.records import Message, Preference, read_messages
from align.sources.local import records
from align.sources.settings import Source

PROVIDES = Preference


def read(path: Path, *, settings: Source) -> Iterator[Preference]:
    """One pair a row: `messages` or `prompt`, `chosen`, `rejected`, and if known `p` and
    `margin`.
    """

    def from_json(line: Mapping[str, Any], *, number: int = 0) -> Preference:
        return Preference.from_json(last_turns(line), number=number)

    return records(path, from_json)


def last_turns(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """TRL's conversational form too: `chosen` and `rejected` as lists of turns whose last one is
    the answer, the conversation before it given there, or apart, or both.

    Raises:
        DataError: the last turn is not an answer, or the two answer different conversations.
    """
    plain = dict(line)
    contexts = []
    for key in ("chosen", "rejected"):
        turns = line.get(key)
        if not isinstance(turns, list) or not turns or not isinstance(turns[-1], Mapping):
            continue
        if turns[-1].get("role") != "assistant":
            raise DataError(f'the last turn of "{key}" is not the assistant\'s')
        plain[key] = turns[-1].get("content")
        contexts.append(read_messages({"messages": turns[:-1]}) if len(turns) > 1 else ())
    if len(set(contexts)) > 1:
        raise DataError('"chosen" and "rejected" answer different conversations')
    if contexts and contexts[0]:
        if "messages" in plain and plain["messages"] == line.get("chosen"):
            plain.pop("messages")  # of some releases: the answer included
        apart = read_messages(plain) if "messages" in plain or "prompt" in plain else ()
        plain.pop("prompt", None)
        plain["messages"] = [m.to_json() for m in whole(contexts[0], apart)]
    return plain


def whole(context: Sequence[Message], apart: Sequence[Message]) -> list[Message]:
    """The conversation that was answered, where a prompt is given apart too: its beginning, its end
    or all of it, with or without the system turn.

    Raises:
        DataError: it is another one.
    """
    said, known = ([(m.role, m.content.strip()) for m in turns if m.role != "system"]
                   for turns in (context, apart))  # fmt: skip
    if known not in (said[: len(known)], said[len(said) - len(known) :]):
        raise DataError('"chosen" answers another conversation than the prompt')
    system = [] if any(m.role == "system" for m in context) else apart
    return [*(m for m in system if m.role == "system"), *context]
