"""Range checks for settings: each raises a `ConfigError` that says what was given and what would
work.
"""

from collections.abc import Sequence
from pathlib import Path

from align.errors import ConfigError


def check_range(
    key: str, value: float, *, low: float, high: float = float("inf"), above: bool = False
) -> None:
    """`low <= value <= high`, or `low < value <= high` with `above`."""
    if value != value or value < low or value > high or (above and value == low):
        lower = f"{'above' if above else 'at least'} {low:g}"
        upper = f" and at most {high:g}" if high != float("inf") else ""
        raise ConfigError(f"{key}={value}: must be {lower}{upper}")


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value}: must be one of {', '.join(choices)}")


def check_file(key: str, path: str | None) -> None:
    if path is not None and not Path(path).exists():
        raise ConfigError(f"{key}={path}: no such file; give the path of an existing one")
