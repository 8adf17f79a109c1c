"""Runs TRL 1.12.0's PPO trainer, unmodified, and prints what its phases cost as one line of JSON.

`python benchmarks/ppo_trl.py [--shape 8B-like] [--iterations N] [--dump FILE] …`; the package comes
into a folder of its own (`--overlay`), and a fresh process has it first on its path. `--dump FILE`
writes one small batch instead: rollouts, weights, everything TRL computes from them, and gradients.

What it does differently from us (lines of `trl/experimental/ppo/ppo_trainer.py`, or of
`trl/experimental/utils.py` where that is said):
1. Masks come from `!= pad_token_id` (211, utils 771): with pad = eos the EOS counts nowhere, and a
   pad that the model samples ends the response (727).
2. Old log-probs are those of the sampler's scores (690-703), which are kept over the whole
   vocabulary; no forward of the trainer's gives them, so that the first ratio is 1 in fp32 only.
   The temperature is divided by as T + 1e-7 (622, 713, 822).
3. A response that ended before the last place is a slot longer for the value: the score is added to
   the pad behind EOS (778-779), whose value (of the state behind EOS) counts in GAE and in the
   value loss and its mean (768, 828, 837). Policy terms end with EOS (764, 846). One that fills all
   places has its score on its last token. Masked log-probs are 1.0, so the KL there is 0 (69, 765).
4. `values[:, t]` is predicted by the state before token t (732, 827). Behind the last place the
   value is 0 whether there was an EOS or not (791): what was truncated counts as ended.
5. Without EOS the penalty is subtracted from the model's score, which it does not replace
   (757-759); any EOS id counts, whatever the stop token is.
6. The reward's KL is k1 or k3 (774), k1 by default, of the sampler's log-probs, with a fixed
   coefficient. Scores are neither normalised nor clipped; `whiten_rewards` keeps the mean and
   counts the slot of 3 (783).
7. Advantages are whitened over one rank's batch, with Bessel's correction (251-260, 797).
8. Losses are means over a micro-batch's tokens (837, 846); accumulated, a mean of means.
9. Accumulation counts `gradient_accumulation_steps` micro-batches (460) whatever the minibatches
   are (463, 809): with both there is one step an epoch. On a dataset's last batch accelerate steps
   after every micro-batch, whose loss is divided all the same (4 steps became 16). Here there is
   one or the other, and a batch to spare.
10. `max_grad_norm` is not read: nothing clips. Nor are `gradient_checkpointing` and `bf16`, True by
    default: `train` (604) is not transformers', and its `Accelerator` (460) hears of neither. So
    TRL as shipped and without checkpointing are the same here.
11. The reference is the policy with its adapter off (577-588, 708). Reward and value are two more
    whole models; every weight of the value model trains, in its own dtype, at the policy's learning
    rate (492-496).
12. Modules of dropout are zeroed (489-491), but the policy and the value model stay in train mode
    (639), rollouts included, so a config's `attention_dropout` acts. Ours here is 0.
13. Every epoch permutes rows, not the groups of a prompt (803), by numpy's global generator.
14. Policy and value compute logits for the prompt too, and keep every layer's hidden states and a
    cache of keys and values (214-220, 821).
15. `approxkl` and `ratio` are means over padding too (857, 868). A checkpoint lacks the value model
    (592-593), and `train` takes none up (604).
"""

import argparse
import copy
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import ppo_setup
from benchmarks.ppo_setup import EOS, LORA_TARGETS, Rollouts, resident
from benchmarks.ppo_trl_clock import Clock
from benchmarks.ppo_trl_dump import Dump

TRL = "1.12.0"
SETTINGS = (
    "epochs", "minibatches", "micro", "lora_rank", "dtype", "sample", "seed", "threads", "ppo",
)  # fmt: skip
OVERLAY = Path(__file__).parent / ".cache" / f"trl-{TRL}"


# The process.


