"""Trains with TRL's RLOO or GRPO trainer, on answers that our sampler draws and our sources score.

TRL's advantages, losses, batches and optimizer steps run unchanged. Two of its methods are
replaced, because RLOO has no hook for answers and GRPO's `rollout_func` is called experimental:
`_tokenize_prompts`, so that prompts are the token ids that we made (text cannot smuggle in special
tokens), and `_generate_single_turn`, so that answers come from our sampler, whose noise depends on
(seed, iteration, prompt, sample, position) alone. Two more, because Trainer's would save and load
every adapter of the model: `_save` and `_load_from_checkpoint`. Learning rates go by iteration, as
PPO's (`create_scheduler`).

Deviations from TRL's defaults: prompts in PPO's order; no dropout; adapters in float32 on a
quantized base; the reference is the base, adapter off, and not a copy of the fresh adapter. A
killed run that goes on from its checkpoint ends bit for bit as one that was not killed.
"""

import logging
import os
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import PrinterCallback, ProgressCallback, TrainingArguments

from align.algorithms import checkpoints
from align.algorithms.fit import GONE, OPTIMIZERS
from align.algorithms.online import (
    Calibration,
    Online,
    announce,
    open_source,
    saved_calibration,
    turn,
)
from align.algorithms.ppo.experience import POLICY, REFERENCE
from align.algorithms.ppo.measures import CURVES, final_measures
from align.algorithms.ppo.monitor import monitor_of
from align.algorithms.ppo.setup import share_of_rate
from align.algorithms.settings import CriticFree, divisor
from align.algorithms.trl_answers import Answers
from align.algorithms.trl_conductor import Conductor, go_on_from, last_line
from align.artifacts import COUNTS, read_json, write_json
from align.errors import ConfigError, StageError
from align.models.adapters import WEIGHTS, save_adapter
from align.models.roles import Roles
from align.models.settings import Lora
from align.process_group import PATIENCE, open_ranks

ADAPTER = "default"  # the only name that TRL takes for a policy's adapter
COPY = "ref"  # what TRL calls its copy of it
CALIBRATION = "calibration.json"


