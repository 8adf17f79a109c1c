"""Warnings, each told once a run: on the terminal, and in a file for the report."""

from collections.abc import Mapping
from pathlib import Path

from align.jsonl import JsonlAppender, read_lines, repair, truncate_lines
from align.notice import notice

WARNINGS = "warnings.jsonl"


class Warned:
    """What was warned of, in `warnings.jsonl`: lines of step, name and text. No file, no
    warning.
    """

    def __init__(self, out: Path) -> None:
        self.path = out / WARNINGS
        self.names: set[str] = set()

    def go_on_from(self, iteration: int) -> None:
        """Forgets what was warned of after a checkpoint's iteration: it will be met again."""
        if not self.path.exists():
            return
        repair(self.path)
        kept = [line for _, line in read_lines(self.path) if line["step"] <= iteration]
        self.names = {line["name"] for line in kept}
        if kept:
            truncate_lines(self.path, len(kept))
        else:
            self.path.unlink()

    def tell(self, odd: Mapping[str, str], *, step: int) -> None:
        """Of what is odd, that which is new.

        Args:
            odd: warnings by a short name.
        """
        new = {name: text for name, text in odd.items() if name not in self.names}
        if not new:
            return
        for text in new.values():
            notice(f"iteration {step}: {text}")
        self.names |= new.keys()
        with JsonlAppender(self.path) as lines:
            lines.append({"step": step, "name": name, "text": text} for name, text in new.items())
