"""Preferences from a local file: pairs that humans or another system labelled already."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from align.records import Preference
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
    the answer.
    """
    plain = dict(line)
    for key in ("chosen", "rejected"):
        turns = line.get(key)
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            plain[key] = turns[-1].get("content")
            if len(turns) > 1 and "messages" not in plain and "prompt" not in plain:
                plain["messages"] = turns[:-1]
    return plain