class OwnAnswers:
    """What is replaced of TRL's trainers; stands before them among the base classes."""

    answers: Answers
    args: Any
    model: Any
    optimizer: Any
    state: Any

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return self.answers.ask(prompts), None, {}

    def drawn(self) -> list[list[int]]:
        steps = self.answers.settings.epochs * self.answers.settings.minibatches
        return self.answers.draw(self.state.global_step // steps)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_adapter(self.model, Path(output_dir or self.args.output_dir), name=ADAPTER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        state = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        set_peft_model_state_dict(self.model, state, adapter_name=ADAPTER)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        settings = self.answers.settings
        steps, last = settings.epochs * settings.minibatches, settings.iterations - 1
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer if optimizer is None else optimizer,
            lambda step: share_of_rate(min(step // steps, last), settings=settings),
        )
        return self.lr_scheduler

    def create_model_card(self, *given: Any, **named: Any) -> None:
        """None: a checkpoint is nobody's to publish."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: nobody reads it."""
        return 0


def run(
    online: Online, *, settings: CriticFree, out: Path, trainer_class: Any, config: Any, own: Any
) -> None:
    """Writes adapter/, curves.jsonl, samples.jsonl, timing.jsonl, metrics.json and counts.json;
    goes on from the newest whole checkpoint.

    Args:
        trainer_class: TRL's, with `OwnAnswers`; `config`: TRL's class of its arguments.
        own: arguments that only this trainer has.

    Raises:
        ConfigError, StageError: what is asked for cannot work, or the run cannot recover.
    """
    folder = out / "checkpoints"
    shutil.rmtree(folder.with_name(GONE), ignore_errors=True)
    if not folder.exists() and (out / "metrics.json").exists():
        return  # killed between its last line and the manifest
    folder.mkdir(exist_ok=True)
    # It warns of every answer without a reward with all its arguments; we count them.
    logging.getLogger("trl").setLevel(logging.ERROR)
    answers = answers_of(online, settings)
    monitor = monitor_of(online, answers.roles, answers.source, settings=settings)
    conductor = Conductor(
        answers=answers, monitor=monitor, folder=folder, out=out, settings=settings
    )
    trainer = trainer_class(
        model=answers.roles.model,
        reward_funcs=answers.score,
        args=arguments(config, own, online=online, settings=settings, folder=folder),
        train_dataset=rows_of(online, settings),
        processing_class=online.tokenizer,
        callbacks=[conductor],
    )
    trainer.answers = answers
    reclaim(answers.roles)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    train(trainer, conductor)
    if answers.ranks.first:
        close(answers, folder, out)
    answers.ranks.wait()


def answers_of(online: Online, settings: CriticFree) -> Answers:
    """The policy beside whatever the source of rewards needs, on one base; and the source."""
    if settings.prompts > len(online.questions):
        raise StageError(
            f"algorithm.prompts={settings.prompts}: more than the {len(online.questions)} prompts "
            f"to train on; type algorithm.prompts={max(1, len(online.questions) // 4)}"
        )
    if not isinstance(online.adapter, Lora):
        raise ConfigError(
            f"adapter={online.adapter.name}: TRL would load a second whole model as the reference; "
            "type adapter=lora, or algorithm=ppo algorithm.value=none"
        )
    roles = Roles(online.base)
    roles.bind(REFERENCE)
    source = open_source(online, roles, reward=settings.reward, budget=settings.micro_batch_tokens)
    roles.add(ADAPTER, settings=online.adapter, seed=online.seed)
    roles.attach(POLICY, ADAPTER)
    # PEFT's own note of who is at work: TRL goes back to it after each pass of the reference.
    roles.model.set_adapter(ADAPTER)
    roles.switch(ADAPTER)
    return Answers(online=online, settings=settings, roles=roles, source=source, ranks=open_ranks())


def reclaim(roles: Roles) -> None:
    """Undoes what TRL did to the adapters: a copy of the fresh one to serve as reference, which the
    base does at no cost, and bfloat16 on a quantized base, in which small steps round to nothing.
    """
    if COPY in roles.model.peft_config:
        roles.model.delete_adapter(COPY)
    roles.settle(ADAPTER, None, trained=True)


def rows_of(online: Online, settings: CriticFree) -> Dataset:
    """A row for each prompt of each iteration: its place among the questions, as text, because TRL
    takes nothing else for a prompt.
    """
    given = {"count": len(online.questions), "prompts": settings.prompts, "seed": online.seed}
    places = [place for i in range(settings.iterations) for place in turn(i, **given)]
    return Dataset.from_dict({"prompt": [str(place) for place in places]})


def arguments(
    config: Any, own: dict[str, Any], *, online: Online, settings: CriticFree, folder: Path
) -> Any:
    """Our settings in TRL's words. An iteration is one generation, and `epochs` times `minibatches`
    optimizer steps.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    share = answers_a_step(settings, processes)
    longest = max(len(q.ids) for q in online.questions) + settings.max_new_tokens
    micro = divisor(share, most=settings.micro_batch_tokens // longest)
    steps = settings.epochs * settings.minibatches
    cpu = not torch.cuda.is_available()
    return config(
        output_dir=str(folder),
        max_steps=settings.iterations * steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=share // micro,
        steps_per_generation=settings.minibatches * (share // micro),
        num_iterations=settings.epochs,
        num_generations=settings.samples,
        max_completion_length=settings.max_new_tokens,
        temperature=settings.temperature,
        shuffle_dataset=False,
        disable_dropout=True,
        beta=settings.beta,
        epsilon=settings.clip,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        optim=OPTIMIZERS[settings.optimizer],
        **recomputation(settings.gradient_checkpointing),
        bf16=not cpu and online.base.dtype == torch.bfloat16,
        logging_steps=steps,
        logging_nan_inf_filter=False,  # the conductor must see them
        save_strategy="no",  # the conductor says when
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=online.seed,
        use_cpu=cpu,
        ddp_timeout=int(PATIENCE.total_seconds()),
        ddp_backend="gloo" if cpu and processes > 1 else None,
        ddp_find_unused_parameters=False if processes > 1 else None,
        dataloader_pin_memory=not cpu,
        **own,
    )


def answers_a_step(settings: CriticFree, processes: int) -> int:
    """Of each process.

    Raises:
        ConfigError: the batch cannot be shared evenly, or a prompt's answers would be parted.
    """
    if settings.prompts % processes:
        raise ConfigError(
            f"algorithm.prompts={settings.prompts}: cannot be shared evenly among {processes} "
            "processes; type "
            f"algorithm.prompts={processes * (settings.prompts // processes + 1)}"
        )
    answers = settings.prompts // processes * settings.samples
    share, rest = divmod(answers, settings.minibatches)
    if rest:
        raise ConfigError(
            f"algorithm.minibatches={settings.minibatches}: does not divide the {answers} answers "
            "that each process has in an iteration; type "
            f"algorithm.minibatches={divisor(answers, most=settings.minibatches)}"
        )
    return share


def recomputation(wanted: bool) -> dict[str, Any]:
    """Gradient checkpointing under the name that the installed transformers has for it; said either
    way, because TRL switches it on.
    """
    known = {field.name for field in fields(TrainingArguments)}
    name = "activation" if "activation_checkpointing" in known else "gradient"
    options = {"use_reentrant": False} if wanted else None
    return {f"{name}_checkpointing": wanted, f"{name}_checkpointing_kwargs": options}


def train(trainer: Any, conductor: Conductor) -> None:
    """From the newest whole checkpoint to the last step, unless it is the last step's."""
    answers, folder = conductor.answers, conductor.folder
    if answers.ranks.first:
        checkpoints.remove_incomplete(folder)
    answers.ranks.wait()
    newest = checkpoints.newest(folder)
    done = checkpoints.step_of(newest) if newest else 0
    calibrate(answers, folder / CALIBRATION)
    if answers.ranks.first:
        conductor.history = go_on_from(conductor, done)
        announce(answers.online, answers.source, answers.calibration, settings=answers.settings)
    answers.ranks.wait()
    if done >= trainer.args.max_steps:
        return
    try:
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    finally:
        conductor.close()


def calibrate(answers: Answers, path: Path) -> None:
    """As the reward stage or an earlier start of this run found it, else anew."""
    if not answers.settings.calibrate:
        return
    known = saved_calibration(answers.online, reward=answers.settings.reward)
    if known is None and path.exists():
        known = Calibration(**read_json(path))
    answers.calibration = known or answers.calibrate()
    answers.ranks.wait()  # nobody reads a file that the first process is about to write
    if answers.ranks.first:
        write_json(path, answers.calibration.to_json())


def close(answers: Answers, folder: Path, out: Path) -> None:
    """The last checkpoint's adapter and the last line's measures; then the checkpoints go."""
    newest = checkpoints.newest(folder)
    assert newest is not None, "the last iteration is always saved"
    checkpoints.export_adapter(newest, out / "adapter")
    counts = {"reference": "base model, adapter off", "reward": answers.source.name}
    write_json(out / COUNTS, counts)
    last, prompts = last_line(out / CURVES), len(answers.online.questions)
    found = final_measures(last, settings=answers.settings, prompts=prompts)
    write_json(out / "metrics.json", found)
    # Renamed first: a folder that stands under this name is always whole.
    gone = folder.with_name(GONE)
    folder.rename(gone)
    shutil.rmtree(gone)
