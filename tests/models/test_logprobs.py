"""Log-probabilities are those of the naive computation, without its memory."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from align.models import logprobs
from align.models.adapters import add_lora
from align.models.logprobs import Row, collate, last_hidden, sequence_logprobs, token_logprobs
from align.models.settings import Lora

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def gpt2() -> Any:
    shape = {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=2))


def gemma2() -> Any:
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=3.0))


def cohere() -> Any:
    return CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.3))


def granite() -> Any:
    return GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=4.0))


def opt() -> Any:
    """Its model calls a decoder inside of it, and does not itself run."""
    shape = {"vocab_size": 61, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
    return OPTForCausalLM(OPTConfig(**shape, **layers, pad_token_id=0, eos_token_id=2))


def rows() -> list[Row]:
    return [
        Row(prompt=[5, 9, 11], completion=[4, 8, 2]),
        Row(prompt=[7], completion=[3, 3, 3, 9, 30, 12, 60, 2]),
        Row(prompt=[20, 21, 22, 23, 24, 25], completion=[2]),
    ]


def naive(model: Any, row: Row) -> torch.Tensor:
    """Log-probabilities of one answer, token by token, from all logits of an unpadded row."""
    ids = torch.tensor([[*row.prompt, *row.completion]])
    table = model(input_ids=ids).logits[0].log_softmax(-1)
    first = len(row.prompt)
    return torch.stack([table[t - 1, ids[0, t]] for t in range(first, ids.shape[1])])


@pytest.mark.parametrize("make", [llama, gpt2, gemma2, cohere, granite, opt])
def test_equal_the_naive_logits_in_float64(make: Any) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    batch = collate(rows())
    found = token_logprobs(model, input_ids=batch.input_ids, response_mask=batch.response_mask)
    for i, row in enumerate(rows()):
        counted = found[i][batch.response_mask[i]]
        torch.testing.assert_close(counted, naive(model, row), rtol=0, atol=1e-9)
    assert not found[~batch.response_mask].any()


@pytest.mark.parametrize("make", [llama, gpt2, opt])
def test_the_last_hidden_states_are_what_the_head_reads(make: Any) -> None:
    torch.manual_seed(0)
    model, ids = make().double().eval(), collate(rows()).input_ids
    with torch.no_grad():
        found = model.get_output_embeddings()(last_hidden(model, ids))
        torch.testing.assert_close(found, model(input_ids=ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_equal_the_naive_logits_with_an_adapter(make: Any) -> None:
    torch.manual_seed(0)
    settings = Lora(name="lora", rank=2, alpha=4, dropout=0.0, target_modules="all-linear")
    policy = add_lora(make(), settings=settings, seed=0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    policy = policy.double().eval()
    batch = collate(rows())
    found = sequence_logprobs(policy, input_ids=batch.input_ids, response_mask=batch.response_mask)
    expected = torch.stack([naive(policy, row).sum() for row in rows()])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_padding_changes_no_logprob() -> None:
    torch.manual_seed(0)
    model = llama().double().eval()
    short = collate(rows()[:1])
    wide = torch.cat([short.input_ids, torch.full((1, 9), 17)], dim=1)
    mask = torch.cat([short.response_mask, torch.zeros(1, 9, dtype=torch.bool)], dim=1)
    alone = sequence_logprobs(model, input_ids=short.input_ids, response_mask=short.response_mask)
    padded = sequence_logprobs(model, input_ids=wide, response_mask=mask)
    torch.testing.assert_close(alone, padded, rtol=0, atol=1e-12)


def test_an_end_token_that_is_also_the_pad_token_counts() -> None:
    batch = collate([Row(prompt=[5], completion=[7, 0]), Row(prompt=[5, 6, 7], completion=[8, 0])])
    assert batch.input_ids.tolist() == [[5, 7, 0, 0, 0], [5, 6, 7, 8, 0]]
    assert batch.response_mask.int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("make", [LlamaForCausalLM, GraniteForCausalLM])
def test_no_tensor_has_a_logit_for_every_position(make: Any, monkeypatch: Any) -> None:
    vocabulary, positions = 4096, 64
    shape = {**SHAPE, "vocab_size": vocabulary}
    config = (
        GraniteConfig(**shape, logits_scaling=4.0)
        if make is GraniteForCausalLM
        else LlamaConfig(**shape)
    )
    model = make(config)
    long = [Row(prompt=list(range(3, 3 + positions - 4)), completion=[5, 6, 7, 2])] * 4
    batch = collate(long)
    logprobs.has_linear_head(model)
    with Largest() as seen:
        sequence_logprobs(
            model, input_ids=batch.input_ids, response_mask=batch.response_mask
        ).sum().backward()
    # The largest is the gradient of the embedding, [V, H], or the logits of the 16 tokens that
    # count.
    assert seen.elements <= vocabulary * SHAPE["hidden_size"]
    assert seen.elements < 4 * positions * vocabulary / 4


def test_chunks_of_the_head_change_neither_value_nor_gradient(monkeypatch: Any) -> None:
    torch.manual_seed(0)
    model = llama().double()
    batch = collate(rows())

    def gradients() -> tuple[torch.Tensor, torch.Tensor]:
        model.zero_grad()
        found = sequence_logprobs(
            model, input_ids=batch.input_ids, response_mask=batch.response_mask
        )
        found.sum().backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return found.detach(), flat

    whole, gradient = gradients()
    monkeypatch.setattr(logprobs, "CHUNK_VALUES", 3 * 61)
    pieces, other = gradients()
    torch.testing.assert_close(whole, pieces, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, other, rtol=0, atol=1e-12)
