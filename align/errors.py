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


class StageError(AlignError):
    """A stage cannot go on."""


OWN = re.compile(r"(?:^|(?<=[\s(@+]))judge\.(?=[a-z])")  # a judge's settings, as it speaks of them


@contextlib.contextmanager
def keyed(key: str) -> Iterator[None]:
    """What a judge says of its settings, told as they are typed where it stands:
    evaluate.judge.budget_usd, judge.escalate.model.
    """
    try:
        yield
    except (ConfigError, JudgeError) as error:
        if not hasattr(error, "keyed"):  # by a judge within this one
            error.args = (OWN.sub(lambda _: f"{key}.", str(error)),)
            error.keyed = True  # type: ignore[union-attr]
        raise
