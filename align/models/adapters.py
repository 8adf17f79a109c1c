"""Low-rank adapters on a frozen base: made, loaded, switched off for the reference; never
merged.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from align.errors import ConfigError, StageError
from align.models.settings import Lora


def add_lora(model: Any, *, settings: Lora, seed: int, heads: Sequence[str] = ()) -> Any:
    """The model with a fresh trainable adapter called "default"; its output is at first exactly the
    base's.

        W x  becomes  W x + (alpha / rank) B A x,    A random from `seed`, B = 0

    Hu et al. 2021, arXiv:2106.09685, section 4.1. `prepare_model_for_kbit_training` is not called:
    it would turn embeddings, norms and head of the base to float32, so that policy and reference
    would differ in their base.

    Args:
        heads: modules of a classifier that are trained whole, and saved with the adapter.

    Raises:
        ConfigError: `adapter.target_modules` names no layer of the model.
    """
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides by it, a float will do
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type="SEQ_CLS" if heads else "CAUSAL_LM",
        modules_to_save=list(heads) or None,
        exclude_modules=heads_pattern(heads),
    )
    try:
        # The draw happens on the CPU, from its own generator state, whatever was drawn before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            policy = get_peft_model(model, config)
    except ValueError as error:
        names = ", ".join(linear_names(model))
        raise ConfigError(
            f"adapter.target_modules={settings.target_modules}: {str(error).splitlines()[0]}; "
            f"type adapter.target_modules=[…] with some of its linear layers ({names})"
        ) from error
    keep_in_fp32(policy)
    return policy


def heads_pattern(heads: Sequence[str]) -> str | None:
    """For PEFT, what gets no adapter: the heads and all that is in them."""
    return rf"({'|'.join(map(re.escape, heads))})(\..*)?" if heads else None


def linear_names(model: Any) -> list[str]:
    """What the model's linear layers are called, its head left out."""
    head = model.get_output_embeddings()
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    return sorted(found)


def keep_in_fp32(policy: Any) -> None:
    """Trainable weights in float32: in bfloat16 a step at a small learning rate rounds to
    nothing.
    """
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def load_adapter(model: Any, path: Path, *, trainable: bool = False) -> Any:
    """The model with a saved adapter; plain PEFT, nothing of ours is in the folder.

    Raises:
        StageError: the folder holds no adapter, or one for another model.
    """
    try:
        policy = PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise StageError(
            f"{path}: no adapter for this model ({reason}); give the folder that a training on "
            "the same base wrote"
        ) from error
    return policy.train(trainable)


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The bare base within: the model that training started from, and DPO's reference."""
    with model.disable_adapter():
        yield
