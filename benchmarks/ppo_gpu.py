"""QLoRA PPO of a large model with random weights on one GPU: memory by role, tokens a second by
phase.

`python benchmarks/ppo_gpu.py --size 1B` (or 8B; `--size smoke` runs on a CPU in seconds). Policy,
reference, reward and value are four roles of one NF4 base, as `recipe=ppo` has them; answers are
sampled by our own sampler. It measures: bytes of the base and of each role's weights and of the
optimizer; the highest `torch.cuda.max_memory_allocated` while sampling, scoring and learning;
tokens a second of each. What it prints goes to RESULTS.md with date, GPU and command.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from align.algorithms.online import Online
from align.algorithms.ppo.rollout import Question
from align.algorithms.ppo.run import made
from align.algorithms.ppo.trainer import Trainer
from align.models.adapters import WEIGHTS, save_adapter
from align.models.load import default_device, load_model
from align.models.roles import HEAD, Roles
from align.models.settings import Lora, Model
from align.process_group import Ranks
from align.records import Message, Prompt
from benchmarks.ppo_ours import settings, weights
from benchmarks.ppo_setup import REPOSITORY

SIZES = {  # hidden, layers, intermediate, heads, key-value heads, vocabulary
    "1B": (2048, 16, 8192, 32, 8, 128256),  # Llama 3.2 1B
    "8B": (4096, 32, 14336, 32, 8, 128256),  # Llama 3.1 8B
    "smoke": (64, 2, 128, 4, 2, 1024),
}
LORA = Lora(name="lora", rank=16, alpha=32, dropout=0.0, target_modules="all-linear")
GIB = 2**30


def main() -> None:
    given = parsed()
    device = default_device()
    with tempfile.TemporaryDirectory(prefix="align-benchmark-") as folder:
        root = Path(folder)
        model = write_base(root / "model", given, device)
        write_reward(root / "reward", model)
        print(json.dumps(measured(given, root, model, device), indent=1))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="1B")
    parser.add_argument("--value", choices=("trunk", "adapter", "none"), default="adapter")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--response", type=int, default=128, help="tokens")
    parser.add_argument("--iterations", type=int, default=4, help="the first is dropped")
    parser.add_argument("--micro-tokens", type=int, default=8192, help="padded, per forward pass")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    return parser.parse_args()


def write_base(folder: Path, given: argparse.Namespace, device: torch.device) -> Model:
    """A model of that size with random weights in bfloat16, with the starter's tokenizer."""
    hidden, layers, intermediate, heads, kv_heads, vocabulary = SIZES[given.size]
    config = LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, intermediate_size=intermediate,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocabulary,
        max_position_embeddings=4096, eos_token_id=1, pad_token_id=0, bos_token_id=None,
        tie_word_embeddings=given.size != "8B", dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        base = LlamaForCausalLM(config).to(torch.bfloat16)
    base.save_pretrained(folder)
    del base
    AutoTokenizer.from_pretrained(REPOSITORY / "data" / "starter" / "model").save_pretrained(folder)
    return Model(
        name=str(folder), revision=None, quantization="nf4", dtype="auto", chat_template=None
    )


def write_reward(folder: Path, model: Model) -> None:
    """A random reward model for that base: an adapter with a head."""
    roles = Roles(load_model(model))
    roles.add("reward", settings=LORA, seed=1)
    save_adapter(roles.model, folder, name="reward")
    width = roles.model.config.hidden_size
    head = torch.randn(1, width, generator=torch.Generator().manual_seed(2)) / width**0.5
    save_file(load_file(folder / WEIGHTS) | {HEAD: head}, folder / WEIGHTS, {"format": "pt"})
    (folder / "reward.json").write_text(json.dumps({"mean": 0.0, "std": 1.0}))


def asked(given: argparse.Namespace) -> list[Question]:
    """Prompts of random tokens, as many as an iteration wants four times over."""
    vocabulary = SIZES[given.size][-1]
    draw = torch.Generator().manual_seed(3)
    said = (Message(role="user", content="?"),)
    return [
        Question(
            prompt=Prompt(id=str(i), messages=said),
            ids=tuple(torch.randint(5, vocabulary, (given.prompt,), generator=draw).tolist()),
        )
        for i in range(4 * given.prompts)
    ]


def measured(
    given: argparse.Namespace, root: Path, model: Model, device: torch.device
) -> dict[str, Any]:
    chosen = settings(
        iterations=given.iterations, prompts=given.prompts, samples=given.samples, epochs=2,
        max_new_tokens=given.response, value=given.value, micro_batch_tokens=given.micro_tokens,
        sampler_batch_size=given.prompts * given.samples, minibatches=1, temperature=1.0,
        gradient_checkpointing=given.checkpointing, checkpoint_every=given.iterations + 1,
    )  # fmt: skip
    online = Online(
        model=model, adapter=LORA, base=load_model(model),
        tokenizer=AutoTokenizer.from_pretrained(model.name), questions=asked(given), held_out=[],
        reward_model=root / "reward", judge=None, monitor=None, seed=0,
    )  # fmt: skip
    out = root / "out"
    out.mkdir()
    trainer = made(online, settings=chosen, out=out, ranks=Ranks(index=0, count=1, device=device))
    trainer.begin()
    peaks = watch_memory(trainer)
    for iteration in range(given.iterations):
        trainer.iterate(iteration)
    lines = [json.loads(line) for line in (out / "timing.jsonl").read_text().splitlines()][1:]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "shape": vars(given),
        "gib_by_role": {name: round(n / GIB, 3) for name, n in weights(trainer).items()},
        "peak_gib_by_phase": {name: round(n / GIB, 3) for name, n in peaks.items()},
        "tokens_a_second": speeds(lines),
    }


def watch_memory(trainer: Trainer) -> dict[str, int]:
    """The highest memory of each phase, kept up to date; empty without a GPU."""
    peaks: dict[str, int] = defaultdict(int)
    phase = trainer.clock.timed

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        with phase(name):
            yield
        if torch.cuda.is_available():
            peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated())

    trainer.clock.timed = timed  # type: ignore[method-assign]
    return peaks


def speeds(lines: list[dict[str, Any]]) -> dict[str, float]:
    """Of sampling in sampled tokens, of the rest in tokens of prompt and answer."""
    found = {}
    for phase, counted in (
        ("generate", "answer_tokens"), ("reward", "tokens"), ("score", "tokens"),
        ("learn", "tokens"),
    ):  # fmt: skip
        seconds = sum(line[f"{phase}_s"] for line in lines)
        found[phase] = round(sum(line[counted] for line in lines) / seconds, 1)
    return found


if __name__ == "__main__":
    main()
