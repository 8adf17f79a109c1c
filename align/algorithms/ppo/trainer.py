"""Proximal policy optimization, iteration by iteration: sample, score, estimate, learn."""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch

from align.algorithms.online import (
    Calibration,
    Online,
    calibrated,
    open_source,
    saved_calibration,
    turn,
)
from align.algorithms.ppo import state
from align.algorithms.ppo.experience import (
    POLICY,
    REFERENCE,
    VALUE,
    Experience,
    estimate,
    final_scores,
    passes,
)
from align.algorithms.ppo.gather import gathered
from align.algorithms.ppo.health import hopeless, warnings_of
from align.algorithms.ppo.learner import Learner
from align.algorithms.ppo.loss import next_beta
from align.algorithms.ppo.measures import measures, timing, told
from align.algorithms.ppo.monitor import Monitor
from align.algorithms.ppo.rollout import Question, rollout, samples_of, sampling
from align.algorithms.ppo.seeds import derived
from align.algorithms.ppo.setup import add_policy, add_value, optimizer_of, set_learning_rates
from align.algorithms.ppo.warned import Warned
from align.algorithms.settings import Ppo
from align.artifacts import COUNTS, write_json
from align.errors import StageError
from align.jsonl import JsonlAppender, truncate_lines
from align.models.roles import Roles
from align.notice import notice
from align.process_group import Ranks, open_ranks
from align.progress import progress_bar
from align.rewards.source import Sample, Source

CURVES, SAMPLES, TIMING = "curves.jsonl", "samples.jsonl", "timing.jsonl"
CALIBRATED_ON = 256  # answers of the starting policy


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
        announce(trainer)
    shown = progress_bar("train", settings.iterations, unit="answers", done=trainer.iteration)
    with shown as advance:
        for iteration in range(trainer.iteration, settings.iterations):
            note = trainer.iterate(iteration)
            advance(1, settings.prompts * settings.samples, note)
    trainer.close()


def announce(trainer: "Trainer") -> None:
    """One line on what is trained, from what, against what."""
    settings, online = trainer.settings, trainer.online
    value = {"trunk": "head on the policy", "adapter": "adapter of its own", "none": "none"}
    print(
        f"{len(online.questions)} prompts, {len(online.held_out)} watched; reference: base model, "
        f"adapter off; reward: {trainer.source.name}, {trainer.calibration.mean:.3g} ± "
        f"{trainer.calibration.std:.3g} on the reference's answers; value: "
        f"{value[settings.value]}",
        flush=True,
    )
    if settings.top_p < 1 or settings.top_k > 0:
        notice(
            "algorithm.top_p, algorithm.top_k: answers are drawn from a part of the distribution "
            "and scored under the whole of it, so the ratio is biased by what was left out; type "
            "algorithm.top_p=1 algorithm.top_k=0"
        )


def made(online: Online, *, settings: Ppo, out: Path, ranks: Ranks) -> "Trainer":
    """Everything as it is before the first iteration.

    Raises:
        StageError: an iteration wants more prompts than there are.
    """
    if settings.prompts > len(online.questions):
        raise StageError(
            f"algorithm.prompts={settings.prompts}: more than the {len(online.questions)} prompts "
            f"to train on; type algorithm.prompts={max(1, len(online.questions) // 4)}"
        )
    roles = Roles(online.base)
    source = open_source(online, roles, reward=settings.reward)
    calibration = saved_calibration(online, reward=settings.reward)
    add_policy(roles, online)
    add_value(roles, online, settings, calibration)
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
        monitor=Monitor(
            roles=roles,
            tokenizer=online.tokenizer,
            questions=online.held_out[: settings.monitor_prompts],
            source=source,
            judge=online.monitor,
            settings=settings,
            seed=derived(online.seed, "monitor"),
        ),
    )


@dataclass(kw_only=True)
class Trainer:
    """What a run keeps between iterations."""

    online: Online
    settings: Ppo
    out: Path
    ranks: Ranks
    roles: Roles
    source: Source
    calibration: Calibration  # of no effect until it is known
    calibrating: bool
    beta: float
    learner: Learner
    monitor: Monitor
    warned: Warned
    iteration: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    clock: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def begin(self) -> None:
        """Goes on from the checkpoint, else calibrates the rewards on the reference's answers."""
        found = state.load_state(
            self.out / state.STATE, roles=self.roles,
            optimizer=self.learner.optimizer,
        )  # fmt: skip
        if found is not None:
            self.iteration, self.beta = found["iteration"], found["beta"]
            self.history = found["history"]
            self.calibration = Calibration(**found["calibration"])
        elif self.calibrating:
            self.calibration = self.calibrate()
        if self.ranks.first:
            for name in (CURVES, SAMPLES, TIMING):
                if (self.out / name).exists():
                    truncate_lines(self.out / name, found["lines"][name] if found else 0)
            self.warned.go_on_from(self.iteration)
        self.ranks.wait()

    @torch.no_grad()
    def calibrate(self) -> Calibration:
        """Every process measures the same, so that nothing has to be sent."""
        count = math.ceil(CALIBRATED_ON / self.settings.samples)
        few = self.online.questions[:count]
        with self.roles.role(REFERENCE) as model:
            drawn = rollout(
                model, self.online.tokenizer, few, seed=derived(self.online.seed, "calibrate"),
                settings=sampling(self.settings, n=self.settings.samples),
            )  # fmt: skip
        raw = self.source.scores(samples_of(drawn, few, self.online.tokenizer))
        return calibrated(raw, name=self.source.name)

    # One iteration.

    def iterate(self, iteration: int) -> str:
        """Samples, scores, estimates, learns; returns what stands beside the progress bar."""
        # 1. Answers to this iteration's prompts, each process its share, and their rewards.
        questions = self.questions(iteration)
        experience, samples = self.experience(questions, iteration)
        # 2. What all processes found, shown to all.
        experience = gathered(experience, self.ranks)
        with self.timed("learn"):
            # 3. Advantages over all rows, then the epochs.
            estimated = estimate(experience, beta=self.beta, settings=self.settings)
            optimizer = self.learner.optimizer
            rate = set_learning_rates(optimizer, iteration, settings=self.settings)
            learnt = self.learner.learn(experience, estimated, iteration=iteration)
        # 4. Measures, the coefficient of the next iteration, warnings, and what is kept.
        measured = {
            **measures(
                experience, estimated.returns, calibration=self.calibration, settings=self.settings
            ),
            "beta": self.beta,
            "learning_rate": rate,
            **learnt,
        }
        self.history.append(measured)
        self.check(measured, iteration)
        self.beta = self.adapted(measured)
        self.iteration = iteration + 1
        self.watch(measured)
        self.warn()
        self.keep(measured, samples, experience)
        return f"reward {measured['reward']:.3g}, KL {measured['kl']:.2f}"

    def questions(self, iteration: int) -> list[Question]:
        everyone, settings = self.online.questions, self.settings
        places = turn(
            iteration, count=len(everyone), prompts=settings.prompts, seed=self.online.seed
        )
        return [everyone[place] for place in places]

    def experience(
        self, questions: Sequence[Question], iteration: int
    ) -> tuple[Experience, list[Sample]]:
        """This process's share of the answers, scored."""
        share = numpy.array_split(numpy.arange(len(questions)), self.ranks.count)[self.ranks.index]
        mine, first = [questions[i] for i in share], int(share[0]) if len(share) else 0
        with self.timed("generate"), torch.no_grad(), self.roles.role(POLICY) as model:
            drawn = rollout(
                model, self.online.tokenizer, mine, first_group=first,
                settings=sampling(self.settings, n=self.settings.samples),
                seed=derived(self.online.seed, "rollout", iteration),
            )  # fmt: skip
        samples = samples_of(drawn, mine, self.online.tokenizer, first_group=first)
        with self.timed("reward"):
            given = self.source.scores(samples)
        raw = torch.tensor([math.nan if value is None else value for value in given])
        taught = ~raw.isnan()
        scores = final_scores(
            raw.nan_to_num(self.calibration.mean), drawn.ended,
            mean=self.calibration.mean, std=self.calibration.std, settings=self.settings,
        )  # fmt: skip
        with self.timed("score"):
            seen = passes(self.roles, drawn, settings=self.settings)
        return Experience(
            rollouts=drawn, passes=seen, scores=scores, raw=raw, taught=taught
        ), samples

    def check(self, measured: dict[str, float], iteration: int) -> None:
        """
        Raises:
            StageError: the run cannot recover.
        """
        reason = hopeless(measured)
        if reason is not None:
            raise StageError(
                f"training collapsed at iteration {iteration + 1}: {reason}; lower "
                f"algorithm.learning_rate (now {self.settings.learning_rate:g}; try "
                f"{self.settings.learning_rate / 4:g})"
            )

    def adapted(self, measured: dict[str, float]) -> float:
        if self.settings.kl_target is None:
            return self.beta
        return next_beta(
            self.beta, kl=measured["kl"], target=self.settings.kl_target,
            answers=self.settings.prompts * self.settings.samples, horizon=self.settings.kl_horizon,
        )  # fmt: skip

    def watch(self, measured: dict[str, float]) -> None:
        """Held-out prompts, now and then and after the last iteration."""
        due = self.iteration % self.settings.monitor_every == 0 or self.iteration == 1
        last = self.iteration == self.settings.iterations
        if self.ranks.first and self.monitor.questions and (due or last):
            with self.timed("watch"):
                measured |= self.monitor.measure()

    def warn(self) -> None:
        """After the held-out prompts were watched, which tell the most."""
        best = self.calibration.highest
        if self.ranks.first:
            odd = warnings_of(self.history, settings=self.settings, best_reference=best)
            self.warned.tell(odd, step=self.iteration)

    # What is kept.

    def keep(
        self, measured: dict[str, float], samples: Sequence[Sample], experience: Experience
    ) -> None:
        """Lines first, then the checkpoint that counts them."""
        if self.ranks.first:
            append(self.out / CURVES, [{"step": self.iteration, **measured}])
            few = self.settings.logged_samples
            append(self.out / SAMPLES, told(samples, experience, step=self.iteration, few=few))
            append(self.out / TIMING, [timing(self.clock, experience, step=self.iteration)])
            due = self.iteration % self.settings.checkpoint_every == 0
            if due or self.iteration == self.settings.iterations:
                self.save()
        self.clock.clear()

    def save(self) -> None:
        state.save_state(
            self.out / state.STATE,
            roles=self.roles, optimizer=self.learner.optimizer,
            progress={
                "iteration": self.iteration,
                "beta": self.beta,
                "history": self.history,
                "calibration": self.calibration.to_json(),
                "lines": {n: count_lines(self.out / n) for n in (CURVES, SAMPLES, TIMING)},
            },
        )  # fmt: skip

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.clock[phase] += time.perf_counter() - started

    def close(self) -> None:
        """The policy, the value function and the last measures; then the checkpoint goes."""
        if self.ranks.first:
            self.roles.save(POLICY, self.out / "adapter")
            if VALUE in self.roles.bound:
                self.roles.save(VALUE, self.out / "value")
            counts = {"reference": "base model, adapter off", "reward": self.source.name}
            write_json(self.out / COUNTS, counts)
            write_json(self.out / "metrics.json", self.metrics())
            (self.out / state.STATE).unlink(missing_ok=True)
        self.ranks.wait()

    def metrics(self) -> dict[str, float]:
        """Of the last iteration, and how much was sampled."""
        last, settings = self.history[-1], self.settings
        low, high = settings.kl_band
        kept = ("kl", "reward", "entropy", "length", "eos_rate")
        watched = [key for key in last if key.startswith("eval_")]
        return {
            "train/iterations": settings.iterations,
            "train/prompts": len(self.online.questions),
            "train/answers": settings.iterations * settings.prompts * settings.samples,
            "train/kl_in_band": float(low <= last["kl"] <= high),
            **{f"train/{key}": last[key] for key in (*kept, *watched)},
        }


def append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    with JsonlAppender(path) as appender:
        appender.append(lines)


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
