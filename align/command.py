"""What the commands share: Hydra composed once, one line for each mistake, an exit status.

Imports no torch.
"""

import os
import shlex
import sys
from collections.abc import Callable
from typing import Any

# Hydra prints its own multi-line errors and exits unless this is set; then they reach `one_line`
# below.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

import hydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from align.config import CONF, GROUPS, did_you_mean, options, register_resolvers
from align.errors import AlignError, ConfigError
from align.interrupt import STATUS, interrupted, leave, watch
from align.notice import notice

OPTIONS = frozenset(
    ["--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run",
     "--multirun", "--shell-completion", "--config-path", "--config-name", "--config-dir",
     "--experimental-rerun", "--info"]
)  # fmt: skip


def run_command(job: Callable[[], int], *, again: str) -> None:
    """Runs it to its end and leaves. Exit status: 0 done, 1 an error of the user's, 130
    interrupted.

    Args:
        again: what to type to go on after an interrupt.
    """
    watch()
    try:
        status = guarded(job)
    except BaseException as error:
        if not interrupted(error):
            raise
        status = STATUS
    if status == STATUS or (status and interrupted()):
        leave(f"interrupted; what is finished is kept. To go on: {again}")
    sys.exit(status)


def guarded(job: Callable[[], int]) -> int:
    """Its status; an error of the user's is told in one line."""
    try:
        return job()
    except AlignError as error:
        if interrupted():  # an interrupt that a library took for a failure of its own
            raise KeyboardInterrupt from error
        fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        fail(one_line(error))
    except OSError as error:
        fail(broken(error))
    return 1


def typed(module: str) -> str:
    """This command as one types it again."""
    return shlex.join(["python", "-m", module, *sys.argv[1:]])


def composed(job: Callable[[DictConfig], None], *, config: str) -> None:
    """Calls the job with the configuration that the command line says; once for each run of a
    sweep.
    """
    refuse_options(sys.argv[1:])
    refuse_null_groups(sys.argv[1:])
    register_resolvers()
    errors: list[Exception] = []

    def kept(tree: DictConfig) -> None:
        """Hydra would print a heading of its own before an error that reaches it."""
        try:
            job(tree)
        except (AlignError, OSError) as error:
            errors.append(error)

    decorated: Any = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config)
    decorated(kept)()
    if errors:
        raise errors[0]


def has(parent: Any, name: Any, key: str) -> bool:
    """Whether the group of that name has the setting."""
    try:
        return hasattr(parent[name], "keys") and key in parent[name]
    except (TypeError, OmegaConfBaseException):  # no group, or without a value
        return False


def refuse_options(words: list[str]) -> None:
    """
    Raises:
        ConfigError: an option that Hydra does not have; it would print a page on its own.
    """
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("--") and name not in OPTIONS:
            typed = name.removeprefix("--").replace("-", "_")
            raise ConfigError(f"{word}: no such option; settings are typed {typed}=VALUE")


def broken(error: OSError) -> str:
    """A failure of the disk in one line."""
    where = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{where}; what is finished is kept, the same command goes on"


def fail(line: str) -> str:
    notice(f"error: {line}")
    return line


def refuse_null_groups(words: list[str]) -> None:
    """Hydra crashes on them.

    Raises:
        ConfigError: `judge=null` and the like.
    """
    for word in words:
        key, equals, value = word.partition("=")
        group = key.partition("@")[0]
        if equals and value in ("null", "None", "") and (CONF / group).is_dir():
            choices = ", ".join(options(group))
            raise ConfigError(
                f"{word}: {group} is a group and wants a name; type {group}=NAME ({choices})"
            )


def at(node: str) -> str:
    """What chooses a node: the group of its name, or another group that is put there."""
    return f"{GROUPS[node]}@{node}" if node in GROUPS else node


def instead(key: str, none: Any) -> str:
    """What to do about a setting of a group of which none is chosen: it may be another node's, that
    is read from the same group.
    """
    group, _, name = key.rpartition(".")
    root = none._get_root()
    for node in (node for node, of in GROUPS.items() if of == group):
        if has(root, node, name):
            return f"did you mean {node}.{name}?"
    typed = f"judge@{group}" if "." in group else at(group)
    return f"type {typed}=NAME"


def one_line(error: Exception) -> str:
    """Hydra's and OmegaConf's complaints about an override, in one line with what was probably
    meant.
    """
    if isinstance(error, MissingConfigException) and error.missing_cfg_file is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        found = list(error.options or [])
        listed = f" ({', '.join(found)})" if found else ""
        return f"{group}={name}: no such {group}{did_you_mean(name, found) or listed}"
    if isinstance(error, HydraException) and "resolving interpolation" in str(error):
        return "a group that others build on was taken out (~group); swap it with group=NAME"
    cause: BaseException | None = error
    while cause is not None:
        key, parent = getattr(cause, "full_key", None), getattr(cause, "parent_node", None)
        if key and parent is not None and hasattr(parent, "keys"):
            if parent.get("name") == "none":
                return (
                    f"{key}: none is chosen there, and none has no settings; {instead(key, parent)}"
                )
            prefix = key.rpartition(".")[0]
            siblings = [f"{prefix}.{name}" if prefix else str(name) for name in parent]
            deeper = [f"{name}.{key}" for name in parent if has(parent, name, key)]
            known = f"; did you mean {deeper[0]}?" if deeper else did_you_mean(key, siblings)
            return f"{key}: no such setting{known}"
        cause = cause.__cause__
    line = str(error).splitlines()[0]
    if isinstance(error, OverrideParseException):
        line += "; settings are typed key=value"
    return line
