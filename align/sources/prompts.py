"""Prompts from a local file."""

from collections.abc import Iterator
from pathlib import Path

from align.records import Prompt
from align.sources.local import records
from align.sources.settings import Source

PROVIDES = Prompt


def read(path: Path, *, settings: Source) -> Iterator[Prompt]:
    """One prompt a row: `messages`, or a `prompt` string."""
    return records(path, Prompt.from_json)
