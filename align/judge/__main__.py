"""`python -m align.judge`: labels candidates with a judge; status, agreement and canaries.

The sub-command is the first word, taken off before Hydra sees the rest. Imports no torch.
"""

import sys
from collections.abc import Callable

from align.command import run_command, typed
from align.config import did_you_mean
from align.errors import ConfigError


def label() -> int:
    from align.judge_commands.label import command

    return command()


def status() -> int:
    from align.judge_commands.status import command

    return command(sys.argv[1:])


def agreement() -> int:
    from align.judge_commands.agreement import command

    return command()


def canaries() -> int:
    from align.judge_commands.canaries import command

    return command()


COMMANDS: dict[str, Callable[[], int]] = {
    "label": label,
    "status": status,
    "agreement": agreement,
    "canaries": canaries,
}


def chosen() -> Callable[[], int]:
    """The sub-command that the first word names; without one, labelling.

    Raises:
        ConfigError: a first word that is neither a sub-command nor a setting.
    """
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in COMMANDS:
        del sys.argv[1]
        return COMMANDS[word]
    if sys.argv[2:] and sys.argv[2].startswith("="):
        raise ConfigError(f"{word} = …: no blanks stand around =; type {word}=VALUE")
    if word and "=" not in word and not word.startswith(("-", "+", "~")):
        known = ", ".join(COMMANDS)
        raise ConfigError(
            f"{word}: no such sub-command ({known}){did_you_mean(word, COMMANDS)}; settings are "
            "typed key=value"
        )
    return label


def main() -> None:
    again = typed("align.judge")
    run_command(lambda: chosen()(), again=again)


if __name__ == "__main__":
    main()
