"""Runs our PPO trainer on the baseline's models and rollouts, and prints what its phases cost as
one line of JSON.

`python benchmarks/ppo_ours.py [--value trunk] [--base float32] [--shape 8B-like] …`. The loop is
`Trainer.iterate`, unmodified, but for the answers, which are given, as the baseline's are: their
log-probabilities come from one forward pass, which is counted as generation in both arms.
Generation aside, ours makes a pass with the policy that TRL does not make (its old log-probs are
those of the sampler). Policy, reward and a value adapter share one base; the reference is that
base; so the value model, which is a whole model there, is an adapter or a head here.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import ppo_setup
from benchmarks.ppo_ours_clock import Clock
from benchmarks.ppo_setup import LORA_TARGETS, REPOSITORY, Shape, resident

VALUES = ("trunk", "adapter", "none")
BASES = {  # quantization and dtype of the shared base, as `model.*` has them
    "float32": ("none", "float32"),
    "bfloat16": ("none", "bfloat16"),
    "nf4": ("nf4", "auto"),
    "nf4-bfloat16": ("nf4", "bfloat16"),
}
SETTINGS = (
    "value", "base", "epochs", "minibatches", "micro", "lora_rank", "seed", "threads"
)  # fmt: skip
# What TRL's PPOConfig says by default, in our words.
MATCHED: dict[str, Any] = {
    "temperature": 0.7, "gamma": 1.0, "lam": 0.95, "whiten": True, "clip": 0.2, "value_clip": 0.2,
    "value_coef": 0.1, "beta": 0.05, "learning_rate": 3e-6, "value_learning_rate": 3e-6,
    "warmup": 0.0, "truncated": "score", "reward": "role", "logged_samples": 0,
}  # fmt: skip


# The process.


def run(arguments: list[str], *, inputs: Path, threads: int = 2) -> dict[str, Any]:
    """The figures of this script with these arguments, from a fresh process."""
    told = ["--inputs", str(inputs), "--threads", str(threads)]
    command = [sys.executable, str(Path(__file__).resolve()), *arguments, *told]
    environment = ppo_setup.environment(threads)
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def prepare(folder: Path, arguments: list[str], *, threads: int = 2) -> None:
    """Writes base and reward model in a process of their own, so that measuring begins without."""
    run([*arguments, "--write"], inputs=folder, threads=threads)


def main() -> int:
    given = parsed()
    if given.inputs is None:
        with tempfile.TemporaryDirectory(prefix="align-benchmark-") as folder:
            prepare(Path(folder), sys.argv[1:], threads=given.threads)
            print(json.dumps(run(sys.argv[1:], inputs=Path(folder), threads=given.threads)))
        return 0
    with redirect_stdout(sys.stderr):
        found = written(given) if given.write else measured(given)
    print(json.dumps(found))
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    ppo_setup.add_shape(parser)
    parser.add_argument("--value", choices=VALUES, default="trunk")
    parser.add_argument("--base", choices=BASES, default="float32")
    parser.add_argument("--iterations", type=int, default=6, help="the first is dropped")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=1)
    parser.add_argument("--micro", type=int, help="rows a forward (all)")
    parser.add_argument("--lora-rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--inputs", type=Path, help="folder of base and reward model (made anew)")
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.sizes = ppo_setup.shape_of(given)
    given.micro = given.micro or given.sizes.rows
    if given.value == "none" and given.sizes.samples < 2:
        parser.error("--value none compares a prompt's answers: give --samples 2 or more")
    if given.iterations < 2:
        parser.error(f"--iterations {given.iterations}: the first is dropped, so give 2 or more")
    return given


# What is loaded.


def written(given: argparse.Namespace) -> dict[str, Any]:
    """The baseline's policy as a folder, and a random reward adapter with its head."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    from align.models.adapters import WEIGHTS, save_adapter
    from align.models.roles import HEAD

    model = ppo_setup.language_model(given.sizes, seed=given.seed)
    model.save_pretrained(given.inputs / "model")
    lora = LoraConfig(
        r=given.lora_rank, lora_alpha=2 * given.lora_rank, target_modules=list(LORA_TARGETS),
        init_lora_weights=False, task_type="CAUSAL_LM",
    )  # fmt: skip
    adapter = given.inputs / "reward" / "adapter"
    save_adapter(get_peft_model(model, lora, adapter_name="reward"), adapter, name="reward")
    head = torch.randn(1, given.sizes.hidden) / given.sizes.hidden**0.5
    save_file(load_file(adapter / WEIGHTS) | {HEAD: head}, adapter / WEIGHTS, {"format": "pt"})
    (adapter / "reward.json").write_text(json.dumps({"mean": 0.0, "std": 1.0}))
    return {}


def settings(**changes: Any) -> Any:
    """The shipped settings with TRL's values, and with `changes`."""
    from align.algorithms.settings import Ppo

    shipped = yaml.safe_load((REPOSITORY / "conf" / "algorithm" / "ppo.yaml").read_text())
    return Ppo(**{**shipped, **MATCHED, **changes})