def run(arguments: list[str], *, overlay: Path = OVERLAY, threads: int = 2) -> dict[str, Any]:
    """The figures of this script with these arguments, from a fresh process."""
    command, environment = child([*arguments, "--threads", str(threads)], overlay, threads)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(arguments: list[str], overlay: Path, threads: int) -> tuple[list[str], dict[str, str]]:
    """The command that trains, and its environment."""
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--child"]
    return command, ppo_setup.environment(threads, install(overlay))


def install(overlay: Path) -> Path:
    """The folder, with TRL in it and nothing that it depends on."""
    if not (overlay / f"trl-{TRL}.dist-info").is_dir():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--target", str(overlay), f"trl=={TRL}"], check=True, stdout=2)
    return overlay.resolve()


def main() -> int:
    given = parsed()
    if not given.child:
        command, environment = child(sys.argv[1:], given.overlay, given.threads)
        os.execve(command[0], command, environment)  # in place, so that what ends us ends it
    assert importlib.metadata.version("trl") == TRL
    with redirect_stdout(sys.stderr):  # the trainer prints its logs
        found = measured(given)
    print(json.dumps(found))
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=str(__doc__).partition("\n\nWhat")[0],
        formatter_class=argparse.RawTextHelpFormatter,
    )
    ppo_setup.add_shape(parser, "8B-like; smoke with --dump")
    parser.add_argument("--iterations", type=int, default=6, help="the first is dropped")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=1)
    parser.add_argument("--micro", type=int, help="rows a forward, the rest accumulated (all)")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sample", action="store_true", help="generate, rather than given tokens")
    parser.add_argument("--ppo", type=json.loads, default={}, help="JSON of more PPOConfig fields")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dump", type=Path, help="a safetensors file of one batch; no timing")
    parser.add_argument("--even", action="store_true", help="dump answers that fill all places")
    parser.add_argument("--overlay", type=Path, default=OVERLAY, help="where TRL is installed")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return checked(parser, parser.parse_args())


def checked(parser: argparse.ArgumentParser, given: argparse.Namespace) -> argparse.Namespace:
    if given.dump:
        given.iterations, given.ragged = 1, not given.even
    default = "smoke" if given.dump else "8B-like"
    given.sizes = ppo_setup.shape_of(given, default=default)
    given.micro = given.micro or given.sizes.rows
    if given.sizes.rows % given.micro:
        parser.error(
            f"--micro {given.micro} does not divide {given.sizes.rows} rows: give one that does"
        )
    if given.micro < given.sizes.rows and (given.minibatches > 1 or given.dump):
        parser.error(
            "--micro accumulates over the whole batch in TRL: leave --minibatches, --dump out"
        )
    if given.sample and given.sizes.ragged:
        parser.error("--sample never ends a response: leave --ragged and --dump out")
    if given.iterations < 2 and not given.dump:
        parser.error(f"--iterations {given.iterations}: the first is dropped, so give 2 or more")
    return given


