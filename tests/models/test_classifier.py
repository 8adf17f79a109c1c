"""Scores of answers: read at the end of turn, in float32, the same wherever the model is loaded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertTokenizer,
)

from align.errors import ConfigError, StageError
from align.models.adapters import add_lora
from align.models.classifier import (
    load_classifier,
    load_reward_model,
    score_adapter,
    scores,
    segments,
)
from align.models.load import load_model
from align.models.logprobs import last_hidden
from align.models.settings import Lora, Model
from tests.conftest import model_settings, save_tiny

LENGTHS = torch.tensor([12, 7, 3])


def ids() -> torch.Tensor:
    return torch.randint(5, 1000, (3, 12), generator=torch.Generator().manual_seed(0))


def save_encoder(folder: Path, architecture: str = "bert") -> Path:
    """A tiny masked language model: it has neither a classifier nor a pooler."""
    config = AutoConfig.for_model(
        architecture, vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=130, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    return folder


def save_words(folder: Path) -> Path:
    """BERT's tokenizer with a few whole words, in a model's folder."""
    words = ["days", "office", "three", "pay", "employer", "the", "of", "no", "0", "1"]
    file = folder.with_suffix(".vocabulary")
    file.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    BertTokenizer(str(file)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "bert":
        return save_encoder(folder)
    return save_tiny(folder, request.param)


def trained(settings: Model, lora: Lora, *, seed: int = 1) -> Any:
    """A classifier whose adapter and head are far from where they began."""
    model = score_adapter(load_classifier(settings, seed=seed), settings=lora, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.train(False)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_padding_changes_no_score_and_heads_stay_float32(
    base: Path, quantization: str, lora: Lora
) -> None:
    model = trained(model_settings(base, quantization=quantization), lora)
    with torch.no_grad():
        together = scores(model, input_ids=ids(), lengths=LENGTHS)
        alone = [
            scores(model, input_ids=ids()[i : i + 1, :n], lengths=LENGTHS[i : i + 1])
            for i, n in enumerate(LENGTHS.tolist())
        ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert together.dtype == torch.float32 and together.std() > 0.01
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_what_is_saved_scores_the_same_in_plain_transformers_and_peft(
    base: Path, quantization: str, lora: Lora, tmp_path: Path
) -> None:
    """The head is in it: TRL's trainer leaves it out, and plain loading draws another one."""
    settings = model_settings(base, quantization=quantization)
    model = trained(settings, lora)
    model.save_pretrained(tmp_path)
    row, length = ids()[:1], torch.tensor([12])
    with torch.no_grad():
        expected = scores(model, input_ids=row, lengths=length)
        ours = load_reward_model(settings, tmp_path)
        torch.testing.assert_close(
            scores(ours, input_ids=row, lengths=length), expected, rtol=0, atol=0
        )
        assert not any(p.requires_grad for p in ours.parameters())
        if quantization == "none":
            plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
            plain = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
            found = plain(input_ids=row, attention_mask=torch.ones_like(row)).logits[:, 0]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_head_computes_in_float32_under_mixed_precision_and_on_a_bfloat16_base(
    base: Path, dtype: str
) -> None:
    model = load_classifier(replace(model_settings(base), dtype=dtype), seed=1)
    assert model.dtype == getattr(torch, dtype)
    head = getattr(model, "score", None) or model.classifier
    given: list[torch.Tensor] = []
    head.register_forward_hook(lambda module, arguments, output: given.append(arguments[0]))
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = scores(model, input_ids=ids(), lengths=LENGTHS)
        last = given[-1].float()
        exact = last @ head.weight.float().T + (0 if head.bias is None else head.bias)
        torch.testing.assert_close(found, exact[:, 0], rtol=1e-6, atol=1e-6)
    assert (found.bfloat16() != found).any(), "more than eight bits"
    heads = [p for key, p in model.named_parameters() if key.startswith(("score", "classifier"))]
    assert {p.dtype for p in heads} == {torch.float32}


def test_an_end_of_turn_that_is_the_padding_is_counted(tiny_folder: Path, lora: Lora) -> None:
    """transformers reads the score at the token before it; then EOS could not matter."""
    model = trained(model_settings(tiny_folder), lora)
    model.config.pad_token_id = 1  # the end of turn
    row = torch.tensor([[5, 6, 7, 1], [8, 9, 1, 1]])
    lengths = torch.tensor([4, 3])
    with torch.no_grad():
        found = scores(model, input_ids=row, lengths=lengths)
        without = scores(model, input_ids=row, lengths=lengths - 1)
        theirs = model(input_ids=row).logits[:, 0]
        model.config.pad_token_id = 0
        other = scores(model, input_ids=row, lengths=lengths)
    torch.testing.assert_close(theirs, without, rtol=1e-5, atol=1e-6)
    assert ((found - without).abs() > 1e-3).all()
    torch.testing.assert_close(found, other, rtol=0, atol=0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_on_a_causal_base_the_saved_adapter_gives_the_same_score(
    architecture: str, lora: Lora, tmp_path: Path
) -> None:
    """So the reward model can be one role of the base that the policy stands on."""
    settings = model_settings(save_tiny(tmp_path / "base", architecture))
    model = trained(settings, lora)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    head = {key: value for key, value in saved.items() if "lora_" not in key}
    assert list(head) == ["base_model.model.score.weight"]
    causal = load_model(settings)
    config = LoraConfig(
        r=lora.rank, lora_alpha=int(lora.alpha), target_modules="all-linear", task_type="CAUSAL_LM",
        fan_in_fan_out=architecture == "gpt2",
    )  # fmt: skip
    role = get_peft_model(causal, config, adapter_name="reward")
    own = {key.replace(".reward", "") for key in role.state_dict() if "lora_" in key}
    assert own == saved.keys() - head.keys()
    adapter = {key: value for key, value in saved.items() if key not in head}
    set_peft_model_state_dict(role, adapter, adapter_name="reward")
    with torch.no_grad():
        hidden = last_hidden(role, ids())[torch.arange(3), LENGTHS - 1]
        on_causal = hidden @ head["base_model.model.score.weight"].T
        expected = scores(model, input_ids=ids(), lengths=LENGTHS)
    torch.testing.assert_close(on_causal[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_a_fresh_head_comes_from_its_seed_alone(base: Path) -> None:
    settings = model_settings(base)

    def drawn(seed: int) -> torch.Tensor:
        torch.rand(7)  # whatever was drawn before
        with torch.no_grad():
            return scores(load_classifier(settings, seed=seed), input_ids=ids(), lengths=LENGTHS)

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


def test_gradients_reach_head_and_adapter_from_the_first_step(base: Path, lora: Lora) -> None:
    model = score_adapter(load_classifier(model_settings(base), seed=1), settings=lora, seed=1)
    scores(model, input_ids=ids(), lengths=LENGTHS).sum().backward()
    still = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and "lora_A" not in name and not p.grad.abs().sum()
    ]
    # An adapter's B begins at zero, so its A waits a step; a key's bias shifts all scores alike.
    assert not still


def test_other_folders_and_other_bases_are_told_from_ours(
    tiny: Model, lora: Lora, tmp_path: Path
) -> None:
    with pytest.raises(StageError, match="no reward model for this base"):
        load_reward_model(tiny, tmp_path)
    wide = model_settings(save_tiny(tmp_path / "wide", hidden_size=32))
    trained(tiny, lora).save_pretrained(tmp_path / "adapter")
    with pytest.raises(StageError, match="the folder that a reward training on the same base"):
        load_reward_model(wide, tmp_path / "adapter")


def test_an_adapter_without_its_head_is_refused(tiny: Model, lora: Lora, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    trained(tiny, lora).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "score" not in k}, file)
    with pytest.raises(StageError, match=r"no .*score"):
        load_reward_model(tiny, tmp_path)


def test_an_adapter_of_a_language_model_is_refused(tiny: Model, lora: Lora, tmp_path: Path) -> None:
    """What DPO leaves: PEFT would fail with an AttributeError."""
    add_lora(load_model(tiny), settings=lora, seed=0).save_pretrained(tmp_path)
    with pytest.raises(StageError, match="a language model's, which has no head"):
        load_reward_model(tiny, tmp_path)


def test_what_is_scored_as_it_is_must_have_its_head(base: Path) -> None:
    with pytest.raises(StageError, match=r"no (score|bert\.pooler)\..*would be random"):
        load_classifier(model_settings(base), seed=None)


def test_segments_change_behind_the_first_separator() -> None:
    row = torch.tensor([[2, 7, 3, 8, 3, 0], [2, 3, 9, 9, 9, 9]])
    assert segments(row, separator=3).tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]


def test_a_model_that_cannot_classify_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("t5", d_model=16, num_layers=1, num_heads=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot score answers"):
        load_classifier(model_settings(tmp_path), seed=0)
