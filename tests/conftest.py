"""Tiny random models with the starter's tokenizer, shared by the tests of models, algorithms and
stages.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tiny models: a second thread gains nothing, and waiting for it on a busy machine costs forty times
# the work.
os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path
from typing import Any

import pytest

from align.models.settings import Lora, Model

STARTER = Path(__file__).parent.parent / "data" / "starter" / "model"


def save_tiny(folder: Path, architecture: str = "llama", **changes: Any) -> Path:
    """A random model of two small layers in `folder`; `changes` go into its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    shape: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        # Weights large enough that positions and tokens matter.
        "initializer_range": 0.2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = AutoConfig.for_model(architecture, **{**shape, **changes})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(STARTER).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def tiny(tiny_folder: Path) -> Model:
    """The tiny model whole, in float32."""
    return model_settings(tiny_folder)


@pytest.fixture
def tiny_nf4(tiny_folder: Path) -> Model:
    return model_settings(tiny_folder, quantization="nf4")


@pytest.fixture
def lora() -> Lora:
    return Lora(name="lora", rank=4, alpha=8, dropout=0.0, target_modules="all-linear")


@pytest.fixture
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(STARTER)


def model_settings(folder: Path, *, quantization: str = "none") -> Model:
    return Model(
        name=str(folder),
        revision=None,
        quantization=quantization,
        dtype="auto",
        chat_template=None,
    )