# The trainer.


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """Trains with hooks from outside; TRL's own code does all the computing."""
    import torch

    torch.set_num_threads(given.threads)
    shape, batches = given.sizes, given.iterations + (given.dump is None)
    ours = ppo_setup.rollouts(shape, iterations=batches, seed=given.seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = made(given, ours, folder)
        loaded = resident("VmRSS")
        ppo_setup.forget_peak()
        if not given.sample:
            give_rollouts(ours, trainer)
        watch = Clock(trainer) if given.dump is None else Dump(trainer)
        watch.hook()
        trainer.train()
    if isinstance(watch, Dump):
        return watch.write(given.dump, shape, ours)
    watch.to(None)
    return figures(given, trainer, watch, loaded=loaded)


def made(given: argparse.Namespace, ours: Rollouts, folder: str) -> Any:
    import torch
    from peft import LoraConfig
    from transformers import set_seed
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    shape = given.sizes
    settings: dict[str, Any] = {
        "output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "num_sample_generations": 0,
        "per_device_train_batch_size": given.micro, "seed": given.seed,
        "gradient_accumulation_steps": shape.rows // given.micro,
        "num_mini_batches": given.minibatches, "num_ppo_epochs": given.epochs,
        "local_rollout_forward_batch_size": given.micro, "response_length": shape.response,
        "total_episodes": shape.rows * given.iterations,
        "stop_token": "eos" if shape.ragged else None,
    }  # fmt: skip
    reward = ppo_setup.reward_model(shape, seed=given.seed, dtype=given.dtype)
    policy = ppo_setup.language_model(shape, seed=given.seed, dtype=given.dtype)
    # A dump's adapter is not zero at first, or KL and the first log-ratios would be.
    lora = LoraConfig(
        r=given.lora_rank, lora_alpha=2 * given.lora_rank, target_modules=list(LORA_TARGETS),
        init_lora_weights=not given.dump, task_type="CAUSAL_LM",
    )  # fmt: skip
    set_seed(given.seed)
    return PPOTrainer(
        args=PPOConfig(**settings | given.ppo),
        processing_class=SimpleNamespace(pad_token_id=shape.pad, eos_token_id=EOS),
        model=policy,
        ref_model=None,
        reward_model=reward,
        value_model=copy.deepcopy(reward),
        train_dataset=[{"input_ids": prompt} for prompt in ours.prompts],
        data_collator=lambda rows: {"input_ids": torch.stack([r["input_ids"] for r in rows])},
        peft_config=lora,
    )


def give_rollouts(ours: Rollouts, trainer: Any) -> None:
    """Has the trainer take given responses for generated ones, their logits from one forward."""
    import torch
    from trl.experimental.ppo import ppo_trainer

    responses = defaultdict(deque)
    for prompt, response in zip(ours.prompts.tolist(), ours.responses, strict=True):
        responses[tuple(prompt)].append(response)
    temperature, forward = trainer.args.temperature + 1e-7, ppo_trainer.forward

    @torch.no_grad()
    def batch_generation(model: Any, queries: Any, rows: int, pad: int, settings: Any) -> Any:
        answers = torch.stack([responses[tuple(query)].popleft() for query in queries.tolist()])
        both, start = torch.cat((queries, answers), 1), queries.shape[1] - 1
        logits = [forward(model, part, pad).logits[:, start:-1] for part in both.split(rows)]
        return both, torch.cat(logits) / temperature

    ppo_trainer.batch_generation = batch_generation


# Figures.


def figures(
    given: argparse.Namespace, trainer: Any, clock: Clock, *, loaded: int
) -> dict[str, Any]:
    shape, told = given.sizes, ("trl", "torch", "transformers", "peft", "accelerate")
    return {
        "arm": "trl",
        "versions": {name: importlib.metadata.version(name) for name in told},
        "shape": dataclasses.asdict(shape),
        "settings": {name: getattr(given, name) for name in SETTINGS},
        "tokens": {"prompt": shape.rows * shape.prompt, "response": shape.rows * shape.response},
        "iterations": [dataclasses.asdict(each) for each in clock.iterations[1:]],
        "checkpointing": bool(trainer.policy_model.is_gradient_checkpointing),
        "bytes": weights(trainer),
        "saved_tensor_bytes": clock.saved,
        "rss_loaded_bytes": loaded,
        "rss_peak_bytes": resident("VmHWM"),
    }


def weights(trainer: Any) -> dict[str, int]:
    """Bytes of each role's parameters and of the optimizer's state."""
    import torch

    def size(tensors: Iterator[Any]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    named = list(trainer.policy_model.named_parameters())
    states = trainer.optimizer.optimizer.state.values()
    return {
        "policy": size(p for name, p in named if "lora_" not in name),
        "adapter": size(p for name, p in named if "lora_" in name),
        "reference": 0 if trainer.ref_model is None else size(trainer.ref_model.parameters()),
        "reward": size(trainer.reward_model.parameters()),
        "value": size(trainer.value_model.parameters()),
        "optimizer": size(t for s in states for t in s.values() if torch.is_tensor(t)),
    }


if __name__ == "__main__":
    sys.exit(main())
