"""Trains on pairs from beginning to end: resumes, measures, saves, and keeps the best adapter."""

import math
import os
import shutil
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from align.algorithms import checkpoints
from align.algorithms.pairs import PairData, collate_pairs
from align.algorithms.policy_objective import policy_objective
from align.algorithms.preference_trainer import Objective, PairLoss, Policy, PreferenceTrainer
from align.algorithms.settings import PairTraining, PreferenceTraining
from align.artifacts import COUNTS, write_atomic, write_json
from align.errors import ConfigError, StageError
from align.jsonl import dump_line
from align.progress import progress_bar

GONE = ".checkpoints.done"
OPTIMIZERS = {"adamw": "adamw_torch", "paged_adamw_8bit": "paged_adamw_8bit"}
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}


def fit(
    policy: Policy,
    data: PairData,
    *,
    results: PairLoss,
    settings: PreferenceTraining,
    out: Path,
    remedy: str,
) -> None:
    """Trains a policy by the loss that `results` makes of its log-probabilities, as `minimise`
    does.
    """
    objective = policy_objective(results, settings=settings, seed=data.seed, remedy=remedy)
    minimise(policy, data, objective=objective, settings=settings, out=out, title="train")


def minimise(
    policy: Policy,
    data: PairData,
    *,
    objective: Objective,
    settings: PairTraining,
    out: Path,
    title: str,
) -> None:
    """Writes adapter/, curves.jsonl, metrics.json and counts.json; goes on from the newest whole
    checkpoint.

    Args:
        title: of the progress bar, and before the slash of the metrics' names.

    Raises:
        StageError: fewer pairs than one batch, or the run collapsed.
    """
    check_enough(data, settings)
    folder = out / "checkpoints"
    shutil.rmtree(folder.with_name(GONE), ignore_errors=True)
    if not folder.exists() and (out / "metrics.json").exists():
        return  # killed between its last line and the manifest
    folder.mkdir(exist_ok=True)
    set_seed(data.seed)
    conductor = Conductor(folder, settings, title=title)
    trainer = PreferenceTrainer(
        objective=objective,
        model=policy.model,
        args=arguments(settings, policy, folder, seed=data.seed),
        train_dataset=data.train,
        eval_dataset=data.held_out,
        data_collator=collate_pairs,
        callbacks=[conductor],
    )
    conductor.trainer = trainer
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    if trainer.is_world_process_zero():
        announce(policy, data, trainer.args, settings)
        checkpoints.remove_incomplete(folder)
    trainer.accelerator.wait_for_everyone()
    train(trainer, conductor, folder)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        close(policy, data, folder, out, title=title)
    trainer.accelerator.wait_for_everyone()


def check_enough(data: PairData, settings: PairTraining) -> None:
    if len(data.train) < settings.batch_size:
        raise StageError(
            f"algorithm.batch_size={settings.batch_size}: more than the {len(data.train)} "
            "training pairs, so not "
            f"one step can be made; type algorithm.batch_size={max(1, len(data.train) // 4)}"
        )


def announce(
    policy: Policy, data: PairData, args: TrainingArguments, settings: PairTraining
) -> None:
    """One line on what is trained against which reference, and one where a setting could not be
    kept.
    """
    held_to = f"; reference: {policy.reference}" if policy.reference else ""
    print(f"{len(data.train)} training pairs, {len(data.held_out)} held out{held_to}", flush=True)
    micro = args.per_device_train_batch_size
    if micro < settings.micro_batch_size:
        share = micro * args.gradient_accumulation_steps
        print(
            f"{settings.stands_at}.micro_batch_size={settings.micro_batch_size} does not divide "
            f"the {share} pairs of a process's step; using {micro}",
            flush=True,
        )


def train(trainer: PreferenceTrainer, conductor: "Conductor", folder: Path) -> None:
    """From the newest whole checkpoint to the last step, unless it is the last step's."""
    newest, steps = checkpoints.newest(folder), total_steps(trainer)
    if newest is not None and checkpoints.step_of(newest) >= steps:
        return
    if steps == 1:  # a warm-up of one step, at a rate of 0, would be all there is
        trainer.args.warmup_steps = 0
    try:
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    finally:
        conductor.close()


def total_steps(trainer: PreferenceTrainer) -> int:
    """As Trainer counts them."""
    steps = len(trainer._get_train_sampler()) // trainer.objective.batch_size
    return math.ceil(trainer.args.num_train_epochs * steps)


