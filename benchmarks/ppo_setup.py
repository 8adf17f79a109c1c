"""The shapes, models, rollouts and environment that both arms of the PPO benchmark share."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter
    from transformers import LlamaConfig, PreTrainedModel

REPOSITORY = Path(__file__).resolve().parents[1]
EOS = 1
SIGMA = 0.6  # of the lognormal lengths
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the models and of one iteration's rollouts: `rows` responses, `samples` a prompt."""

    hidden: int = 1024
    layers: int = 4
    intermediate: int = 2752
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 4096
    prompt: int = 256
    response: int = 128
    rows: int = 8
    samples: int = 1
    ragged: bool = False
    """Lognormal lengths, padded to `prompt` and `response`, rather than these lengths."""

    def __post_init__(self) -> None:
        if self.rows % self.samples:
            raise ValueError(
                f"rows={self.rows} is no multiple of samples={self.samples}, and every prompt has "
                f"as many samples: give rows={self.samples * max(1, self.rows // self.samples)}."
            )

    @property
    def pad(self) -> int:
        """TRL takes its masks from `!= pad`, so where no length varies it is an id that no model
        can sample; where lengths vary it must be one that a logit can be gathered for.
        """
        return 0 if self.ragged else self.vocabulary


SHAPES = {
    "8B-like": Shape(),
    "1B-like": Shape(vocabulary=16384),
    "smoke": Shape(
        hidden=64, layers=2, intermediate=160, heads=4, kv_heads=2, vocabulary=128, prompt=12,
        response=10,
    ),
}  # fmt: skip


def add_shape(parser: argparse.ArgumentParser, told: str = "8B-like") -> None:
    """`--shape`, and an option for each of its sizes."""
    parser.add_argument("--shape", choices=SHAPES, help=told)
    for field in dataclasses.fields(Shape):
        kind = {"action": "store_true"} if field.type == "bool" else {"type": int}
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=None, **kind)


def shape_of(given: argparse.Namespace, *, default: str = "8B-like") -> Shape:
    """The shape that was typed, with the sizes that were."""
    changes = {field.name: getattr(given, field.name) for field in dataclasses.fields(Shape)}
    base = SHAPES[given.shape or default]
    return dataclasses.replace(base, **{k: v for k, v in changes.items() if v is not None})


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Prompts [N, P], padded on the left, and responses [N, R], padded on the right.

    Lengths are [N]; a response that ended has EOS as its last token, and EOS counts. The samples of
    a prompt are neighbours.
    """

    prompts: Tensor
    prompt_lengths: Tensor
    responses: Tensor
    response_lengths: Tensor
    ended: Tensor


def environment(threads: int, *first: Path) -> dict[str, str]:
    """What both arms' processes get; `first` comes first on the path for imports."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (*first, REPOSITORY))),
        "MALLOC_MMAP_THRESHOLD_": "8589934592",
        "MALLOC_TRIM_THRESHOLD_": "34359738368",
        "MALLOC_ARENA_MAX": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
    }


def rollouts(shape: Shape, *, iterations: int, seed: int) -> Rollouts:
    """Random tokens for so many iterations.

    Where lengths vary, one that was drawn too long is cut and has no EOS; of the first three rows
    one has no EOS, one has it in the last place, and one is EOS alone.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    rows = shape.rows * iterations
    prompt_draws = drawn(rows // shape.samples, shape.prompt, shape, generator)
    prompt_lengths = prompt_draws.clamp(max=shape.prompt).repeat_interleave(shape.samples)
    size = (rows // shape.samples, shape.prompt)
    prompts = torch.randint(EOS + 1, shape.vocabulary, size, generator=generator)
    prompts = prompts.repeat_interleave(shape.samples, 0)
    absent = torch.arange(shape.prompt) < shape.prompt - prompt_lengths[:, None]
    prompts[absent] = shape.pad

    draws = drawn(rows, shape.response, shape, generator)
    if shape.ragged:
        draws[:3] = torch.tensor([shape.response + 1, shape.response, 1])[:rows]
    lengths, ended = draws.clamp(max=shape.response), draws <= shape.response
    responses = torch.randint(
        EOS + 1, shape.vocabulary, (rows, shape.response), generator=generator
    )
    if shape.ragged:
        responses[ended, lengths[ended] - 1] = EOS
    else:
        ended = torch.zeros_like(ended)
    responses[torch.arange(shape.response) >= lengths[:, None]] = shape.pad
    return Rollouts(
        prompts=prompts,
        prompt_lengths=prompt_lengths,
        responses=responses,
        response_lengths=lengths,
        ended=ended,
    )


def drawn(count: int, most: int, shape: Shape, generator: object) -> Tensor:
    """Lengths [count] from 1, some beyond `most`; their median is its half."""
    import torch

    if not shape.ragged:
        return torch.full((count,), most)
    spread = torch.randn(count, generator=generator).mul(SIGMA).exp()
    return (spread * most / 2).round().long().clamp(min=1)


def config(shape: Shape) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.prompt + shape.response,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def language_model(shape: Shape, *, seed: int, dtype: str = "float32") -> PreTrainedModel:
    """The policy before its adapter, which is the reference too."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(shape))
    return model.to(getattr(torch, dtype)).eval()


def reward_model(shape: Shape, *, seed: int, dtype: str = "float32") -> PreTrainedModel:
    """A scalar head on a trunk of its own; the value model starts as its copy."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(seed + 1)
    settings = copy.deepcopy(config(shape))
    settings.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(settings)
    return model.to(getattr(torch, dtype)).eval()


# What both arms count.


def resident(field: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at most (VmHWM). `ru_maxrss` would count
    what its parent held when it was forked.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def forget_peak() -> None:
    """From here on VmHWM is the most that training holds, whatever reading the models took."""
    Path("/proc/self/clear_refs").write_text("5")


@contextmanager
def saving(weights: Iterable[Parameter]) -> Iterator[dict[int, int]]:
    """Within, bytes by storage, weights left out, that autograd saves for the backward pass."""
    import torch

    kept = {p.untyped_storage().data_ptr() for p in weights}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages
