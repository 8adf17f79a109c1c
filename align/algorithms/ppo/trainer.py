"""Proximal policy optimization, iteration by iteration: sample, score, estimate, learn."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy
import torch

from align.algorithms.online import (
    Calibration,
    Online,
    calibrated,
    calibration_questions,
    check_rewarded,
    turn,
)
from align.algorithms.ppo import state
from align.algorithms.ppo.clock import Clock
from align.algorithms.ppo.experience import (
    POLICY,
    REFERENCE,
    VALUE,
    Experience,
    Passes,
    estimate,
    passes,
    raw_rewards,
    scored,
)
from align.algorithms.ppo.gather import gathered
from align.algorithms.ppo.health import check_hopeful, warnings_of
from align.algorithms.ppo.learner import Learner
from align.algorithms.ppo.loss import next_beta
from align.algorithms.ppo.measures import (
    CURVES,
    SAMPLES,
    TIMING,
    append,
    final_measures,
    measures,
    timing,
    told,
)
from align.algorithms.ppo.monitor import Monitor
from align.algorithms.ppo.rollout import Question, Rollouts, rollout, samples_of, sampling
from align.algorithms.ppo.seeds import derived
from align.algorithms.ppo.setup import set_learning_rates
from align.algorithms.ppo.warned import Warned
from align.algorithms.settings import Ppo
from align.artifacts import COUNTS, write_json
from align.jsonl import truncate_lines
from align.models.roles import Roles
from align.process_group import Ranks
from align.rewards.source import Sample, Source


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
    clock: Clock = field(default_factory=Clock)

    def begin(self) -> None:
        """Goes on from the checkpoint, else calibrates the rewards on the reference's answers."""
        found = state.load_state(
            self.out / state.STATE, roles=self.roles,
            optimizer=self.learner.optimizer, rank=self.ranks.index,
        )  # fmt: skip
        if found is not None:
            self.iteration, self.beta = found["iteration"], found["beta"]
            self.history = found["history"]
            self.calibration = Calibration(**found["calibration"])
        elif self.calibrating:
            self.calibration = self.calibrate()
            self.clock.clear()
        if self.ranks.first:
            for name in (CURVES, SAMPLES, TIMING):
                if (self.out / name).exists():
                    truncate_lines(self.out / name, found["lines"][name] if found else 0)
            self.warned.go_on_from(self.iteration)
        self.ranks.wait()

    def calibrate(self) -> Calibration:
        """On the reference's answers to some prompts, each process its share."""
        asked = calibration_questions(
            self.online, samples=self.settings.samples, least=self.ranks.count
        )
        mine, first = self.share(asked)
        seed = derived(self.online.seed, "calibrate")
        drawn = self.drawn(REFERENCE, mine, first, seed=seed)
        samples = samples_of(drawn, mine, self.online.tokenizer, first_group=first)
        raw = torch.cat(self.ranks.gathered(raw_rewards(self.source, samples)))
        return calibrated(raw[~raw.isnan()].tolist(), name=self.source.name)

    # One iteration.

    def iterate(self, iteration: int) -> str:
        """Samples, scores, estimates, learns; returns what stands beside the progress bar."""
        # 1. Answers to this iteration's prompts, each process its share, and their rewards.
        questions = self.questions(iteration)
        experience, samples = self.experience(questions, iteration)
        # 2. What all processes found, shown to all.
        experience = gathered(experience, self.ranks)
        check_rewarded(experience.taught, reward=self.source.name)
        with self.clock.timed("learn"):
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
        check_hopeful(measured, iteration + 1, settings=self.settings)
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

    def share(self, questions: Sequence[Question]) -> tuple[list[Question], int]:
        """This process's questions, and the place of the first of them."""
        places = numpy.array_split(numpy.arange(len(questions)), self.ranks.count)[self.ranks.index]
        return [questions[i] for i in places], int(places[0]) if len(places) else 0

    @torch.no_grad()
    def drawn(self, role: str, questions: Sequence[Question], first: int, *, seed: int) -> Rollouts:
        """Answers of a role."""
        with self.clock.timed("generate"), self.roles.role(role) as model:
            return rollout(
                model, self.online.tokenizer, questions, first_group=first, seed=seed,
                settings=sampling(self.settings, n=self.settings.samples),
            )  # fmt: skip

    def experience(
        self, questions: Sequence[Question], iteration: int
    ) -> tuple[Experience, list[Sample]]:
        """This process's share of the answers, scored."""
        mine, first = self.share(questions)
        seed = derived(self.online.seed, "rollout", iteration)
        drawn = self.drawn(POLICY, mine, first, seed=seed)
        with self.clock.timed("score"):
            seen = passes(self.roles, drawn, settings=self.settings)
        samples = samples_of(drawn, mine, self.online.tokenizer, first_group=first)
        with self.clock.timed("reward"):
            raw = raw_rewards(self.source, self.known(samples, seen))
        found = scored(drawn, seen, raw, calibration=self.calibration, settings=self.settings)
        return found, samples

    def known(self, samples: list[Sample], seen: Passes) -> list[Sample]:
        """With what the reference, which is the bare base, says of them at temperature 1: an
        implicit reward then need not ask it again.
        """
        if self.settings.temperature != 1.0:
            return samples
        said = seen.reference_logprobs.sum(-1).tolist()
        return [replace(s, base_logprob=v) for s, v in zip(samples, said, strict=True)]

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
            with self.clock.timed("watch"):
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
        due = self.iteration % self.settings.checkpoint_every == 0
        last = self.iteration == self.settings.iterations
        random_states = self.ranks.gathered(state.random_state()) if due or last else []
        if self.ranks.first:
            append(self.out / CURVES, [{"step": self.iteration, **measured}])
            few = self.settings.logged_samples
            append(self.out / SAMPLES, told(samples, experience, step=self.iteration, few=few))
            append(self.out / TIMING, [timing(self.clock, experience, step=self.iteration)])
            if random_states:
                self.save(random_states)
        self.clock.clear()

    def save(self, random_states: Sequence[torch.Tensor]) -> None:
        state.save_state(
            self.out / state.STATE,
            roles=self.roles, optimizer=self.learner.optimizer, random_states=random_states,
            progress={
                "iteration": self.iteration,
                "beta": self.beta,
                "history": self.history,
                "calibration": self.calibration.to_json(),
                "lines": {n: count_lines(self.out / n) for n in (CURVES, SAMPLES, TIMING)},
            },
        )  # fmt: skip

    def close(self) -> None:
        """The policy, the value function and the last measures; then the checkpoint goes."""
        if self.ranks.first:
            self.roles.save(POLICY, self.out / "adapter")
            if VALUE in self.roles.bound:
                self.roles.save(VALUE, self.out / "value")
            counts = {"reference": "base model, adapter off", "reward": self.source.name}
            write_json(self.out / COUNTS, counts)
            last = final_measures(
                self.history[-1], settings=self.settings, prompts=len(self.online.questions)
            )
            write_json(self.out / "metrics.json", last)
            (self.out / state.STATE).unlink(missing_ok=True)
        self.ranks.wait()


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
