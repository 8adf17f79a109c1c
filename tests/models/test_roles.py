"""Roles on one base: whoever runs, runs alone; gradients, recomputation and the base stay right."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from align.errors import StageError
from align.models.adapters import WEIGHTS, save_adapter
from align.models.load import load_model
from align.models.logprobs import last_hidden, token_logprobs
from align.models.roles import Head, Roles, weights_hash
from align.models.settings import Lora, Model
from tests.conftest import model_settings, save_tiny

IDS = torch.tensor([[7, 8, 9, 10, 11, 1], [20, 21, 22, 1, 0, 0]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]]).bool()


def stirred(roles: Roles, name: str, *, seed: int) -> None:
    """An adapter that does something: B drawn too."""
    draw = torch.Generator().manual_seed(seed)
    for parameter in roles.adapter_parameters(name):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)


def two_roles(model: Model, lora: Lora) -> Roles:
    """A policy and a value, both trained, and the bare base as reference."""
    roles = Roles(load_model(model))
    for seed, name in enumerate(("policy", "value")):
        roles.add(name, settings=lora, seed=seed)
        stirred(roles, name, seed=seed)
    roles.bind("reference")
    return roles


def logprobs(roles: Roles, name: str) -> torch.Tensor:
    with roles.role(name) as model:
        return token_logprobs(model, input_ids=IDS, response_mask=MASK)


def joint_loss(roles: Roles) -> torch.Tensor:
    """Forward as policy, then as value, one loss over both."""
    return (logprobs(roles, "policy") * logprobs(roles, "value").exp()).sum()


def gradients(roles: Roles) -> dict[str, torch.Tensor]:
    found = {}
    for name in ("policy", "value"):
        for i, parameter in enumerate(roles.adapter_parameters(name)):
            assert parameter.grad is not None
            found[f"{name}/{i}"] = parameter.grad.clone()
            parameter.grad = None
    return found


@pytest.fixture(params=["llama", "gpt2"])
def folder(request: Any, tmp_path: Path) -> Path:
    return save_tiny(tmp_path / request.param, request.param)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_the_reference_is_the_base_bit_for_bit_before_and_after_training(
    tiny_folder: Path, lora: Lora, quantization: str
) -> None:
    model = model_settings(tiny_folder, quantization=quantization)
    base = load_model(model)
    with torch.no_grad():
        bare = token_logprobs(base, input_ids=IDS, response_mask=MASK)
    before = weights_hash(base)
    roles = two_roles(model, lora)
    assert weights_hash(roles.model) == before
    with torch.no_grad():
        assert torch.equal(logprobs(roles, "reference"), bare)
        moved = logprobs(roles, "policy")
        assert not torch.allclose(moved, bare)
    optimizer = torch.optim.AdamW(
        [*roles.parameters("policy"), *roles.parameters("value")], lr=1e-2
    )
    for _ in range(3):
        joint_loss(roles).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert torch.equal(logprobs(roles, "reference"), bare)
        assert not torch.allclose(logprobs(roles, "policy"), moved)
    assert weights_hash(roles.model) == before


def test_two_roles_in_one_loss_both_get_their_gradients(tiny: Model, lora: Lora) -> None:
    roles = two_roles(tiny, lora)
    joint_loss(roles).backward()
    found = gradients(roles)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())
    # One role at a time, with the other's part of the loss held fixed, gives the same.
    (logprobs(roles, "policy") * logprobs(roles, "value").detach().exp()).sum().backward()
    (logprobs(roles, "policy").detach() * logprobs(roles, "value").exp()).sum().backward()
    for key, gradient in gradients(roles).items():
        assert torch.allclose(gradient, found[key], rtol=1e-4, atol=1e-6), key


def test_pefts_own_switch_loses_the_gradients_that_ours_keeps(tiny: Model, lora: Lora) -> None:
    roles = two_roles(tiny, lora)
    roles.switch("policy")
    roles.model.set_adapter("policy")
    policy = token_logprobs(roles.model, input_ids=IDS, response_mask=MASK)
    roles.model.set_adapter("value")
    value = token_logprobs(roles.model, input_ids=IDS, response_mask=MASK)
    (policy * value.exp()).sum().backward()
    assert all(p.grad is None for p in roles.adapter_parameters("policy"))


def test_after_the_base_alone_was_asked_every_trained_role_still_trains(
    tiny: Model, lora: Lora
) -> None:
    roles = two_roles(tiny, lora)
    trained = {name: len(roles.parameters(name)) for name in ("policy", "value")}
    logprobs(roles, "reference")
    assert {name: len(roles.parameters(name)) for name in trained} == trained
    with roles.model.disable_adapter():  # PEFT's: only the active adapter comes back trainable
        pass
    assert len(roles.parameters("policy")) + len(roles.parameters("value")) < 2 * len(
        roles.adapter_parameters("policy")
    )


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_recomputed_activations_are_those_of_the_role_that_ran_forward(
    folder: Path, lora: Lora, variant: str
) -> None:
    lora = replace(lora, name=variant)
    roles = two_roles(model_settings(folder), lora)
    joint_loss(roles).backward()
    plain = gradients(roles)
    roles.recompute()
    with roles.role("value"):  # whichever is at work when the backward pass comes
        joint_loss(roles).backward()
    for key, gradient in gradients(roles).items():
        assert torch.allclose(gradient, plain[key], rtol=1e-4, atol=1e-6), key


def test_recomputation_without_our_context_gives_wrong_gradients(tiny: Model, lora: Lora) -> None:
    roles = two_roles(tiny, lora)
    joint_loss(roles).backward()
    plain = gradients(roles)
    roles.same_role = lambda: (nullcontext(), nullcontext())  # type: ignore[method-assign]
    roles.recompute()
    with roles.role("value"):
        joint_loss(roles).backward()
    wrong = [
        key
        for key, gradient in gradients(roles).items()
        if not torch.allclose(gradient, plain[key], rtol=1e-4, atol=1e-6)
    ]
    assert wrong


def test_recomputation_really_happens_and_spares_sampling_its_cache(
    tiny: Model, lora: Lora
) -> None:
    roles = two_roles(tiny, lora)
    calls = []
    layer = roles.model.get_base_model().model.layers[0].mlp
    layer.register_forward_hook(lambda *_: calls.append(1))
    roles.recompute()
    joint_loss(roles).backward()
    assert len(calls) > 2  # once a role in forward, and again
    with torch.no_grad(), roles.role("policy") as model:
        out = model(input_ids=IDS, use_cache=True)
    assert out.past_key_values.get_seq_length() == IDS.shape[1]


def test_two_forward_passes_are_bit_identical_in_every_role(tiny_folder: Path, lora: Lora) -> None:
    folder = tiny_folder
    roles = two_roles(model_settings(folder), replace(lora, dropout=0.5))
    for name in ("policy", "value", "reference"):
        assert torch.equal(logprobs(roles, name), logprobs(roles, name))


def test_after_a_pass_of_the_base_alone_training_keeps_its_gradient_through_4_bit_weights(
    tiny_nf4: Model, lora: Lora
) -> None:
    roles = two_roles(tiny_nf4, lora)
    joint_loss(roles).backward()
    first = gradients(roles)
    with torch.no_grad():
        logprobs(roles, "reference")
    joint_loss(roles).backward()
    for key, gradient in gradients(roles).items():
        assert torch.equal(gradient, first[key]), key


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_the_sum_in_one_product_is_pefts(
    tmp_path: Path, architecture: str, dtype: str, quantization: str
) -> None:
    """Values and gradients; 8-bit layers keep PEFT's own pass."""
    folder = save_tiny(tmp_path, architecture)
    settings = replace(model_settings(folder, quantization=quantization), dtype=dtype)
    found = []
    for fused in (True, False):
        roles = two_roles(settings, Lora(
            name="lora", rank=4, alpha=12, dropout=0.0, target_modules="all-linear"
        ))  # fmt: skip
        layers = [layer for layer in roles.layers if layer.lora_variant]
        assert bool(layers) == (quantization != "int8")
        if not fused:
            for layer in layers:
                layer.lora_variant.clear()
        values = logprobs(roles, "policy")
        joint_loss(roles).backward()
        found.append((values.detach(), gradients(roles)))
    (ours, grown), (theirs, expected) = found
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(ours, theirs, **close)
    for key, value in expected.items():
        off = (grown[key] - value).norm() / value.norm()
        assert float(off) < (1e-4 if dtype == "float32" else 0.2), key


