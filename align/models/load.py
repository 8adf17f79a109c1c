"""Loads the base model and its tokenizer: 4-bit, 8-bit or whole, on one device, from safetensors only."""

import os
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers import PreTrainedTokenizerBase

from align.errors import ConfigError
from align.models.settings import Model


def default_device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def compute_dtype(settings: Model, device: torch.device) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype


def load_tokenizer(settings: Model) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.name, revision=settings.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.name={settings.name}: no tokenizer ({str(error).splitlines()[0]})") from error
    if settings.chat_template is not None:
        with open(settings.chat_template, encoding="utf-8") as file:
            tokenizer.chat_template = file.read()
    if tokenizer.chat_template is None:
        raise ConfigError(f"model.name={settings.name}: its tokenizer has no chat template; give model.chat_template=FILE")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(settings: Model, *, device: torch.device | None = None) -> Any:
    device = device or default_device()
    dtype = compute_dtype(settings, device)
    quantization = None
    if settings.quantization == "nf4":
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    elif settings.quantization == "int8":
        quantization = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(settings.name, revision=settings.revision, dtype=dtype, quantization_config=quantization, device_map={"": device}, use_safetensors=True)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def window(model: Any) -> int:
    return int(getattr(model.config, "max_position_embeddings", 4096))
