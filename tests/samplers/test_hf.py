"""Sampling: the same noise gives the same texts, whatever is batched, dropped or resumed."""

from dataclasses import replace

import pytest

from align.errors import StageError
from align.models.settings import Model
from align.records import Candidate, Prompt
from align.samplers.settings import Hf
from tests.conftest import model_settings, save_tiny

SETTINGS = Hf(
    name="hf",
    module=None,
    n=3,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    max_new_tokens=24,
    batch_size=12,
)
PROMPTS = [
    Prompt.from_json({"id": f"p{i}", "prompt": "How many days? " * (i + 1)}) for i in range(9)
]


def drawn(model: Model, *, seed: int = 0, skip: int = 0, **changes: object) -> dict[str, Candidate]:
    from align.models.load import load_model, load_tokenizer
    from align.samplers.hf import lay_out, sample

    settings = replace(SETTINGS, **changes)
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    layout = lay_out(loaded, tokenizer, PROMPTS, settings=settings)
    batches = sample(
        loaded, tokenizer, PROMPTS, layout=layout, settings=settings, seed=seed, skip=skip
    )
    return {candidate.id: candidate for batch in batches for candidate in batch}


def test_a_resumed_run_draws_the_texts_of_an_undisturbed_one(tiny_nf4):
    whole, rest = drawn(tiny_nf4), drawn(tiny_nf4, skip=2)
    assert len(whole) == 9 and len(rest) == 1
    assert all(whole[name] == candidate for name, candidate in rest.items())


def test_samples_differ_and_seeds_differ(tiny):
    one, other = drawn(tiny), drawn(tiny, seed=1)
    assert all(len({r.tokens for r in c.responses}) == 3 for c in one.values())
    assert all(one[name].responses != other[name].responses for name in one)


def test_neither_batches_nor_dropped_rows_nor_cache_change_a_token(tiny, monkeypatch):
    from align.samplers import hf

    expected = {name: [r.tokens for r in c.responses] for name, c in drawn(tiny).items()}
    alone = drawn(tiny, batch_size=3)
    assert expected == {name: [r.tokens for r in c.responses] for name, c in alone.items()}
    monkeypatch.setattr(hf, "DROP_SHARE", 2.0)
    kept = drawn(tiny)
    assert expected == {name: [r.tokens for r in c.responses] for name, c in kept.items()}
    monkeypatch.setattr(hf, "roomy_cache", lambda config: hf.DynamicCache(config=config))
    plain = drawn(tiny)
    assert expected == {name: [r.tokens for r in c.responses] for name, c in plain.items()}


ARCHITECTURES = {
    "llama": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},  # absolute positions
    "mistral": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "head_dim": 16, "num_hidden_layers": 6},  # both kinds
}


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_the_samplers_logprob_is_the_models(tmp_path, name):
    """Left padding, dropped rows and the cache against unpadded rows, teacher-forced."""
    tiny = model_settings(save_tiny(tmp_path, architecture=name, **ARCHITECTURES[name]))
    from align.models.chat import encode_prompt
    from align.models.load import load_model, load_tokenizer
    from align.models.logprobs import Row, score_rows

    tokenizer = load_tokenizer(tiny)
    candidates = list(drawn(tiny).values())
    rows = [
        Row(prompt=encode_prompt(tokenizer, c.messages).ids, completion=r.tokens)
        for c in candidates
        for r in c.responses
    ]
    found = score_rows(load_model(tiny), rows, title="score")
    said = [r.logprob for c in candidates for r in c.responses]
    assert found == pytest.approx(said, abs=1e-3)


def test_no_temperature_and_a_tiny_nucleus_both_take_the_likeliest_token(tiny):
    greedy, nucleus = drawn(tiny, temperature=0.0), drawn(tiny, top_p=1e-6)
    first = drawn(tiny, top_k=1)
    for name, candidate in greedy.items():
        tokens = [r.tokens for r in candidate.responses]
        assert len(set(tokens)) == 1
        assert tokens == [r.tokens for r in nucleus[name].responses]
        assert tokens == [r.tokens for r in first[name].responses]


def test_the_first_token_follows_the_models_distribution(tiny):
    import torch

    from align.samplers.hf import next_tokens, noise

    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).expand(8000, 4)
    uniform = torch.tensor([noise(0, str(i), 0, 1)[0] for i in range(8000)])
    tokens, logprobs = next_tokens(logits, uniform, settings=SETTINGS)
    shares = torch.bincount(tokens, minlength=4) / 8000
    assert torch.allclose(shares, logits[0].softmax(-1), atol=0.02)
    assert torch.allclose(logprobs, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])


def test_a_uniform_number_next_to_one_never_points_behind_the_last_possible_token():
    import torch

    from align.samplers.hf import next_tokens

    logits = torch.tensor([[0.0, 0.0, float("-inf"), float("-inf")]])
    almost = torch.tensor([1.0 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs = next_tokens(logits, almost, settings=SETTINGS)
    assert tokens.tolist() == [1] and logprobs.isfinite().all()


def test_a_window_without_room_is_one_line(tiny):
    with pytest.raises(StageError, match="leaves no room for a prompt"):
        drawn(tiny, max_new_tokens=256)


def test_prompts_longer_than_the_window_are_cut_and_say_so(tiny):
    found = drawn(tiny, max_new_tokens=232)
    assert found["p8"].meta["cut"] > 0
    assert "cut" not in found["p0"].meta


def test_logits_that_are_no_numbers_are_one_line(tiny):
    import torch

    from align.models.load import load_model, load_tokenizer
    from align.samplers.hf import lay_out, sample

    model, tokenizer = load_model(tiny), load_tokenizer(tiny)
    model.get_output_embeddings().register_forward_hook(
        lambda module, given, logits: torch.full_like(logits, torch.nan)
    )
    layout = lay_out(model, tokenizer, PROMPTS, settings=SETTINGS)
    with pytest.raises(StageError, match=r"type model\.dtype=bfloat16"):
        list(sample(model, tokenizer, PROMPTS, layout=layout, settings=SETTINGS, seed=0, skip=0))
