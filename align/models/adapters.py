"""Low-rank adapters on a frozen base: made, loaded, switched off for the reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import set_seed

from align.errors import ConfigError
from align.models.settings import Lora


def add_lora(model: Any, *, settings: Lora, seed: int) -> Any:
    """The model with a fresh trainable adapter called "default"; its output is at first exactly the base's.

    Raises:
        ConfigError: `adapter.target_modules` names no layer of the model.
    """
    set_seed(seed)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        policy = get_peft_model(model, config)
    except ValueError as error:
        raise ConfigError(
            f"adapter.target_modules={settings.target_modules}: {str(error).splitlines()[0]}; type all-linear"
        ) from error
    keep_in_fp32(policy)
    return policy


def keep_in_fp32(policy: Any) -> None:
    """Trainable weights in float32: in bfloat16 a step at a small learning rate rounds to nothing."""
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def load_adapter(model: Any, path: Path, *, trainable: bool = False) -> Any:
    """The model with a saved adapter; plain PEFT, nothing of ours is in the folder."""
    return PeftModel.from_pretrained(model, str(path), is_trainable=trainable).train(trainable)


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The bare base within: the model that training started from, and DPO's reference."""
    with model.disable_adapter():
        yield
