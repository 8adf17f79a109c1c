"""Times the phases of our PPO trainer from outside, and within them roles and passes."""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.ppo_setup import saving


class Clock:
    """Seconds of each iteration by phase and, within, by role and pass."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.iterations: list[dict[str, Any]] = []
        self.parts: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.saved = 0

    def hook(self) -> None:
        import torch

        roles, learner = self.trainer.roles, self.trainer.learner
        clock = self.trainer.clock
        enter, phase = roles.role, clock.timed

        @contextmanager
        def role(name: str) -> Iterator[Any]:
            learning = torch.is_grad_enabled()
            with self.part(f"forward {name}" if learning else name), enter(name) as model:
                yield model

        @contextmanager
        def timed(name: str) -> Iterator[None]:
            with phase(name):
                yield
            if name == "generate":  # counted in its phase alone
                self.parts.clear()
                self.counts.clear()

        roles.role, clock.timed = role, timed
        learner.accumulate = self.counted(learner.accumulate)
        learner.optimizer.step = self.timed("step", learner.optimizer.step)
        torch.autograd.backward = self.timed("backward", torch.autograd.backward)

    def iterate(self, iteration: int) -> None:
        self.parts.clear()
        self.counts.clear()
        started = time.perf_counter()
        self.trainer.iterate(iteration)
        whole = time.perf_counter() - started
        lines = (self.trainer.out / "timing.jsonl").read_text().splitlines()
        phases = defaultdict(float, json.loads(lines[-1]))
        seconds = {
            "generation": phases["generate_s"],
            "rollout": phases["reward_s"] + phases["score_s"],
            "optimisation": phases["learn_s"],
        }
        self.iterations.append(
            {
                "seconds": seconds | {"rest": whole - sum(seconds.values())},
                "parts": dict(self.parts),
                "counts": dict(self.counts),
            }
        )

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.parts[name] += time.perf_counter() - started
        self.counts[name] += 1

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any, **more: Any) -> Any:
            with self.part(name):
                return call(*given, **more)

        return timed

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Of the first iteration, which is dropped: the most bytes that are saved for a backward
        pass at one time, for a value adapter's activations come after the policy's went.
        """

        def counted(*given: Any, **more: Any) -> None:
            import torch

            if self.iterations:
                call(*given, **more)
                return
            backward = torch.autograd.backward
            with saving(self.trainer.roles.model.parameters()) as storages:

                def gone(*loss: Any, **more: Any) -> None:
                    self.saved = max(self.saved, sum(storages.values()))
                    backward(*loss, **more)
                    storages.clear()

                torch.autograd.backward = gone
                try:
                    call(*given, **more)
                finally:
                    torch.autograd.backward = backward

        return counted
