"""Models load as asked, and what cannot be loaded is one line."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch

from align.errors import ConfigError
from align.models.classifier import load_classifier
from align.models.load import load_model, load_tokenizer, window
from align.models.settings import Model


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("name", ["no/such-model", "/no/such/folder"])
def test_a_model_that_does_not_exist_is_one_line(load: Any, name: str, tiny: Model) -> None:
    with pytest.raises(ConfigError, match=f"model.name={name}") as caught:
        load(replace(tiny, name=name))
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_a_chat_template_says_what_to_give(
    tiny: Model, tiny_folder: Path, tmp_path: Path
) -> None:
    for file in tiny_folder.glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    bare = replace(tiny, name=str(tmp_path))
    with pytest.raises(ConfigError, match=r"model\.chat_template=FILE"):
        load_tokenizer(bare)
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}!", encoding="utf-8")
    given = load_tokenizer(replace(bare, chat_template=str(template)))
    turns = [{"role": "user", "content": "hi"}]
    assert given.apply_chat_template(turns, tokenize=False) == "hi!"


def test_nf4_on_a_cpu_computes_in_float32(tiny_nf4: Model) -> None:
    model = load_model(tiny_nf4, device=torch.device("cpu"))
    linears = packed(model)
    assert len(linears) == 14
    assert all(linear.compute_dtype == torch.float32 for linear in linears)
    assert not model.training


@pytest.mark.parametrize(
    "load", [load_model, partial(load_classifier, seed=0)], ids=["model", "classifier"]
)
def test_nf4_is_never_repacked_on_a_cpu_that_has_bfloat16_products(
    tiny_nf4: Model, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes packs weights anew there for a pass without gradients, and training then loses
    its own.
    """
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    assert bitsandbytes.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu
    linears = packed(load(tiny_nf4, device=torch.device("cpu")))
    assert len(linears) == 14
    assert not any(linear.support_avx512bf16_for_cpu for linear in linears)


def packed(model: Any) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]


def test_int8_loads(tiny: Model) -> None:
    model = load_model(replace(tiny, quantization="int8"), device=torch.device("cpu"))
    ids = torch.tensor([[5, 6, 7]])
    whole = load_model(tiny, device=torch.device("cpu"))
    difference = (model(ids).logits - whole(ids).logits).abs().max()
    assert 0 < difference < 1


def test_the_window_is_the_models(tiny: Model) -> None:
    assert window(load_model(tiny, device=torch.device("cpu"))) == 256
