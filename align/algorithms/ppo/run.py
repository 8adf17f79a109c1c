"""A PPO run as a whole: put together, resumed, brought to its end."""

from contextlib import ExitStack
from pathlib import Path

from align.algorithms.online import Calibration, Online, announce, open_source, saved_calibration
from align.algorithms.ppo import state
from align.algorithms.ppo.learner import Learner
from align.algorithms.ppo.monitor import monitor_of
from align.algorithms.ppo.setup import add_policy, add_value, optimizer_of
from align.algorithms.ppo.trainer import Trainer
from align.algorithms.ppo.warned import Warned
from align.algorithms.settings import Ppo
from align.errors import StageError
from align.models.roles import Roles
from align.process_group import Ranks, open_ranks
from align.progress import progress_bar


def run(online: Online, *, settings: Ppo, out: Path) -> None:
    """From the newest checkpoint to the last iteration.

    Raises:
        ConfigError, StageError: what is asked for cannot work, or the run cannot recover.
    """
    if (out / "metrics.json").exists():  # killed between its last line and the manifest
        (out / state.STATE).unlink(missing_ok=True)
        return
    ranks = open_ranks()
    trainer = made(online, settings=settings, out=out, ranks=ranks)
    trainer.begin()
    if ranks.first:
        announce(online, trainer.source, trainer.calibration, settings=settings)
    with ExitStack() as shown:
        bar = progress_bar("train", settings.iterations, unit="answers", done=trainer.iteration)
        advance = shown.enter_context(bar) if ranks.first else None
        for iteration in range(trainer.iteration, settings.iterations):
            note = trainer.iterate(iteration)
            if advance is not None:
                advance(1, settings.prompts * settings.samples, note)
    trainer.close()


def made(online: Online, *, settings: Ppo, out: Path, ranks: Ranks) -> Trainer:
    """Everything as it is before the first iteration.

    Raises:
        StageError: an iteration wants more prompts than there are, or fewer than processes.
    """
    if settings.prompts > len(online.questions):
        raise StageError(
            f"algorithm.prompts={settings.prompts}: more than the {len(online.questions)} prompts "
            f"to train on; type algorithm.prompts={max(1, len(online.questions) // 4)}"
        )
    if settings.prompts < ranks.count:
        raise StageError(
            f"algorithm.prompts={settings.prompts}: fewer than the {ranks.count} processes that "
            f"share them out; type algorithm.prompts={ranks.count}"
        )
    roles = Roles(online.base)
    source = open_source(online, roles, reward=settings.reward, budget=settings.micro_batch_tokens)
    calibration = saved_calibration(online, reward=settings.reward)
    add_policy(roles, online)
    add_value(roles, online, settings, calibration if settings.calibrate else None)
    if settings.gradient_checkpointing:
        roles.recompute()
    optimizer = optimizer_of(roles, settings)
    return Trainer(
        online=online,
        settings=settings,
        out=out,
        ranks=ranks,
        roles=roles,
        source=source,
        calibration=(calibration if settings.calibrate else None) or Calibration(),
        calibrating=settings.calibrate and calibration is None,
        beta=settings.beta,
        warned=Warned(out),
        learner=Learner(
            roles=roles, settings=settings, optimizer=optimizer, ranks=ranks, seed=online.seed
        ),
        monitor=monitor_of(online, roles, source, settings=settings),
    )
