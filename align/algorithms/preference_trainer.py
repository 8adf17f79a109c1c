"""One trainer for everything that learns from pairs: transformers' Trainer, with our batches, loss and checkpoints."""

import json
import math
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from align.algorithms.dpo_loss import PairLogprobs
from align.algorithms.pairs import GlobalBatchSampler, PairData, PairRows, collate_pairs
from align.algorithms.settings import PreferenceTraining
from align.artifacts import write_atomic, write_json
from align.errors import ConfigError, StageError
from align.jsonl import dump_line
from align.models.logprobs import sequence_logprobs
from align.progress import progress_bar

COMPLETE = "complete"
OPTIMIZERS = {"adamw": "adamw_torch", "paged_adamw_8bit": "paged_adamw_8bit"}


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


class PreferenceTrainer(Trainer):  # type: ignore[misc]
    """Trainer over pre-tokenized pairs. Its loss is the mean over a global batch, however that is split."""

    def __init__(self, *, results: PairLoss, seed: int, batch_size: int, max_drop: float, remedy: str, **rest: Any):
        super().__init__(**rest)
        self.results, self.pair_seed, self.pairs_per_step = results, seed, batch_size
        self.max_drop, self.remedy = max_drop, remedy
        self.sums: dict[str, torch.Tensor] = {}
        # compute_loss divides by the pairs of the whole step itself, so Trainer must not divide again.
        self.model_accepts_loss_kwargs = True

    def _get_train_sampler(self, train_dataset: Any = None) -> GlobalBatchSampler:
        rows: PairRows = train_dataset or self.train_dataset
        return GlobalBatchSampler(
            rows.lengths(),
            batch_size=self.pairs_per_step,
            seed=self.pair_seed,
            epoch=lambda: int((self.state.epoch or 0) + 1e-9),
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Pairs of the optimizer step over all processes."""
        if not batch_samples:
            return None
        count = torch.tensor(sum(len(batch["p"]) for batch in batch_samples), device=device)
        return self.accelerator.gather(count).sum()

    def score(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[PairLogprobs, Results]:
        """Policy log-probabilities of a batch and what the loss makes of them."""
        found = sequence_logprobs(
            model, input_ids=batch["input_ids"], response_mask=batch["response_mask"]
        )
        chosen, rejected = found.chunk(2)
        pairs = PairLogprobs(
            policy_chosen=chosen,
            policy_rejected=rejected,
            **{key: batch[key] for key in ("reference_chosen", "reference_rejected")},
            **{key: batch[key] for key in ("chosen_length", "rejected_length")},
        )
        return pairs, self.results(pairs, batch["p"])

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Sum over pairs / pairs in the global batch; times the processes, whose gradients DDP averages."""
        pairs, results = self.score(model, inputs)
        for key, value in summed(pairs, results).items():
            self.sums[key] = self.sums.get(key, torch.zeros((), device=value.device)) + value
        loss = results.loss.sum() / num_items_in_batch * self.accelerator.num_processes
        return (loss, results) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the step's means over all processes to what Trainer logs, without clock times."""
        if "loss" in logs and self.sums:
            logs |= self.means(self.sums)
            self.sums = {}
            self.check_health(logs)
        super().log(logs)

    def means(self, sums: dict[str, torch.Tensor]) -> dict[str, float]:
        keys = sorted(sums)
        totals = self.accelerator.reduce(torch.stack([sums[key] for key in keys]), reduction="sum")
        found = dict(zip(keys, totals.tolist(), strict=True))
        count, tokens = found.pop("pairs"), found.pop("chosen_tokens")
        drop = found.pop("chosen_drop") / tokens
        return {**{key: value / count for key, value in found.items()}, "chosen_drop_per_token": drop}

    def check_health(self, logs: dict[str, float]) -> None:
        """Raises StageError when the run has collapsed."""
        where = f"training collapsed at step {self.state.global_step}"
        for key in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(key, 0.0)):
                raise StageError(f"{where}: {key} is {logs[key]}; {self.remedy}")
        if logs["chosen_drop_per_token"] > self.max_drop:
            raise StageError(
                f"{where}: chosen answers lost {logs['chosen_drop_per_token']:.2f} nats per token against the "
                f"reference (algorithm.max_drop={self.max_drop:g}); {self.remedy}"
            )

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss, accuracy and margin on the held-out pairs, each process taking its share."""
        rows: PairRows = eval_dataset or self.eval_dataset
        self.model.eval()
        mine = range(self.accelerator.process_index, len(rows), self.accelerator.num_processes)
        size = self.args.per_device_train_batch_size
        sums: dict[str, torch.Tensor] = {}
        for start in range(0, len(mine), size):
            batch = collate_pairs([rows[i] for i in mine[start : start + size]])
            batch = {key: value.to(self.args.device) for key, value in batch.items()}
            for key, value in summed(*self.score(self.model, batch)).items():
                sums[key] = sums.get(key, torch.zeros((), device=value.device)) + value
        if not sums:  # fewer held-out pairs than processes
            sums = {key: torch.zeros((), device=self.args.device) for key in SUMMED}
        metrics = {f"eval_{key}": value for key, value in self.means(sums).items()}
        self.model.train()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


SUMMED = (
    "pairs", "pair_loss", "accuracy", "reward_margin", "chosen_reward", "rejected_reward", "chosen_logps",
    "rejected_logps", "kl", "chosen_drop", "chosen_tokens",
)  # fmt: skip


def summed(pairs: PairLogprobs, results: Results) -> dict[str, torch.Tensor]:
    """Sums over a batch's pairs, so that means over any split of it come out the same.

    `kl` is the mean of log reference - log policy over both answers: KL(reference || policy) where the reference
    sampled them, a measure of drift where it did not.
    """
    margin = results.chosen_reward - results.rejected_reward
    named = {
        "pairs": torch.ones_like(margin),
        "pair_loss": results.loss,
        "accuracy": (margin > 0).float() + 0.5 * (margin == 0).float(),
        "reward_margin": margin,
        "chosen_reward": results.chosen_reward,
        "rejected_reward": results.rejected_reward,
        "chosen_logps": pairs.policy_chosen,
        "rejected_logps": pairs.policy_rejected,
        "kl": -(pairs.chosen_ratio + pairs.rejected_ratio) / 2,
        "chosen_drop": -pairs.chosen_ratio,
        "chosen_tokens": pairs.chosen_length,
    }
    return {key: value.detach().sum().float() for key, value in named.items()}


class Conductor(TrainerCallback):  # type: ignore[misc]
    """Says when to measure and save, marks whole checkpoints, keeps the newest and the best, and shows progress."""

    def __init__(self, folder: Path, *, evaluations: int, pairs_per_step: int) -> None:
        self.folder, self.evaluations, self.pairs = folder, evaluations, pairs_per_step
        self.trainer: PreferenceTrainer | None = None
        self.shown = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        total = state.max_steps
        self.due = {round(total * (i + 1) / self.evaluations) for i in range(self.evaluations)} - {0}
        if state.is_world_process_zero:
            bar = progress_bar("train", total, unit="pairs", done=state.global_step)
            self.advance = self.shown.enter_context(bar)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = control.should_save = state.global_step in self.due
        if state.is_world_process_zero:
            self.advance(1, self.pairs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.trainer.accelerator.wait_for_everyone()  # every rank's random state is on disk
        if state.is_world_process_zero:
            (self.folder / f"checkpoint-{state.global_step}" / COMPLETE).touch()
            best, newest = best_step(state.log_history), state.global_step
            for path in self.folder.glob("checkpoint-*"):
                if path.name not in (f"checkpoint-{best}", f"checkpoint-{newest}"):
                    shutil.rmtree(path)

    def close(self) -> None:
        self.shown.close()


def best_step(history: list[dict[str, Any]]) -> int:
    """The step with the highest held-out accuracy; the lower held-out loss breaks ties."""
    measured = [line for line in history if "eval_accuracy" in line]
    best = max(measured, key=lambda line: (line["eval_accuracy"], -line["eval_pair_loss"]))
    return int(best["step"])


def remove_incomplete(folder: Path) -> None:
    """Removes checkpoints whose writing was cut short."""
    for path in folder.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)


def newest_checkpoint(folder: Path) -> Path | None:
    found = {int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*")}
    return found[max(found)] if found else None


def micro_batch(settings: PreferenceTraining, processes: int) -> int:
    """Pairs per forward pass: the largest divisor of a process's share that is at most the configured one.

    Raises:
        ConfigError: the global batch cannot be shared evenly.
    """
    share, rest = divmod(settings.batch_size, processes)
    if rest or not share:
        raise ConfigError(
            f"algorithm.batch_size={settings.batch_size}: cannot be shared evenly among {processes} processes; "
            f"type algorithm.batch_size={processes * (share + 1)}"
        )
    return max(m for m in range(1, min(share, settings.micro_batch_size) + 1) if share % m == 0)


def arguments(settings: PreferenceTraining, folder: Path, *, seed: int, bf16: bool) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro = micro_batch(settings, processes)
    cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // processes // micro,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=OPTIMIZERS[settings.optimizer],
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        bf16=bf16,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=[],
        seed=seed,
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and processes > 1 else None,
        ddp_find_unused_parameters=False if processes > 1 else None,
        dataloader_pin_memory=not cpu,
    )


def fit(
    policy: Policy,
    data: PairData,
    *,
    results: PairLoss,
    settings: PreferenceTraining,
    out: Path,
    remedy: str,
) -> None:
    """Trains to the end, from the newest checkpoint if there is one, and keeps the best one's adapter.

    Raises:
        StageError: fewer pairs than one batch, or the run collapsed.
    """
    if len(data.train) < settings.batch_size:
        raise StageError(
            f"algorithm.batch_size={settings.batch_size}: more than the {len(data.train)} training pairs; "
            f"type algorithm.batch_size={max(1, len(data.train) // 4)}"
        )
    folder = out / "checkpoints"
    folder.mkdir(exist_ok=True)
    set_seed(data.seed)
    bf16 = torch.cuda.is_available() and policy.model.dtype == torch.bfloat16
    conductor = Conductor(folder, evaluations=settings.evaluations, pairs_per_step=settings.batch_size)
    trainer = PreferenceTrainer(
        model=policy.model,
        args=arguments(settings, folder, seed=data.seed, bf16=bf16),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        data_collator=collate_pairs,
        callbacks=[conductor],
        results=results,
        seed=data.seed,
        batch_size=settings.batch_size,
        max_drop=settings.max_drop,
        remedy=remedy,
    )
    conductor.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    main = trainer.accelerator.is_main_process
    if main:
        remove_incomplete(folder)
    trainer.accelerator.wait_for_everyone()
    resume = newest_checkpoint(folder)
    try:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    finally:
        conductor.close()
    trainer.accelerator.wait_for_everyone()
    if main:
        keep(policy, data, trainer.state.log_history, settings=settings, folder=folder, out=out)


def keep(
    policy: Policy,
    data: PairData,
    history: list[dict[str, Any]],
    *,
    settings: PreferenceTraining,
    folder: Path,
    out: Path,
) -> None:
    """Curves, metrics, and the best checkpoint's adapter; then the checkpoints go."""
    best = best_step(history)
    skipped = ("train_runtime", "train_loss", "total_flos")
    lines = [dump_line(line) for line in history if not any(key in line for key in skipped)]
    write_atomic(out / "curves.jsonl", b"".join(lines).decode())
    chosen = next(line for line in history if line["step"] == best and "eval_accuracy" in line)
    adapter, source = out / "adapter", folder / f"checkpoint-{best}"
    shutil.rmtree(adapter, ignore_errors=True)
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy2(source / name, adapter / name)
    write_json(
        out / "metrics.json",
        {
            "train/best_step": best,
            "train/held_out_accuracy": chosen["eval_accuracy"],
            "train/held_out_loss": chosen["eval_pair_loss"],
            "train/held_out_pairs": len(data.held_out),
            "train/pairs": len(data.train),
            "train/steps": max(line["step"] for line in history),
        },
    )
    write_atomic(out / "reference.json", json.dumps({"reference": policy.reference}) + "\n")
    shutil.rmtree(folder)