def micro_batch(settings: PairTraining, processes: int) -> int:
    """Pairs per forward pass: the largest divisor of a process's share that is at most the
    configured one.

    Raises:
        ConfigError: the global batch cannot be shared evenly.
    """
    share, rest = divmod(settings.batch_size, processes)
    if rest or not share:
        raise ConfigError(
            f"algorithm.batch_size={settings.batch_size}: cannot be shared evenly among "
            f"{processes} processes; "
            f"type algorithm.batch_size={processes * (share + 1)}"
        )
    return max(m for m in range(1, min(share, settings.micro_batch_size) + 1) if share % m == 0)


def arguments(
    settings: PairTraining, policy: Policy, folder: Path, *, seed: int
) -> TrainingArguments:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    micro = micro_batch(settings, processes)
    cpu = not torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_size // processes // micro,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=SCHEDULES[settings.schedule],
        warmup_steps=settings.warmup,  # below 1: a share of all steps
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=OPTIMIZERS[settings.optimizer],
        **recomputation(settings.gradient_checkpointing),
        bf16=not cpu and policy.model.dtype == torch.bfloat16,
        logging_steps=1,
        logging_nan_inf_filter=False,  # check_health must see them
        save_strategy="no",  # the conductor says when
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


def recomputation(wanted: bool) -> dict[str, Any]:
    """Gradient checkpointing under the name that the installed transformers has for it."""
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation" if "activation_checkpointing" in known else "gradient"
    if not wanted:
        return {}
    return {
        f"{name}_checkpointing": True,
        f"{name}_checkpointing_kwargs": {"use_reentrant": False},
    }


class Conductor(TrainerCallback):
    """Says when to measure and save, marks whole checkpoints, keeps the newest and the best, and
    shows progress.
    """

    def __init__(self, folder: Path, settings: PairTraining, *, title: str) -> None:
        self.folder, self.settings, self.title = folder, settings, title
        self.trainer: PreferenceTrainer | None = None
        self.due: set[int] = set()
        self.shown = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        parts = self.settings.evaluations
        self.due = {max(1, round(state.max_steps * i / parts)) for i in range(1, parts + 1)}
        if state.is_world_process_zero:
            bar = progress_bar(self.title, state.max_steps, unit="pairs", done=state.global_step)
            self.advance = self.shown.enter_context(bar)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = control.should_save = state.global_step in self.due
        if state.is_world_process_zero:
            self.advance(1, self.settings.batch_size)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.trainer is not None
        self.trainer.accelerator.wait_for_everyone()  # every process's random state is on disk
        if state.is_world_process_zero:
            checkpoints.mark_complete(checkpoints.checkpoint(self.folder, state.global_step))
            kept = checkpoints.newest_and_top(state.log_history)
            checkpoints.keep_only(self.folder, {int(line["step"]) for line in kept})

    def close(self) -> None:
        self.shown.close()


def close(policy: Policy, data: PairData, folder: Path, out: Path, *, title: str) -> None:
    """The best checkpoint's adapter, curves and metrics; then the checkpoints go.

    Everything is read from the last checkpoint, so that a run that was killed here ends like one
    that was not.
    """
    newest = checkpoints.newest(folder)
    assert newest is not None, "the last step is always saved"
    logged = checkpoints.history(newest)
    best = checkpoints.best(logged, pairs=len(data.held_out))
    checkpoints.export_adapter(checkpoints.checkpoint(folder, best["step"]), out / "adapter")
    write_atomic(out / "curves.jsonl", b"".join(dump_line(line) for line in logged).decode())
    write_json(out / COUNTS, {"reference": policy.reference} if policy.reference else {})
    measured = {
        "best_step": best["step"],
        "held_out_accuracy": best["eval_accuracy"],
        "held_out_loss": best["eval_loss"],
        "held_out_margin": best["eval_reward_margin"],
        "held_out_pairs": len(data.held_out),
        "pairs": len(data.train),
        "steps": checkpoints.step_of(newest),
    }
    write_json(out / "metrics.json", {f"{title}/{key}": value for key, value in measured.items()})
    # Renamed first: a folder that stands under this name is always whole.
    gone = folder.with_name(GONE)
    folder.rename(gone)
    shutil.rmtree(gone)
