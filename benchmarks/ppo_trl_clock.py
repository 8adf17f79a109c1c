"""Times the phases of TRL's PPO trainer from outside, and counts its models' passes."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from benchmarks.ppo_setup import saving

PHASES = ("generation", "rollout", "optimisation", "rest")


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """Seconds of the phases, which are all of an iteration; seconds of some calls within them, and
    how many there were. Generation is counted in its phase alone.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    parts: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)


class Clock:
    """Hooks a trainer, once; `iterations` grows as it trains, and `to(None)` ends the last."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.iterations: list[Iteration] = []
        self.saved = 0
        """Most bytes that a micro-batch of the first iteration saved for its backward."""
        self.phase: str | None = None
        self.since = 0.0

    def to(self, phase: str | None) -> None:
        now = time.perf_counter()
        if self.phase is not None:
            self.iterations[-1].seconds[self.phase] += now - self.since
        if phase == "generation":
            self.iterations.append(Iteration())
        self.phase, self.since = phase, now

    def hook(self) -> None:
        """The boundaries: generation starts and ends with its function; optimisation starts with
        the first micro-batch and ends with the first metric.
        """
        from trl.experimental.ppo import ppo_trainer

        trainer, accelerator = self.trainer, self.trainer.accelerator
        ppo_trainer.batch_generation = self.generation(ppo_trainer.batch_generation)
        accelerator.accumulate = self.micro_batch(accelerator.accumulate)
        accelerator.gather_for_metrics = self.metric(accelerator.gather_for_metrics)
        ppo_trainer.get_reward = self.part(ppo_trainer.get_reward, self.scored)
        ppo_trainer.forward = self.part(ppo_trainer.forward, self.forwarded)
        accelerator.backward = self.part(accelerator.backward, lambda *_: "backward")
        trainer.optimizer.step = self.part(trainer.optimizer.step, lambda *_: "step")
        ppo_trainer.gc = SimpleNamespace(collect=self.part(gc.collect, lambda *_: "gc"))
        trainer.optimizer.optimizer.register_step_post_hook(lambda *_: self.count("real steps"))
        models = {
            "policy": trainer.policy_model.get_base_model(),
            "value": trainer.value_model.base_model,
            "reward": trainer.reward_model.base_model,
        }
        for name, model in models.items():
            model.register_forward_hook(lambda *_, name=name: self.count(f"{name} forwards"))

    def scored(self, model: Any, *_: Any) -> str:
        return "reward" if model is self.trainer.reward_model else "value"

    def forwarded(self, *_: Any) -> str:
        return "reference" if self.phase == "rollout" else "forward"

    def count(self, what: str) -> None:
        if self.phase != "generation":
            counts = self.iterations[-1].counts
            counts[what] = counts.get(what, 0) + 1

    def part(self, call: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def timed(*given: Any, **more: Any) -> Any:
            what, started = name(*given), time.perf_counter()
            result = call(*given, **more)
            took = time.perf_counter() - started
            if self.phase != "generation":
                parts = self.iterations[-1].parts
                parts[what] = parts.get(what, 0.0) + took
                self.count(what)
            return result

        return timed

    def generation(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            self.to("generation")
            result = call(*given)
            self.to("rollout")
            return result

        return timed

    def metric(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            if self.phase == "optimisation":
                self.to("rest")
            return call(*given)

        return timed

    def micro_batch(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @contextmanager
        def timed(model: Any) -> Iterator[None]:
            if self.phase == "rollout":
                self.to("optimisation")
            first = len(self.iterations) == 1  # which is dropped: counting bytes takes time
            with self.saving() if first else nullcontext(), call(model):
                yield

        return timed

    @contextmanager
    def saving(self) -> Iterator[None]:
        with saving(self.trainer.model.parameters()) as storages:
            yield
        self.saved = max(self.saved, sum(storages.values()))
