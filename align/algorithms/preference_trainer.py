"""One trainer for everything that learns from pairs: transformers' Trainer, with our batches, loss
and measurements.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Trainer

from align.algorithms.dpo_loss import PairLogprobs
from align.algorithms.pairs import GlobalBatchSampler, collate_pairs
from align.errors import StageError
from align.models.logprobs import default_budget, sequence_logprobs, token_budget_batches


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What is trained, and what it is held to. `reference` says in words which model that is."""

    model: Any
    tokenizer: Any
    reference: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a loss says of a batch: loss and implicit rewards, each [B]."""

    loss: torch.Tensor
    chosen_reward: torch.Tensor
    rejected_reward: torch.Tensor


PairLoss = Callable[[PairLogprobs, torch.Tensor], Results]
Sums = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a run minimises, and when it is given up.

    Attributes:
        results: from log-probabilities and labels p [B] to `Results`.
        batch_size: pairs of an optimizer step, over all processes.
        seed: orders the epochs.
        max_drop: nats per token that chosen answers may lose against the reference.
        remedy: what to type when the run collapses.
    """

    results: PairLoss
    batch_size: int
    seed: int
    max_drop: float
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

    def score(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[PairLogprobs, Results]:
        """Policy log-probabilities of a batch and what the loss makes of them."""
        found = sequence_logprobs(
            model, input_ids=batch["input_ids"], response_mask=batch["response_mask"]
        )
        chosen, rejected = found.chunk(2)
        given = (
            "reference_chosen", "reference_rejected", "chosen_length", "rejected_length", "margin",
        )  # fmt: skip
        pairs = PairLogprobs(
            policy_chosen=chosen, policy_rejected=rejected, **{key: batch[key] for key in given}
        )
        return pairs, self.objective.results(pairs, batch["p"])

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
        pairs, results = self.score(model, inputs)
        add(self.sums, summed(pairs, results))
        share = self.accelerator.num_processes / self.objective.batch_size
        loss = results.loss.sum() * share
        return (loss, results) if return_outputs else loss

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

    def means(self, sums: Sums) -> dict[str, float]:
        """Means over the pairs of all processes; what is lost per token is a mean over tokens."""
        totals = self.accelerator.reduce(
            torch.stack([sums[key] for key in SUMMED]), reduction="sum"
        )
        found = dict(zip(SUMMED, totals.tolist(), strict=True))
        count = found.pop("pairs")
        tokens = {side: found.pop(f"{side}_tokens") for side in SIDES}
        drops = {side: found.pop(f"{side}_drop") for side in SIDES}
        return {
            **{key: value / count for key, value in found.items()},
            "chosen_logps_per_token": found["chosen_logps"] / tokens["chosen"],
            **{f"{side}_drop_per_token": drops[side] / tokens[side] for side in SIDES},
        }

    def check_health(self, logs: dict[str, float]) -> None:
        """Ends a run that cannot recover.

        Raises:
            StageError: the step's measures say so.
        """
        reason = collapsed(logs, max_drop=self.objective.max_drop)
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
        sums = {key: torch.zeros((), device=self.args.device) for key in SUMMED}
        with self.measuring():
            for mine in batches[self.accelerator.process_index :: self.accelerator.num_processes]:
                batch = collate_pairs([rows[i] for i in mine])
                add(sums, summed(*self.score(self.model, self._prepare_inputs(batch))))
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


def collapsed(logs: Mapping[str, float], *, max_drop: float) -> str | None:
    """Why a run cannot recover: numbers that are none, chosen answers that are lost, or a margin
    that runs away because rejected ones are lost without end; None where all is well.
    """
    for key in ("loss", "grad_norm"):
        if not math.isfinite(logs[key]):
            return f"{key} is {logs[key]}"
    for side, times in (("chosen", 1), ("rejected", REJECTED_MAY_DROP)):
        lost = logs[f"{side}_drop_per_token"]
        if lost > times * max_drop:
            allowed = f"{times} times " if times > 1 else ""
            return (
                f"{side} answers lost {lost:.2f} nats per token against the reference "
                f"(more than {allowed}algorithm.max_drop={max_drop:g})"
            )
    return None


SIDES = ("chosen", "rejected")
# Losing rejected answers is the aim, so they may lose this many times what chosen ones may.
REJECTED_MAY_DROP = 5

SUMMED = (
    "pairs",
    "loss",
    "accuracy",
    "reward_margin",
    "chosen_reward",
    "rejected_reward",
    "chosen_logps",
    "rejected_logps",
    "kl",
    "chosen_drop",
    "rejected_drop",
    "chosen_tokens",
    "rejected_tokens",
)


def summed(pairs: PairLogprobs, results: Results) -> Sums:
    """Sums over a batch's pairs, so that means over any split of it come out the same.

    `kl` is the mean of log reference - log policy over both answers: KL(reference || policy) where
    the reference sampled them, a measure of drift where it did not.
    """
    margin = results.chosen_reward - results.rejected_reward
    named = {
        "pairs": torch.ones_like(margin),
        "loss": results.loss,
        "accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),
        "reward_margin": margin,
        "chosen_reward": results.chosen_reward,
        "rejected_reward": results.rejected_reward,
        "chosen_logps": pairs.policy_chosen,
        "rejected_logps": pairs.policy_rejected,
        "kl": -(pairs.chosen_ratio + pairs.rejected_ratio) / 2,
        "chosen_drop": -pairs.chosen_ratio,
        "rejected_drop": -pairs.rejected_ratio,
        "chosen_tokens": pairs.chosen_length,
        "rejected_tokens": pairs.rejected_length,
    }
    return {key: value.detach().sum().float() for key, value in named.items()}


def add(sums: Sums, more: Sums) -> None:
    for key, value in more.items():
        sums[key] = sums[key] + value if key in sums else value
