"""The prompts of held-out preferences: what a policy is evaluated on when there is no test file."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from align.artifacts import write_json
from align.errors import StageError
from align.jsonl import dump_line, read_records
from align.records import Preference, Prompt
from align.split import is_held_out, prompt_key
from align.stages.settings import HoldOutStage


def run(settings: HoldOutStage, inputs: dict[str, Path], out: Path) -> None:
    """Writes prompts.jsonl: each held-out prompt once, in the order of the preferences.

    Raises:
        StageError: the share is so small that no prompt is held out.
    """
    prompts = held_out_prompts(inputs["preferences"] / "preferences.jsonl", settings.share)
    lines = [dump_line(prompt.to_json()) for prompt in islice(prompts, settings.limit)]
    if not lines:
        raise StageError(
            f"algorithm.held_out={settings.share}: holds no prompt out of these; give "
            "pairs of more prompts, or raise it"
        )
    (out / "prompts.jsonl").write_bytes(b"".join(lines))
    write_json(out / "counts.json", {"prompts": len(lines)})


def held_out_prompts(path: Path, share: float) -> Iterator[Prompt]:
    for prompt in distinct_prompts(path):
        if is_held_out(prompt_key(prompt.messages), share):
            yield prompt


def distinct_prompts(path: Path) -> Iterator[Prompt]:
    """The prompts of preferences, each once, in their order."""
    seen: set[str] = set()
    for preference in read_records(path, Preference.from_json):
        key = prompt_key(preference.messages)
        if key not in seen:
            seen.add(key)
            yield Prompt(id=preference.id, messages=preference.messages, meta=preference.meta)
