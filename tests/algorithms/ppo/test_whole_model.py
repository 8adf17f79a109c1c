"""All weights of a GPT-2 are trained, and the dropout of its configuration never draws."""

from pathlib import Path
from typing import Any

import pytest
import torch

from align.algorithms.ppo.experience import POLICY, passes
from align.algorithms.ppo.run import made
from align.algorithms.ppo.trainer import Trainer
from align.models.roles import weights_hash
from align.models.settings import Full, Lora, Model
from tests.algorithms.ppo.running import online, settings, train
from tests.algorithms.ppo.test_experience import reward_folder
from tests.algorithms.ppo.test_trainer import ALONE, LEARNING, curves, gain, left
from tests.conftest import model_settings, save_tiny

FULL = Full(name="full")
DROPPING: dict[str, Any] = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("gpt2"), "gpt2", **DROPPING)


@pytest.fixture
def gpt2(folder: Path) -> Model:
    return model_settings(folder)


def begun(model: Model, out: Path, *, reward_model: Path | None = None, **changes: Any) -> Trainer:
    given = online(model, lora=FULL, reward_model=reward_model)
    out.mkdir(exist_ok=True)
    changes = {"learning_rate": 1e-3, "minibatches": 1, "epochs": 1, **changes}
    run = made(given, settings=settings(**changes), out=out, ranks=ALONE)
    run.begin()
    return run


def test_dropout_in_the_policys_and_the_rewards_weights_never_draws(
    gpt2: Model, tmp_path: Path
) -> None:
    """Two passes of each are equal bit for bit, before a step and after it; the reward role's are
    those from before it.
    """
    dropping = Lora(name="lora", rank=4, alpha=8, dropout=0.5, target_modules="all-linear")
    folder = reward_folder(gpt2, dropping, tmp_path / "reward", mean=0.0, std=3.0)
    run = begun(gpt2, tmp_path / "out", reward_model=folder, reward="role")
    drawn, samples = run.experience(run.questions(0), 0)
    scores = run.source.scores(samples)
    seen = []
    for iteration in range(2):
        for _ in range(2):
            seen.append(passes(run.roles, drawn.rollouts, settings=run.settings).logprobs)
            assert run.source.scores(samples) == scores
        run.iterate(iteration)
        # What learns is what sampled, so the first step's ratio is 1.
        assert run.history[-1]["sampler_gap"] < 1e-5 and run.history[-1]["approx_kl"] < 1e-7
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[0], seen[2])
    # There is dropout that could.
    for model in (run.roles.bound[POLICY].model, run.roles.model):
        model.train()
    assert run.source.scores(samples) != scores
    assert not torch.equal(
        passes(run.roles, drawn.rollouts, settings=run.settings).logprobs, seen[2]
    )


def first_gradients(model: Model, out: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Of the first step, by weight and before any clipping."""
    run = begun(model, out, max_grad_norm=1e9, **changes)
    whole, armed = run.roles.bound[POLICY].model, []
    layer = whole.transformer.h[0].mlp
    layer.register_forward_pre_hook(lambda *_: armed.append(torch.is_grad_enabled()))
    kept: dict[str, torch.Tensor] = {}

    def keep(*_: Any) -> None:
        kept.update({key: p.grad.clone() for key, p in whole.named_parameters()})

    run.learner.optimizer.register_step_pre_hook(keep)
    run.iterate(0)
    assert armed.count(True) == (2 if run.settings.gradient_checkpointing else 1)
    return kept


def test_recomputing_activations_changes_no_gradient_of_a_whole_model(
    gpt2: Model, tmp_path: Path
) -> None:
    plain = first_gradients(gpt2, tmp_path / "plain")
    again = first_gradients(gpt2, tmp_path / "again", gradient_checkpointing=True)
    assert plain.keys() == again.keys() and len(plain) > 20
    for key, gradient in plain.items():
        assert bool(gradient.any()), key
        torch.testing.assert_close(again[key], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_whole_model_learns_and_the_reference_stays(
    gpt2: Model, tmp_path: Path, recomputed: bool
) -> None:
    changes = {**LEARNING, "iterations": 7, "learning_rate": 1e-3, "max_new_tokens": 1}
    given = online(gpt2, lora=FULL)
    before = weights_hash(given.base)
    out = train(gpt2, tmp_path, given=given, gradient_checkpointing=recomputed, **changes)
    lines = curves(out)
    assert gain(lines) > 0.1 and lines[-1]["kl"] > 0.5
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-4) and weights_hash(given.base) == before


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
def test_eight_bit_states_move_the_weights_and_are_resumed_bit_for_bit(
    gpt2: Model, tmp_path: Path
) -> None:
    changes = {"optimizer": "paged_adamw_8bit", "iterations": 2}
    run = begun(gpt2, tmp_path / "cut", **changes)
    before = [p.detach().clone() for p in run.roles.parameters(POLICY)]
    run.iterate(0)
    assert not any(map(torch.equal, run.roles.parameters(POLICY), before))
    states = run.learner.optimizer.state.values()
    assert {torch.uint8, torch.float32} == {state["state1"].dtype for state in states}
    for name in ("cut", "whole"):
        run = begun(gpt2, tmp_path / name, **changes)
        for iteration in range(run.iteration, 2):
            run.iterate(iteration)
        run.close()
    assert left(tmp_path / "cut") == left(tmp_path / "whole")
