"""What can go wrong for a user: one exception tree, one line each.

AlignError
├── ConfigError   a setting is wrong; nothing was started
├── DataError     a file or a record is wrong; it names the file and the line
├── JudgeError    a judge cannot work as asked
└── StageError    a stage cannot go on; what it finished is kept

A message has three parts: what was given, why it cannot work, what to type.
`run.py` prints it without a traceback and exits with a non-zero status.
"""

import contextlib
import re
from collections.abc import Iterator


class AlignError(Exception):
    """Anything that the user can put right."""


class ConfigError(AlignError):
    """A setting is wrong; nothing was started."""


class DataError(AlignError):
    """A file or a record is wrong."""


class JudgeError(AlignError):
    """A judge cannot work as asked."""


class Interrupted(JudgeError):
    """Somebody pressed Ctrl-C."""


class StageError(AlignError):
    """A stage cannot go on."""


@contextlib.contextmanager
def keyed(key: str, *, own: str = "judge") -> Iterator[None]:
    """What is said of settings, told as they are typed where they stand: evaluate.judge.budget_usd,
    judge.escalate.model, reward.learning_rate.

    Args:
        own: what the speaker calls its settings: its group's name.
    """
    try:
        yield
    except (ConfigError, JudgeError, StageError) as error:
        told: frozenset[str] = getattr(error, "keyed", frozenset())
        if own not in told:  # else by one of that group within this one
            name = rf"(?:^|(?<=[\s(@+])){own}\.(?=[a-z])"
            error.args = (re.sub(name, lambda _: f"{key}.", str(error)),)
            error.keyed = told | {own}  # type: ignore[union-attr]
        raise


def first_line(error: Exception) -> str:
    """Of what an error says, or its name where it says nothing."""
    said = str(error).strip()
    return said.splitlines()[0].strip() if said else type(error).__name__