def test_the_gradient_of_the_sum_is_not_copied(tiny: Model, lora: Lora) -> None:
    """Autograd's way of writing into a view copies it twice, which is a tenth of a backward
    pass.
    """
    roles = two_roles(tiny, lora)
    layer = next(layer for layer in roles.layers if layer.lora_variant)
    with roles.role("policy"):
        found = layer(torch.ones(1, 2, layer.in_features, requires_grad=True))
    assert type(found.grad_fn).__name__ == "SumBackward"


def test_layers_that_would_draw_dropout_are_not_recomputed(lora: Lora, tmp_path: Path) -> None:
    """OPT's: the flag that arms recomputation is the one that its dropout reads."""
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "ffn_dim": 96, "num_attention_heads": 4}
    config = OPTConfig(**shape, vocab_size=128, word_embed_proj_dim=64, dropout=0.1)
    roles = Roles(OPTForCausalLM(config).eval())
    roles.add("policy", settings=lora, seed=0)
    with torch.no_grad():
        one, other = (logprobs(roles, "policy") for _ in range(2))
    assert torch.equal(one, other)
    with pytest.raises(StageError, match=r"type algorithm\.gradient_checkpointing=false"):
        roles.recompute()


def test_a_step_at_a_small_learning_rate_moves_adapters_on_a_bf16_base(
    tiny: Model, lora: Lora
) -> None:
    roles = two_roles(replace(tiny, dtype="bfloat16"), lora)
    before = [p.detach().clone() for p in roles.parameters("policy")]
    assert {p.dtype for p in before} == {torch.float32}
    optimizer = torch.optim.AdamW(roles.parameters("policy"), lr=1e-6, weight_decay=0.0)
    logprobs(roles, "policy").sum().backward()
    optimizer.step()
    moved = [
        (a != b).float().mean() for a, b in zip(before, roles.parameters("policy"), strict=True)
    ]
    assert min(moved) > 0.9


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_frozen_adapter_costs_the_bases_precision_and_a_trained_one_keeps_float32(
    tiny: Model, lora: Lora, tmp_path: Path, quantization: str, variant: str
) -> None:
    """DoRA's magnitudes among them; whichever role comes last, no trained weight is rounded."""
    roles = Roles(load_model(replace(tiny, quantization=quantization, dtype="bfloat16")))
    roles.add("policy", settings=replace(lora, name=variant), seed=0)
    stirred(roles, "policy", seed=1)
    save_adapter(roles.model, tmp_path, name="policy")
    roles.load("reward", tmp_path)
    roles.load("resumed", tmp_path, trained=True)
    roles.copy("value", "reward")
    roles.load("other", tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    kinds = {"lora_A", "lora_B", *(["lora_magnitude_vector"] if variant == "dora" else [])}
    assert {kind for kind in kinds if any(kind in key for key in state)} == kinds
    for name in ("policy", "resumed", "value", "reward", "other"):
        trained = name not in ("reward", "other")
        own = get_peft_model_state_dict(roles.model, adapter_name=name)
        assert {w.dtype for w in own.values()} == {torch.float32 if trained else torch.bfloat16}
        assert {p.requires_grad for p in roles.adapter_parameters(name)} == {trained}
        saved = {k: w if name in ("policy", "resumed") else w.bfloat16() for k, w in state.items()}
        assert own.keys() == saved.keys() and all(
            torch.equal(own[key].float(), weight.float()) for key, weight in saved.items()
        ), name


def test_adapters_on_a_bf16_base_multiply_in_bf16_and_learn_in_float32(
    tiny: Model, lora: Lora
) -> None:
    """Recomputed activations are of the same types, so the gradients are the same bit for bit."""
    found = []
    for recomputed in (False, True):
        roles = two_roles(replace(tiny, dtype="bfloat16"), lora)
        if recomputed:
            roles.recompute()
        seen: list[torch.dtype] = []
        for name, module in roles.model.named_modules():
            if name.endswith(".lora_A.policy"):
                module.register_forward_hook(
                    lambda m, given, out, seen=seen: seen.append(out.dtype)
                )
        joint_loss(roles).backward()
        assert set(seen) == {torch.bfloat16}
        found.append(gradients(roles))
        assert {g.dtype for g in found[-1].values()} == {torch.float32}
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_saved_role_is_plain_peft_and_comes_back_the_same(
    folder: Path, lora: Lora, variant: str, tmp_path: Path
) -> None:
    roles = two_roles(model_settings(folder), replace(lora, name=variant))
    save_adapter(roles.model, tmp_path / "saved", name="policy")
    with torch.no_grad():
        expected = logprobs(roles, "policy")
        loaded = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            str(tmp_path / "saved"),
        )
        found = token_logprobs(loaded.eval(), input_ids=IDS, response_mask=MASK)
        assert torch.allclose(found, expected, atol=1e-6)
        again = Roles(load_model(model_settings(folder)))
        again.load("other", tmp_path / "saved")
        assert torch.allclose(logprobs(again, "other"), expected, atol=1e-6)
        assert again.parameters("other") == []


