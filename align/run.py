"""`python -m align.run recipe=dpo`: composes the configuration, checks it and runs the pipeline.
Imports no torch.
"""

import os
from collections.abc import Callable, Mapping

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from align.command import broken, composed, fail, run_command, typed
from align.config import STARTER, Config, plain, read_config
from align.errors import AlignError, ConfigError
from align.interrupt import interrupted
from align.notice import notice
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


def warn_of_tuning(config: Config, choices: Mapping[str, str]) -> None:
    """Says so where another model stands in the starter's place, with what was tuned to that."""
    name = config.model.name
    if choices.get("model") == "starter" and name != str(STARTER / "model"):
        notice(
            f"model.name={name}: trains with the learning rate and the rest that were tuned to the "
            f"starter's small model; for the usual ones type model=hf model.name={name}"
        )


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
            outcomes.append(Outcome(overrides=overrides, error=fail(broken(error))))

    return job


def main() -> None:
    run_command(command, again=typed("align.run"))


def command() -> int:
    """Runs what the command line says; returns the exit status."""
    outcomes: list[Outcome] = []
    refuse_ranks()
    composed(task(outcomes), config="config")
    if len(outcomes) > 1:
        print(comparison_table(outcomes))
    return int(any(outcome.error for outcome in outcomes))


if __name__ == "__main__":
    main()
