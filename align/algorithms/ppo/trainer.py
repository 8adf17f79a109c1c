"""Proximal policy optimization, iteration by iteration: sample, score, estimate, learn."""

import itertools
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
from transformers import get_scheduler

from align.algorithms.online import (
    Calibration,
    Online,
    calibrated,
    open_source,
    saved_calibration,
)
from align.algorithms.ppo import state
from align.algorithms.ppo.advantages import explained_variance, k3, masked_mean
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
from align.algorithms.ppo.monitor import Monitor
from align.algorithms.ppo.rollout import Question, rollout, samples_of, sampling
from align.algorithms.settings import Ppo
from align.artifacts import COUNTS, read_json, write_json
from align.errors import StageError
from align.jsonl import JsonlAppender, truncate_lines
from align.models.adapters import save_adapter
from align.models.roles import Head, Roles
from align.notice import notice
from align.process_group import Ranks, open_ranks
from align.progress import progress_bar
from align.rewards.source import Sample, Source

CURVES, SAMPLES, TIMING = "curves.jsonl", "samples.jsonl", "timing.jsonl"
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
CALIBRATED_ON = 256  # answers of the starting policy


def run(online: Online, *, settings: Ppo, out: Path) -> None:
    """From the newest checkpoint to the last iteration.

    Raises:
        ConfigError, StageError: what is asked for cannot work, or the run cannot recover.
    """
    if (out / "metrics.json").exists():
        return  # killed between its last line and the manifest
    ranks = open_ranks()
    trainer = made(online, settings=settings, out=out, ranks=ranks)
    trainer.begin()
    if ranks.first:
        announce(trainer)
    shown = progress_bar("train", settings.iterations, unit="answers", done=trainer.iteration)
    with shown as advance:
        for iteration in range(trainer.iteration, settings.iterations):
            told = trainer.iterate(iteration)
            advance(1, settings.prompts * settings.samples, told)
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
    """Roles, source of rewards, optimizer and schedule, as they are before the first iteration."""
    if settings.prompts > len(online.questions):
        raise StageError(
            f"algorithm.prompts={settings.prompts}: more than the {len(online.questions)} prompts "
            f"to train on; type algorithm.prompts={max(1, len(online.questions) // 4)}"
        )
    roles = Roles(online.base)
    roles.bind(REFERENCE)
    source = open_source(online, roles, reward=settings.reward)
    roles.add(POLICY, settings=online.adapter, seed=online.seed)
    calibration = saved_calibration(online, reward=settings.reward)
    add_value(roles, online, settings, calibration)
    if settings.gradient_checkpointing:
        roles.recompute()
    groups = [
        {"params": roles.parameters(name), "lr": rate, "role": name}
        for name, rate in (
            (POLICY, settings.learning_rate), (VALUE, settings.value_learning_rate)
        )
        if name in roles.bound
    ]  # fmt: skip
    optimizer = optimizer_of(settings, groups)
    schedule = get_scheduler(
        SCHEDULES[settings.schedule],
        optimizer,
        num_warmup_steps=math.ceil(settings.warmup * settings.iterations),
        num_training_steps=settings.iterations,
    )
    return Trainer(
        online=online, settings=settings, out=out, ranks=ranks, roles=roles, source=source,
        calibration=calibration if settings.calibrate else Calibration(),
        calibrating=settings.calibrate and calibration is None,
        schedule=schedule, beta=settings.beta,
        learner=Learner(
            roles=roles, settings=settings, optimizer=optimizer, ranks=ranks, seed=online.seed
        ),
        monitor=Monitor(
            roles=roles, tokenizer=online.tokenizer, source=source, judge=online.monitor,
            questions=online.held_out[: settings.monitor_prompts], settings=settings,
            seed=derived(online.seed, "monitor"),
        ),
    )  # fmt: skip


def add_value(roles: Roles, online: Online, settings: Ppo, calibration: Calibration | None) -> None:
    """The value function: a head on the policy's trunk, or an adapter and a head of its own, which
    start as the reward model where that is a role.

    Its head is the reward's in calibrated units, so that at first V behind the end of an answer is
    the answer's score. Without one it starts at 0, the mean of calibrated rewards.
    """
    width = online.base.config.get_text_config().hidden_size
    fresh = Head(torch.zeros(width, device=roles.model.device))
    if settings.value == "trunk":
        roles.attach(VALUE, POLICY, head=fresh)
    elif settings.value == "adapter" and "reward" in roles.bound:
        reward, known = roles.head("reward"), calibration or Calibration()
        head = Head(reward.weight / known.std, bias=(float(reward.bias) - known.mean) / known.std)
        roles.copy(VALUE, "reward", head=head)
    elif settings.value == "adapter":
        roles.add(VALUE, settings=online.adapter, seed=derived(online.seed, "value"), head=fresh)