def test_a_copied_role_starts_alike_and_then_goes_its_own_way(tiny: Model, lora: Lora) -> None:
    roles = two_roles(tiny, lora)
    roles.copy("critic", "policy")
    with torch.no_grad():
        before = logprobs(roles, "policy")
        assert torch.equal(logprobs(roles, "critic"), before)
    optimizer = torch.optim.SGD(roles.parameters("critic"), lr=0.1)
    logprobs(roles, "critic").sum().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(logprobs(roles, "policy"), before)
        assert not torch.allclose(logprobs(roles, "critic"), before)


def test_a_head_counts_in_float32_on_a_bf16_base(tiny: Model, lora: Lora) -> None:
    roles = two_roles(replace(tiny, dtype="bfloat16"), lora)
    head = Head(torch.randn(64, generator=torch.Generator().manual_seed(0)), bias=0.5)
    roles.attach("marks", "value", head=head)
    with torch.no_grad(), roles.role("marks") as model:
        hidden = last_hidden(model, IDS)
        found = roles.head("marks")(hidden)
    assert hidden.dtype == torch.bfloat16 and found.dtype == torch.float32
    expected = (hidden.double() * head.weight.double()).sum(-1) + 0.5
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert [id(p) for p in roles.parameters("marks")] == [id(p) for p in head.parameters()]


