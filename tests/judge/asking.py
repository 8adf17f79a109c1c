"""What the tests of the LLM judge share: its settings as YAML gives them, and pairs to judge."""

import asyncio
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from align.config import CONF, plain, read_config, register_resolvers
from align.judge.openai import compare
from align.records import Comparison, Prompt, Verdict

register_resolvers()


def openai_settings(folder: Path, url: str | None = None, **changes: Any) -> Any:
    """The judge `fake` at `url`, with a ledger in `folder`; quick to give up unless told."""
    values = {
        "model": "fake", "base_url": url, "price_in": 1.0, "price_out": 2.0,
        "ledger": folder / "judgments.sqlite", "timeout_s": 5, "concurrency": 16, **changes,
    }  # fmt: skip
    words = [f"judge.{k}={'null' if v is None else v}" for k, v in values.items()]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        tree = plain(compose("config", ["recipe=dpo", "judge=openai", *words]))
    return read_config(tree).judge


def pairs(count: int, *, start: int = 0) -> list[Comparison]:
    """Distinct pairs of which one answer is longer, in turn the first and the second."""
    made = []
    for i in range(start, start + count):
        texts = [f"answer {i}", f"a much longer answer, number {i}"]
        first, second = texts if i % 2 else texts[::-1]
        prompt = Prompt.from_json({"id": str(i), "prompt": f"Question {i}?"})
        made.append(Comparison(prompt=prompt, first=first, second=second))
    return made


def longer(comparison: Comparison) -> float:
    """The right verdict by the fake server's rule: probability that the first is better."""
    return float(len(comparison.first) > len(comparison.second))


def judge_all(comparisons: list[Comparison], settings: Any) -> list[Verdict]:
    async def gathered() -> list[Verdict]:
        return [verdict async for verdict in compare(comparisons, settings=settings)]

    return asyncio.run(gathered())
