"""Adapters start as the base, from a seed, and say what they cannot be put on."""

from pathlib import Path

import pytest
import torch

from align.errors import ConfigError, StageError
from align.models.adapters import add_lora, load_adapter
from align.models.load import load_model
from align.models.settings import Lora, Model
from tests.conftest import model_settings, save_tiny


def test_a_fresh_adapter_changes_nothing_and_is_the_seeds(tiny: Model, lora: Lora) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = load_model(tiny)(input_ids=ids).logits
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(drawn))  # whatever was drawn before
        policy = add_lora(load_model(tiny), settings=lora, seed=seed)
        torch.testing.assert_close(policy(input_ids=ids).logits, expected, rtol=0, atol=0)
        drawn.append({n: p.detach() for n, p in policy.named_parameters() if "lora_A" in n})
    first, again, other = drawn
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.filterwarnings("ignore:.*mamba.*")
def test_a_model_that_refuses_all_linear_says_what_its_layers_are_called(
    lora: Lora, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path, architecture="mamba", state_size=8)
    with pytest.raises(ConfigError, match=r"target_modules=all-linear: .*in_proj, .*x_proj") as e:
        add_lora(load_model(model_settings(folder)), settings=lora, seed=0)
    assert "\n" not in str(e.value)


def test_an_adapter_of_another_model_is_one_line(tiny: Model, lora: Lora, tmp_path: Path) -> None:
    add_lora(load_model(tiny), settings=lora, seed=0).save_pretrained(tmp_path / "adapter")
    wider = save_tiny(tmp_path / "wider", hidden_size=128)
    with pytest.raises(StageError, match="no adapter for this model") as caught:
        load_adapter(load_model(model_settings(wider)), tmp_path / "adapter")
    assert "\n" not in str(caught.value)
