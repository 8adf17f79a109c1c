"""`python -m align.run recipe=dpo`: composes the configuration, checks it and runs the pipeline.
Imports no torch.
"""

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from typing import Any

# Hydra prints its own multi-line errors and exits unless this is set; then they reach `one_line`
# below.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from align.config import (
    CONF,
    STARTER,
    Config,
    did_you_mean,
    options,
    plain,
    read_config,
    register_resolvers,
)
from align.errors import AlignError, ConfigError
from align.interrupt import STATUS, interrupted, leave, watch
from align.pipeline import Outcome, run_pipeline
from align.sweep import comparison_table

RANK_VARIABLES = ("LOCAL_RANK", "RANK", "WORLD_SIZE")


def refuse_ranks() -> None:
    """Hydra must run once, not once per rank.

    Raises:
        ConfigError: this process was started by torchrun or accelerate.
    """
    if all(variable in os.environ for variable in RANK_VARIABLES):
        raise ConfigError(
            "started under torchrun or accelerate launch, which would run every stage once per "
            "rank; "
            "type python -m align.run … launch=accelerate launch.processes=N"
        )


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


def warn_of_tuning(config: Config, choices: Mapping[str, str]) -> None:
    """Says so where another model stands in the starter's place, with what was tuned to that."""
    name = config.model.name
    if choices.get("model") == "starter" and name != str(STARTER / "model"):
        print(
            f"model.name={name}: trains with the learning rate and the rest that were tuned to the "
            f"starter's small model; for the usual ones type model=hf model.name={name}",
            file=sys.stderr,
        )


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
            prefix = key.rpartition(".")[0]
            siblings = [f"{prefix}.{name}" if prefix else str(name) for name in parent]
            return f"{key}: no such setting{did_you_mean(key, siblings)}"
        cause = cause.__cause__
    return str(error).splitlines()[0]


def task(outcomes: list[Outcome]) -> Callable[[DictConfig], None]:
    """What Hydra calls once per job. An error of the user's is kept, so that in a sweep the other
    jobs still run.
    """

    def job(composed: DictConfig) -> None:
        overrides = list(HydraConfig.get().overrides.task)
        try:
            tree = plain(composed)
            config = read_config(tree)
            warn_of_tuning(config, HydraConfig.get().runtime.choices)
            outcomes.append(run_pipeline(config, tree=tree, overrides=overrides))
        except AlignError as error:
            if interrupted():  # an interrupt that a library took for a failure of its own
                raise KeyboardInterrupt from error
            outcomes.append(Outcome(overrides=overrides, error=fail(str(error))))
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            line = (
                f"{error.strerror or error}{where}; what is finished is kept, the same command "
                "goes on"
            )
            outcomes.append(Outcome(overrides=overrides, error=fail(line)))

    return job


def main() -> None:
    """Exit status: 0 done, 1 an error of the user's, 130 interrupted."""
    watch()
    try:
        status = command()
    except BaseException as error:
        if not interrupted(error):
            raise
        status = STATUS
    if status == STATUS or (status and interrupted()):
        again = shlex.join(["python", "-m", "align.run", *sys.argv[1:]])
        leave(f"interrupted; what is finished is kept. To go on: {again}")
    sys.exit(status)


def command() -> int:
    """Runs what the command line says; returns the exit status."""
    outcomes: list[Outcome] = []
    try:
        refuse_ranks()
        refuse_null_groups(sys.argv[1:])
        register_resolvers()
        decorated: Any = hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
        decorated(task(outcomes))()
    except AlignError as error:
        fail(str(error))
        return 1
    except (HydraException, OmegaConfBaseException) as error:
        fail(one_line(error))
        return 1
    except OSError as error:  # Hydra's own folder of a sweep
        fail(f"{error.filename}: {error.strerror}; give another workspace=DIR")
        return 1
    if len(outcomes) > 1:
        print(comparison_table(outcomes))
    return int(any(outcome.error for outcome in outcomes))


def fail(line: str) -> str:
    print(f"error: {line}", file=sys.stderr, flush=True)
    return line


if __name__ == "__main__":
    main()
