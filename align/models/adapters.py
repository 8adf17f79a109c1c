"""Low-rank adapters on a frozen base: made, loaded, switched off for the reference; never
merged.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from align.artifacts import read_json, write_json
from align.errors import ConfigError, StageError, first_line
from align.models.settings import Lora

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """An adapter's folder, read: its configuration and its weights under the names that files
    have.
    """

    config: Any
    state: dict[str, torch.Tensor]


def add_lora(
    model: Any,
    *,
    settings: Lora,
    seed: int,
    name: str = "default",
    heads: Sequence[str] = (),
) -> Any:
    """The model with a fresh trainable adapter; its output is at first exactly the base's.

        W x  becomes  W x + (alpha / rank) B A x,    A random from `seed`, B = 0

    Hu et al. 2021, arXiv:2106.09685, section 4.1; with DoRA the sum is also scaled, column by
    column, to a trained magnitude (Liu et al. 2024, arXiv:2402.09353, eq. 5).
    `prepare_model_for_kbit_training` is not called: it would turn embeddings, norms and head of the
    base to float32, so that policy and reference would differ in their base.

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
        use_dora=settings.name == "dora",
        task_type="SEQ_CLS" if heads else "CAUSAL_LM",
        modules_to_save=list(heads) or None,
        exclude_modules=heads_pattern(heads),
    )
    try:
        # The draw happens on the CPU, from its own generator state, whatever was drawn before.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if isinstance(model, PeftModel):
                config.base_model_name_or_path = str(model.get_base_model().name_or_path)
                model.add_adapter(name, config)
                policy = model
            else:
                policy = get_peft_model(model, config, adapter_name=name)
    except ValueError as error:
        names = ", ".join(linear_names(model))
        raise ConfigError(
            f"adapter.target_modules={settings.target_modules}: {first_line(error)}; "
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
    """The model with a saved adapter; plain PEFT, nothing of ours is in the folder. Where all
    weights were trained, a model of its own, and `model` stays as it is.

    Raises:
        StageError: the folder holds no adapter, or one for another model.
    """
    if (path / "config.json").is_file() and not (path / CONFIG).is_file():
        whole = AutoModelForCausalLM.from_pretrained(
            path, dtype=model.dtype, device_map={"": model.device}, use_safetensors=True
        )
        return whole.train(trainable)
    try:
        policy = PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise StageError(
            f"{path}: no adapter for this model ({first_line(error)}); give the folder that a "
            "training on the same base wrote"
        ) from error
    return policy.train(trainable)


def save_adapter(model: Any, folder: Path, *, name: str) -> None:
    """One adapter of a model as plain PEFT; equal weights leave equal bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=name)
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    model.peft_config[name].save_pretrained(str(folder))
    config = read_json(folder / CONFIG) | {"inference_mode": True}
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()  # PEFT writes a set in the order of the hash seed
    write_json(folder / CONFIG, config)


def read_adapter(folder: Path) -> Saved:
    """A saved adapter, without a model.

    Raises:
        StageError: there is none.
    """
    try:
        config = PeftConfig.from_pretrained(str(folder))
        return Saved(config=config, state=load_file(folder / WEIGHTS))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise StageError(
            f"{folder}: no adapter stands there ({first_line(error)}); give the folder that a "
            "training wrote"
        ) from error


@contextmanager
def without_adapter(policy: Any, base: Any = None) -> Iterator[Any]:
    """The bare base within: the model that training started from, and DPO's reference.

    Args:
        base: what the policy was loaded on; needed where it is no adapter but a whole model.
    """
    if not isinstance(policy, PeftModel):
        yield base
        return
    with policy.disable_adapter():
        yield policy