def test_an_adapter_of_another_shape_is_refused_in_one_line(
    tiny: Model, lora: Lora, tmp_path: Path
) -> None:
    other = Roles(load_model(model_settings(save_tiny(tmp_path / "wide", hidden_size=128))))
    other.add("policy", settings=lora, seed=0)
    save_adapter(other.model, tmp_path / "saved", name="policy")
    roles = two_roles(tiny, lora)
    with pytest.raises(StageError, match="does not fit the base model") as raised:
        roles.load("reward", tmp_path / "saved")
    assert "\n" not in str(raised.value)
    with pytest.raises(StageError, match="no adapter stands there"):
        roles.load("reward", tmp_path / "nothing")


def test_a_role_with_a_model_of_its_own_runs_that(tiny: Model, lora: Lora) -> None:
    roles = Roles(load_model(tiny))
    own = load_model(tiny)
    own.requires_grad_(True)
    roles.bind("policy", model=own)
    roles.bind("reference")
    logprobs(roles, "policy").sum().backward()
    assert len(roles.parameters("policy")) == len(list(own.parameters()))
    assert all(p.grad is None for p in roles.model.parameters())


def test_the_hash_sees_a_changed_base_weight_and_no_changed_adapter(
    tiny: Model, lora: Lora
) -> None:
    roles = two_roles(tiny, lora)
    before = weights_hash(roles.model)
    stirred(roles, "policy", seed=5)
    assert weights_hash(roles.model) == before
    with torch.no_grad():
        roles.model.get_base_model().model.norm.weight[0] += 1e-3
    assert weights_hash(roles.model) != before


def test_state_has_the_adapters_names_only_where_peft_wants_them(tiny: Model, lora: Lora) -> None:
    roles = two_roles(tiny, lora)
    keys = get_peft_model_state_dict(roles.model, adapter_name="value")
    assert all("value" not in key and ".lora_" in key for key in keys)
