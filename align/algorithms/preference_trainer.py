"""One trainer for everything that learns from pairs: transformers' Trainer, with our batches, loss
and measurements.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer

from align.algorithms.dpo_loss import PairLogprobs
from align.algorithms.pairs import GlobalBatchSampler, collate_pairs
from align.errors import StageError
from align.models.logprobs import default_budget, token_budget_batches


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is trained, and what it is held to. `reference` says in words which model that is, None
    where the loss needs none.
    """

    model: Any
    tokenizer: Any
    reference: str | None


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a loss says of a batch: loss and implicit rewards, each [B]."""

    loss: torch.Tensor
    chosen_reward: torch.Tensor
    rejected_reward: torch.Tensor


PairLoss = Callable[[PairLogprobs, torch.Tensor], Results]
Batch = dict[str, torch.Tensor]
Values = dict[str, torch.Tensor]  # of a batch's pairs by name, [B] each
Sums = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a run minimises, what it measures, and when it is given up.

    Attributes:
        measure: from the model and a batch to what is known of each pair: "loss", which is
            minimised, and all other `names`.
        names: of what is measured, in the order in which processes add it up.
        logged: from sums over the pairs (and "pairs", their number) to what is logged.
        collapsed: why a run cannot recover, from what was logged; None where all is well.
        batch_size: pairs of an optimizer step, over all processes.
        seed: orders the epochs.
        remedy: what to type when the run collapses.
    """

    measure: Callable[[Any, Batch], Values]
    names: Sequence[str]
    logged: Callable[[Mapping[str, float]], dict[str, float]]
    collapsed: Callable[[Mapping[str, float]], str | None]
    batch_size: int
    seed: int
    remedy: str


class PreferenceTrainer(Trainer):
    """Trainer over pre-tokenized pairs; the loss is the mean over a global batch, however split."""

    model: Any
    objective: Objective

    def __init__(self, *, objective: Objective, **rest: Any) -> None:
        super().__init__(**rest)
        self.objective = objective
        self.sums: Sums = {}
        # compute_loss divides by the pairs of the whole step itself, so Trainer must not divide
        # again.
        self.loss_is_scaled_for_ga = True

    def _get_train_sampler(self, train_dataset: Any = None) -> GlobalBatchSampler:
        rows: Any = train_dataset or self.train_dataset
        return GlobalBatchSampler(
            rows.lengths(),
            batch_size=self.objective.batch_size,
            seed=self.objective.seed,
            epoch=lambda: int((self.state.epoch or 0) + 1e-9),
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Sum over pairs / pairs in the global batch; times the processes, whose gradients DDP
        averages.
        """
        values = self.objective.measure(model, inputs)
        add(self.sums, summed(values))
        share = self.accelerator.num_processes / self.objective.batch_size
        loss = values["loss"].sum() * share
        return (loss, values) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: nobody reads it, and Trainer walks all parameters for it on every
        micro-batch.
        """
        return 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the step's means over all processes to what Trainer logs, without clock times."""
        if "grad_norm" in logs and self.sums:
            logs |= self.means(self.sums)
            self.sums = {}
            self.check_health(logs)
        super().log(logs)

    @property
    def summed_names(self) -> list[str]:
        return ["pairs", *self.objective.names]

    def means(self, sums: Sums) -> dict[str, float]:
        """What the objective logs of the pairs of all processes."""
        names = self.summed_names
        totals = self.accelerator.reduce(torch.stack([sums[key] for key in names]), reduction="sum")
        return self.objective.logged(dict(zip(names, totals.tolist(), strict=True)))

    def check_health(self, logs: dict[str, float]) -> None:
        """Ends a run that cannot recover.

        Raises:
            StageError: the step's measures say so.
        """
        reason = self.objective.collapsed(logs)
        if reason is not None:
            raise StageError(
                f"training collapsed at step {self.state.global_step}: {reason}; "
                f"{self.objective.remedy}"
            )

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The same measures on the held-out pairs, each process scoring its share of the
        batches.
        """
        rows: Any = eval_dataset or self.eval_dataset
        lengths = (2 * rows.lengths()).tolist()
        batches = list(token_budget_batches(lengths, budget=default_budget(self.args.device)))
        sums = {key: torch.zeros((), device=self.args.device) for key in self.summed_names}
        with self.measuring():
            for mine in batches[self.accelerator.process_index :: self.accelerator.num_processes]:
                batch = collate_pairs([rows[i] for i in mine])
                values = self.objective.measure(self.model, self._prepare_inputs(batch))
                add(sums, summed(values))
        metrics = {f"eval_{key}": value for key, value in self.means(sums).items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """No gradients, no dropout, the precision of training."""
        self.model.eval()
        try:
            with torch.no_grad(), self.compute_loss_context_manager():
                yield
        finally:
            self.model.train()


def summed(values: Values) -> Sums:
    """Sums over a batch's pairs and their number, so that means over any split of it come out the
    same.
    """
    count = torch.tensor(float(len(values["loss"])), device=values["loss"].device)
    return {"pairs": count, **{key: value.detach().sum().float() for key, value in values.items()}}


def ranked_right(margin: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """1 where chosen stands above rejected, 0.5 where they stand alike or the judge called a tie,
    so that no order is right; [B].
    """
    return torch.where(p == 0.5, 0.5, (margin > 0).float() + 0.5 * (margin == 0).float())


def no_number(logs: Mapping[str, float]) -> str | None:
    """Which of loss and gradient is none, or None."""
    for key in ("loss", "grad_norm"):
        if not math.isfinite(logs[key]):
            return f"{key} is {logs[key]}"
    return None


def add(sums: Sums, more: Sums) -> None:
    for key, value in more.items():
        sums[key] = sums[key] + value if key in sums else value
