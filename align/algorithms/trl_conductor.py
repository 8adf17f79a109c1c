"""Follows a training by one of TRL's trainers: writes down each iteration under PPO's names,
watches held-out prompts, warns, and says when to save.
"""

import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from align.algorithms import checkpoints
from align.algorithms.ppo.health import check_hopeful, warnings_of
from align.algorithms.ppo.measures import CURVES, SAMPLES, TIMING, append
from align.algorithms.ppo.monitor import Monitor
from align.algorithms.ppo.warned import Warned
from align.algorithms.settings import CriticFree
from align.algorithms.trl_answers import Answers
from align.jsonl import read_lines, truncate_lines
from align.progress import progress_bar

# What TRL logs, by our name; RLOO clips whole answers and GRPO tokens.
LOGGED = {
    "policy_loss": "loss",
    "grad_norm": "grad_norm",
    "learning_rate": "learning_rate",
    "clip_fraction": "clip_ratio/region_mean",
}


class Conductor(TrainerCallback):
    """Lines first, then the checkpoint that counts them."""

    def __init__(
        self, *, answers: Answers, monitor: Monitor, folder: Path, out: Path, settings: CriticFree
    ) -> None:
        self.answers, self.monitor = answers, monitor
        self.folder, self.out, self.settings = folder, out, settings
        self.steps = settings.epochs * settings.minibatches
        self.history: list[dict[str, float]] = []
        self.warned = Warned(out)
        self.shown = ExitStack()
        self.started = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()
        if self.answers.ranks.first:
            done = state.global_step // self.steps
            bar = progress_bar("train", self.settings.iterations, unit="answers", done=done)
            self.advance = self.shown.enter_context(bar)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        iteration, rest = divmod(state.global_step, self.steps)
        due = iteration % self.settings.checkpoint_every == 0
        control.should_save = not rest and (due or iteration == self.settings.iterations)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """An iteration is over: its answers, and what TRL says of the steps on them."""
        if "loss" not in logs:
            return  # the end of the training, with clock times
        iteration = state.global_step // self.steps
        measured, some, took = self.answers.told(step=iteration)
        measured |= {"beta": self.settings.beta}
        measured |= {name: float(logs[key]) for name, key in LOGGED.items() if key in logs}
        self.history.append(measured)
        check_hopeful(measured, iteration, settings=self.settings)
        took |= self.watch(measured, iteration)
        if self.answers.ranks.first:
            self.warn(iteration)
            took["iteration_s"] = round(time.perf_counter() - self.started, 4)
            append(self.out / CURVES, [{"step": iteration, **measured}])
            append(self.out / SAMPLES, some)
            append(self.out / TIMING, [took])
            answers = self.settings.prompts * self.settings.samples
            note = f"reward {measured['reward']:.3g}, KL {measured['kl']:.2f}"
            self.advance(1, answers, note)
        self.started = time.perf_counter()

    def watch(self, measured: dict[str, float], iteration: int) -> dict[str, float]:
        """Held-out prompts, now and then and after the last iteration; returns what it took."""
        due = iteration % self.settings.monitor_every == 0 or iteration == 1
        last = iteration == self.settings.iterations
        if not (self.answers.ranks.first and self.monitor.questions and (due or last)):
            return {}
        started = time.perf_counter()
        with self.answers.still():
            measured |= self.monitor.measure()
        return {"watch_s": round(time.perf_counter() - started, 4)}

    def warn(self, iteration: int) -> None:
        best = self.answers.calibration.highest
        odd = warnings_of(self.history, settings=self.settings, best_reference=best)
        self.warned.tell(odd, step=iteration)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.answers.ranks.wait()  # every process's random state is on disk
        if self.answers.ranks.first:
            checkpoints.mark_complete(checkpoints.checkpoint(self.folder, state.global_step))
            checkpoints.keep_only(self.folder, {state.global_step})

    def close(self) -> None:
        self.shown.close()


def go_on_from(conductor: Conductor, done: int) -> list[dict[str, float]]:
    """Cuts the lines that stand behind the checkpoint of step `done`, and returns what the others
    say.
    """
    settings, out = conductor.settings, conductor.out
    iterations = done // conductor.steps
    share = settings.prompts // conductor.answers.ranks.count * settings.samples
    few = min(settings.logged_samples, share)
    for name, each in ((CURVES, 1), (SAMPLES, few), (TIMING, 1)):
        if (out / name).exists():
            truncate_lines(out / name, iterations * each)
    conductor.warned.go_on_from(iterations)
    if not (out / CURVES).exists():
        return []
    return [line for _, line in read_lines(out / CURVES)]


def last_line(path: Path) -> Mapping[str, float]:
    *_, (_, found) = read_lines(path)
    return found