def optimizer_of(settings: Ppo, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if settings.optimizer == "paged_adamw_8bit":
        from bitsandbytes.optim import PagedAdamW8bit

        paged: torch.optim.Optimizer = PagedAdamW8bit(groups, weight_decay=settings.weight_decay)
        return paged
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay)


def derived(seed: int, *what: Any) -> int:
    """A seed of its own for each use of one."""
    return int(numpy.random.SeedSequence([seed, *map(hashed, what)]).generate_state(1)[0])


def hashed(part: Any) -> int:
    return part if isinstance(part, int) else int.from_bytes(str(part).encode()[:8])


@dataclass(kw_only=True)
class Trainer:
    """What a run keeps between iterations."""

    online: Online
    settings: Ppo
    out: Path
    ranks: Ranks
    roles: Roles
    source: Source
    calibration: Calibration | None
    calibrating: bool
    schedule: Any
    beta: float
    learner: Learner
    monitor: Monitor
    iteration: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)
    clock: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def begin(self) -> None:
        """Goes on from the checkpoint, else calibrates the rewards on the reference's answers."""
        found = state.load_state(
            self.out / state.STATE, roles=self.roles,
            optimizer=self.learner.optimizer, schedule=self.schedule,
        )  # fmt: skip
        if found is not None:
            self.iteration, self.beta = found["iteration"], found["beta"]
            self.history, self.warned = found["history"], set(found["warned"])
            self.calibration = Calibration(**found["calibration"])
        elif self.calibrating:
            self.calibration = self.calibrate()
        if self.ranks.first:
            for name in (CURVES, SAMPLES, TIMING):
                if (self.out / name).exists():
                    truncate_lines(self.out / name, found["lines"][name] if found else 0)
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
            learnt = self.learner.learn(experience, estimated, iteration=iteration)
            self.schedule.step()
        # 4. Measures, warnings, the coefficient of the next iteration, and what is kept.
        measured = self.measure(experience, estimated.returns) | learnt
        self.history.append(measured)
        self.check(measured, iteration)
        self.beta = self.adapted(measured)
        self.iteration = iteration + 1
        self.watch(measured)
        self.keep(measured, samples, experience)
        return f"reward {measured['reward']:.3g}, KL {measured['kl']:.2f}"

    def questions(self, iteration: int) -> list[Question]:
        """This iteration's prompts: the next ones of an endless row of permutations."""
        everyone = self.online.questions
        start = iteration * self.settings.prompts
        found = []
        for place in range(start, start + self.settings.prompts):
            epoch, position = divmod(place, len(everyone))
            order = self.order(epoch)
            found.append(everyone[int(order[position])])
        return found

    def order(self, epoch: int) -> Any:
        generator = numpy.random.default_rng([self.online.seed, epoch])
        return generator.permutation(len(self.online.questions))

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
        assert self.calibration is not None
        scores = final_scores(
            raw.nan_to_num(self.calibration.mean), drawn.ended,
            mean=self.calibration.mean, std=self.calibration.std, settings=self.settings,
        )  # fmt: skip
        with self.timed("score"):
            seen = passes(self.roles, drawn, settings=self.settings)
        return Experience(
            rollouts=drawn, passes=seen, scores=scores, raw=raw, taught=taught
        ), samples

    # What is measured.

    def measure(self, experience: Experience, returns: torch.Tensor) -> dict[str, float]:
        """Of the answers before they were learnt from; the same on every process."""
        mask, seen = experience.rollouts.response_mask(), experience.passes
        count = mask.sum(-1).float()
        kl = experience.kl().sum(-1)
        raw = experience.raw[experience.taught]
        calibration = self.calibration or Calibration()
        far = ((raw - calibration.mean) / calibration.std).abs() > self.settings.reward_clip
        gap = (seen.logprobs - experience.rollouts.sampler_logprobs).abs()
        return {
            "reward": float(raw.mean()) if len(raw) else 0.0,
            "reward_std": float(raw.std(correction=0)) if len(raw) else 0.0,
            "score": float(experience.scores.mean()),
            "clipped_rewards": float(far.float().mean()) if len(raw) else 0.0,
            "taught": float(experience.taught.float().mean()),
            "kl": float(kl.mean()),
            "kl_error": float(kl.std(correction=0) / len(kl) ** 0.5),
            "kl_k3": float((k3(seen.logprobs, seen.reference_logprobs) * mask).sum(-1).mean()),
            "entropy": float(masked_mean(seen.entropies, mask)),
            "explained_variance": explained_variance(seen.values, returns, experience.mask()),
            "length": float(count.mean()),
            "eos_rate": float(experience.rollouts.ended.float().mean()),
            "sampler_gap": float(masked_mean(gap, mask)),
            "beta": self.beta,
            "learning_rate": float(self.learner.optimizer.param_groups[0]["lr"]),
        }

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
        known = self.calibration or Calibration()
        extremes = None if known.highest is None else (known.lowest or 0.0, known.highest)
        odd = warnings_of(self.history, settings=self.settings, reward_range=extremes)
        for name, told in odd.items():
            if self.ranks.first and name not in self.warned:
                notice(f"iteration {iteration + 1}: {told}")
            self.warned.add(name)

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

    # What is kept.

    def keep(
        self, measured: dict[str, float], samples: Sequence[Sample], experience: Experience
    ) -> None:
        """Lines first, then the checkpoint that counts them."""
        if self.ranks.first:
            append(self.out / CURVES, [{"step": self.iteration, **measured}])
            append(self.out / SAMPLES, self.told(samples, experience))
            append(self.out / TIMING, [self.timing(experience)])
            due = self.iteration % self.settings.checkpoint_every == 0
            if due or self.iteration == self.settings.iterations:
                self.save()
        self.clock.clear()

    def save(self) -> None:
        assert self.calibration is not None
        state.save_state(
            self.out / state.STATE,
            roles=self.roles, optimizer=self.learner.optimizer, schedule=self.schedule,
            progress={
                "iteration": self.iteration,
                "beta": self.beta,
                "history": self.history,
                "warned": sorted(self.warned),
                "calibration": self.calibration.to_json(),
                "lines": {n: count_lines(self.out / n) for n in (CURVES, SAMPLES, TIMING)},
            },
        )  # fmt: skip

    def told(self, samples: Sequence[Sample], experience: Experience) -> list[dict[str, Any]]:
        """Some answers with their rewards: from the worst to the best, evenly."""
        scores = experience.scores[: len(samples)]
        order = torch.argsort(scores, stable=True)
        few = min(self.settings.logged_samples, len(samples))
        places = order[torch.linspace(0, len(samples) - 1, few).round().long()] if few else []
        kl = experience.kl().sum(-1)
        return [
            {
                "v": 1,
                "step": self.iteration,
                "id": samples[i].prompt.id,
                "messages": [message.to_json() for message in samples[i].prompt.messages],
                "text": samples[i].text,
                "finish": samples[i].finish,
                "reward": None if math.isnan(raw := float(experience.raw[i])) else raw,
                "score": float(scores[i]),
                "kl": float(kl[i]),
                "tokens": len(samples[i].completion_ids),
            }
            for i in map(int, places)
        ]

    def timing(self, experience: Experience) -> dict[str, Any]:
        """Seconds by phase, the tokens that were worked on, and memory; not the same from run to
        run, so it stands apart.
        """
        answers = sum(len(row.completion) for row in experience.rollouts.rows)
        tokens = sum(len(row) for row in experience.rollouts.rows)
        return {
            "step": self.iteration,
            **{f"{phase}_s": round(seconds, 4) for phase, seconds in self.clock.items()},
            "answer_tokens": answers,
            "tokens": tokens,
            "memory_mb": round(peak_memory() / 2**20),
        }

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
        """The policy's adapter, the value function, and the last measures; then the checkpoint
        goes.
        """
        if self.ranks.first:
            save_adapter(self.roles.model, self.out / "adapter", name=POLICY)
            last = self.history[-1]
            low, high = self.settings.kl_band
            counts = {"reference": "base model, adapter off", "reward": self.source.name}
            write_json(self.out / COUNTS, counts)
            write_json(
                self.out / "metrics.json",
                {
                    "train/iterations": self.settings.iterations,
                    "train/prompts": len(self.online.questions),
                    "train/answers": self.settings.iterations
                    * self.settings.prompts
                    * self.settings.samples,
                    "train/kl": last["kl"],
                    "train/kl_in_band": float(low <= last["kl"] <= high),
                    "train/reward": last["reward"],
                    "train/entropy": last["entropy"],
                    "train/length": last["length"],
                    "train/eos_rate": last["eos_rate"],
                    **{f"train/{k}": v for k, v in last.items() if k.startswith("eval_")},
                },
            )
            (self.out / state.STATE).unlink(missing_ok=True)
        self.ranks.wait()


def append(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    with JsonlAppender(path) as appender:
        appender.append(lines)


def count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


def peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
