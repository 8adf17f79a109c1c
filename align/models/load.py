"""Loads the base model and its tokenizer: 4-bit, 8-bit or whole, on one device, from safetensors
only.
"""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from align.errors import ConfigError, first_line
from align.models.settings import Model

# Where a configuration names no window (state-space models), sequences are still held to something.
UNKNOWN_WINDOW = 4096
# What an encoder without a template reads: [CLS] question [SEP] answer [SEP], as BERT puts pairs of
# texts together (RoBERTa has two separators between them). Who speaks is told by the order alone.
SEPARATED = "{{ cls_token }}{% for m in messages %}{{ m.content }}{{ sep_token }}{% endfor %}"


def quiet() -> None:
    """Leaves the terminal to our own progress: no bar per file, no advice meant for developers."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    # peft 0.21 reads attributes that transformers 5 renamed
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    # GPT-2's layers hold their weights transposed, which peft finds out by itself
    warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")


def default_device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def compute_dtype(settings: Model, device: torch.device) -> torch.dtype:
    """ "auto" is float32 on a CPU, where bfloat16 is ten times slower, and bfloat16 on a GPU."""
    if settings.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype


def load_tokenizer(settings: Model, *, encoder: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer with its chat template, or with the one of `model.chat_template`; pads with EOS
    where it has no pad.

    Args:
        encoder: whether the model only reads. Such a one (BERT) knows no turns; without a template
            of its own it is shown the messages and the answer with its separator behind each.

    Raises:
        ConfigError: no such model, or no chat template.
    """
    quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.name, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise missing(settings, "tokenizer", error) from error
    if settings.chat_template is not None:
        tokenizer.chat_template = Path(settings.chat_template).read_text(encoding="utf-8")
    if encoder and tokenizer.chat_template is None and tokenizer.sep_token is not None:
        tokenizer.chat_template = SEPARATED
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"model.name={settings.name}: its tokenizer has no chat template, so a conversation "
            "cannot be put "
            "into tokens; give model.chat_template=FILE (a Jinja file), or choose the model's "
            "chat variant"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(settings: Model, *, device: torch.device | None = None) -> Any:
    """The base model in evaluation mode, whole on one device.

    Raises:
        ConfigError: no such model, or one without safetensors weights.
    """
    quiet()
    device = device or default_device()
    dtype = compute_dtype(settings, device)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            settings.name,
            revision=settings.revision,
            dtype=dtype,
            quantization_config=quantization(settings, dtype),
            device_map={"": device},
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        raise missing(settings, "model", error) from error
    keep_gradients_on_cpu(model)
    model.train(False)
    return model


def load_config(settings: Model) -> Any:
    """What the model is, without its weights.

    Raises:
        ConfigError: no such model.
    """
    try:
        return AutoConfig.from_pretrained(settings.name, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise missing(settings, "configuration", error) from error


def quantization(
    settings: Model, dtype: torch.dtype, *, whole: list[str] | None = None
) -> BitsAndBytesConfig | None:
    """How weights are packed.

    Args:
        whole: modules that are left as they are; None: the language model's head.
    """
    if settings.quantization == "nf4":
        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=whole,  # its name is older than 4-bit weights
        )
    if settings.quantization == "int8":
        return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_8bit=True, llm_int8_skip_modules=whole
        )
    return None


def keep_gradients_on_cpu(model: Any) -> None:
    """Forbids bitsandbytes to repack 4-bit weights for AVX512-BF16 in a no-grad pass.

    The repacked layout has no backward: training after an evaluation would silently lose the
    gradient through them.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def missing(settings: Model, what: str, error: Exception) -> ConfigError:
    """One line for what transformers tells in a page."""
    at = f" (revision {settings.revision})" if settings.revision else ""
    reason = first_line(error)
    return ConfigError(
        f"model.name={settings.name}{at}: no {what} could be loaded ({reason}); give an existing "
        "folder in "
        "Hugging Face format with safetensors weights, or a hub id"
    )


def window(model: Any) -> int:
    """The most tokens that a sequence may have, of a model or its configuration."""
    config = getattr(model, "config", model)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        size = getattr(config, name, None)
        if isinstance(size, int) and size > 0:
            return size
    return UNKNOWN_WINDOW


def room(model: Any, tokenizer: Any) -> int:
    """The window; of an encoder that was given our template no more than its tokenizer says, for
    some (RoBERTa) have positions that no token can take.
    """
    most = window(model)
    return min(most, tokenizer.model_max_length) if tokenizer.chat_template == SEPARATED else most