def online(given: argparse.Namespace, prompts: list[tuple[int, ...]]) -> Any:
    from align.algorithms.online import Online
    from align.algorithms.ppo.rollout import Question
    from align.models.load import load_model
    from align.models.settings import Lora, Model
    from align.records import Message, Prompt

    quantization, dtype = BASES[given.base]
    model = Model(
        name=str(given.inputs / "model"), revision=None, quantization=quantization, dtype=dtype,
        chat_template=None,
    )  # fmt: skip
    rank, said = given.lora_rank, (Message(role="user", content="?"),)
    return Online(
        model=model,
        adapter=Lora(
            name="lora", rank=rank, alpha=2 * rank, dropout=0.0, target_modules=list(LORA_TARGETS)
        ),
        base=load_model(model),
        tokenizer=SimpleNamespace(decode=lambda *_, **__: ""),  # the reward reads tokens
        questions=[
            Question(prompt=Prompt(id=str(i), messages=said), ids=ids)
            for i, ids in enumerate(prompts)
        ],
        held_out=[],
        reward_model=given.inputs / "reward" / "adapter",
        judge=None,
        monitor=None,
        seed=given.seed,
    )


def rows_of(ours: ppo_setup.Rollouts) -> list[Any]:
    """Prompts and answers without padding."""
    from align.models.logprobs import Row

    lengths = zip(ours.prompt_lengths.tolist(), ours.response_lengths.tolist(), strict=True)
    return [
        Row(prompt=tuple(prompt[len(prompt) - p :]), completion=tuple(response[:r]))
        for prompt, response, (p, r) in zip(
            ours.prompts.tolist(), ours.responses.tolist(), lengths, strict=True
        )
    ]


def give_rollouts(ours: ppo_setup.Rollouts, *, samples: int, temperature: float) -> None:
    """Has the trainer take given responses for generated ones."""
    import torch

    from align.algorithms.ppo import rollout, trainer
    from align.models.logprobs import collate, scored_tokens

    answers = defaultdict(list)
    for row, ended in zip(rows_of(ours), ours.ended.tolist(), strict=True):
        answers[row.prompt].append((row, ended))

    @torch.no_grad()
    def given(model: Any, tokenizer: Any, questions: Any, **_: Any) -> rollout.Rollouts:
        drawn = [answer for question in questions for answer in answers[question.ids]]
        rows = [row for row, _ in drawn]
        batch = collate(rows)
        tokens = scored_tokens(
            model, input_ids=batch.input_ids, response_mask=batch.response_mask,
            temperature=temperature,
        )  # fmt: skip
        mask = rollout.mask_of([len(row.completion) for row in rows])
        return rollout.Rollouts(
            rows=rows,
            groups=torch.arange(len(questions)).repeat_interleave(samples),
            ended=torch.tensor([ended for _, ended in drawn]),
            sampler_logprobs=torch.zeros(mask.shape).masked_scatter(mask, tokens.logprobs.float()),
        )

    trainer.rollout = given


# The trainer.


def measured(given: argparse.Namespace) -> dict[str, Any]:
    import torch

    from align.algorithms.ppo.run import made
    from align.process_group import Ranks

    torch.set_num_threads(given.threads)
    shape = given.sizes
    ours = ppo_setup.rollouts(shape, iterations=given.iterations, seed=given.seed)
    asked = list(dict.fromkeys(row.prompt for row in rows_of(ours)))
    chosen = settings(
        iterations=given.iterations, prompts=shape.rows // shape.samples, samples=shape.samples,
        max_new_tokens=shape.response, value=given.value, epochs=given.epochs,
        minibatches=given.minibatches, checkpoint_every=given.iterations + 1,
        micro_batch_tokens=given.micro * (shape.prompt + shape.response),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = made(
            online(given, asked), settings=chosen, out=Path(folder),
            ranks=Ranks(index=0, count=1, device=torch.device("cpu")),
        )  # fmt: skip
        loaded = resident("VmRSS")
        ppo_setup.forget_peak()
        give_rollouts(ours, samples=shape.samples, temperature=chosen.temperature)
        trainer.save = lambda random_states: None  # the last iteration would write a checkpoint
        clock = Clock(trainer)
        clock.hook()
        for iteration in range(given.iterations):
            clock.iterate(iteration)
    return figures(given, trainer, clock, loaded=loaded)


# Figures.


def figures(
    given: argparse.Namespace, trainer: Any, clock: Clock, *, loaded: int
) -> dict[str, Any]:
    shape: Shape = given.sizes
    told = ("torch", "transformers", "peft", "bitsandbytes")
    return {
        "arm": "ours",
        "versions": {name: importlib.metadata.version(name) for name in told},
        "shape": dataclasses.asdict(shape),
        "settings": {name: getattr(given, name) for name in SETTINGS},
        "tokens": {"prompt": shape.rows * shape.prompt, "response": shape.rows * shape.response},
        "iterations": clock.iterations[1:],
        "bytes": weights(trainer),
        "saved_tensor_bytes": clock.saved,
        "rss_loaded_bytes": loaded,
        "rss_peak_bytes": resident("VmHWM"),
    }


def weights(trainer: Any) -> dict[str, int]:
    """Bytes of the base, packed or not, with what unpacks it; of each role; of the optimizer."""
    import torch

    def size(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in tensors if torch.is_tensor(t))

    def role(name: str) -> int:
        bound = roles.bound.get(name)
        if bound is None:
            return 0
        own = roles.adapter_parameters(bound.adapter) if bound.owner and bound.adapter else []
        return size(own) + (size(bound.head.parameters()) if bound.head is not None else 0)

    roles = trainer.roles
    state = roles.model.state_dict().items()
    states = trainer.learner.optimizer.state.values()
    return {
        "base": size(value for name, value in state if ".lora_" not in name),
        "adapter": role("policy"),
        "reference": role("reference"),
        "reward": role("reward"),
        "value": role("value"),
        "optimizer": size(t for s in states for t in s.values()),
    }


if __name__ == "__main__":
    sys.exit(main())
