"""PPO from beginning to end on a tiny model: every invariant that the design names."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from align.algorithms.online import calibration_questions
from align.algorithms.ppo import monitor, state
from align.algorithms.ppo.experience import POLICY, REWARD, VALUE, passes
from align.algorithms.ppo.run import made
from align.algorithms.ppo.setup import add_value
from align.algorithms.ppo.trainer import Trainer
from align.errors import ConfigError, JudgeError, StageError
from align.launch import free_port
from align.models.adapters import WEIGHTS, load_adapter, without_adapter
from align.models.load import load_model
from align.models.roles import Roles, weights_hash
from align.models.settings import Full, Lora, Model
from align.process_group import Ranks
from align.rewards.function import FunctionReward
from tests.algorithms.ppo.running import LORA, online, settings, train
from tests.conftest import model_settings, save_tiny

ROOT = Path(__file__).parents[3]
ALONE = Ranks(index=0, count=1, device=torch.device("cpu"))


def curves(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "curves.jsonl").read_text().splitlines()]


def left(out: Path) -> dict[str, bytes]:
    """All files but the clock's."""
    files = {p.relative_to(out).as_posix(): p for p in out.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if name != "timing.jsonl"}


def trainer(model: Model, out: Path, **changes: Any) -> Trainer:
    return made(online(model), settings=settings(**changes), out=out, ranks=ALONE)


LEARNING: dict[str, Any] = {
    "iterations": 15, "samples": 8, "prompts": 8, "learning_rate": 2e-2, "beta": 0.0
}  # fmt: skip


def gain(lines: list[dict[str, float]]) -> float:
    """Mean reward of the last three iterations over that of the first three."""
    rewards = [line["reward"] for line in lines]
    return sum(rewards[-3:]) / 3 - sum(rewards[:3]) / 3


@pytest.mark.parametrize("value", ["trunk", "adapter", "none"])
def test_the_reward_is_learnt_with_every_kind_of_value(
    tiny: Model, tmp_path: Path, value: str
) -> None:
    train(tiny, tmp_path, value=value, **LEARNING)
    lines = curves(tmp_path)
    assert gain(lines) > 0.05
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-4) and lines[-1]["kl"] > 0.5
    assert lines[-1]["entropy"] < lines[0]["entropy"]


def test_a_value_adapter_starts_at_the_mean_beside_a_reward_without_a_head(
    tiny: Model, lora: Lora
) -> None:
    roles = Roles(load_model(tiny))
    roles.add(REWARD, settings=lora, seed=1)
    add_value(roles, online(tiny), settings(value="adapter"), None)
    assert roles.bound[VALUE].adapter == VALUE
    assert roles.head(VALUE).weight.abs().sum() == 0 == roles.head(VALUE).bias


def test_in_the_first_step_the_policy_is_the_old_one(tiny: Model, tmp_path: Path) -> None:
    for temperature in (1.0, 0.7):
        (tmp_path / state.STATE).unlink(missing_ok=True)
        run = trainer(tiny, tmp_path, temperature=temperature, minibatches=1, epochs=1)
        run.begin()
        run.iterate(0)
        seen = run.history[0]
        assert seen["ratio_mean"] == pytest.approx(1, abs=1e-5)
        assert seen["ratio_std"] == pytest.approx(0, abs=1e-3)
        assert seen["approx_kl"] == pytest.approx(0, abs=1e-7)
        assert seen["clip_fraction"] == 0
        assert seen["sampler_gap"] < 1e-5
        assert seen["kl"] == pytest.approx(0, abs=1e-4)


def test_the_reference_and_the_base_stand_still(tiny_nf4: Model, tmp_path: Path) -> None:
    run = trainer(tiny_nf4, tmp_path)
    before = weights_hash(run.roles.model)
    run.begin()
    drawn, _ = run.experience(run.questions(0), 0)
    for iteration in range(2):
        run.iterate(iteration)
    again, _ = run.experience(run.questions(0), 0)
    assert weights_hash(run.roles.model) == before
    after = passes(run.roles, drawn.rollouts, settings=run.settings)
    assert torch.equal(after.reference_logprobs, drawn.passes.reference_logprobs)
    assert not torch.equal(after.logprobs, drawn.passes.logprobs)
    assert again.rollouts.rows != drawn.rollouts.rows


@pytest.mark.parametrize("value", ["trunk", "adapter"])
def test_while_the_critic_warms_up_the_policy_does_not_move(
    tiny: Model, tmp_path: Path, value: str
) -> None:
    run = trainer(tiny, tmp_path, critic_warmup=2, value=value)
    run.begin()

    def weights(role: str) -> list[torch.Tensor]:
        return [p.detach().clone() for p in run.roles.parameters(role)]

    policy, critic = weights(POLICY), weights(VALUE)
    for iteration in range(2):
        run.iterate(iteration)
    assert all(map(torch.equal, weights(POLICY), policy))
    assert not all(map(torch.equal, weights(VALUE), critic))
    run.iterate(2)
    assert not all(map(torch.equal, weights(POLICY), policy))


def gradients(model: Model, tmp_path: Path, **changes: Any) -> list[torch.Tensor]:
    """Of the first step, before any clipping."""
    (tmp_path / state.STATE).unlink(missing_ok=True)
    run = trainer(model, tmp_path, max_grad_norm=1e9, minibatches=1, epochs=1, **changes)
    run.begin()
    kept: list[torch.Tensor] = []

    def keep(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            kept.extend(p.grad.clone() for p in group["params"])

    run.learner.optimizer.register_step_pre_hook(keep)
    run.iterate(0)
    return kept


@pytest.mark.parametrize("value", ["trunk", "adapter"])
def test_no_split_into_micro_batches_changes_the_gradient(
    tiny: Model, tmp_path: Path, value: str
) -> None:
    whole = gradients(tiny, tmp_path, micro_batch_tokens=100_000, value=value)
    parts = gradients(tiny, tmp_path, micro_batch_tokens=60, value=value)
    assert whole and len(whole) == len(parts)
    for one, other in zip(whole, parts, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_recomputing_activations_changes_no_gradient(tiny: Model, tmp_path: Path) -> None:
    plain = gradients(tiny, tmp_path, value="adapter")
    again = gradients(tiny, tmp_path, value="adapter", gradient_checkpointing=True)
    for one, other in zip(plain, again, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


def test_every_row_comes_once_an_epoch_and_groups_stay_whole() -> None:
    from align.algorithms.ppo.learner import minibatches

    groups = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4])
    orders = set()
    for epoch in range(4):
        parts = list(minibatches(groups, count=2, key=(0, 7, epoch)))
        assert sorted(row for part in parts for row in part) == list(range(15)) and len(parts) == 2
        sides = [set(groups[part].tolist()) for part in parts]
        assert not sides[0] & sides[1]
        orders.add(str(sides))
    assert len(orders) > 1


def test_epochs_end_early_when_the_policy_has_moved_far(tiny: Model, tmp_path: Path) -> None:
    run = trainer(tiny, tmp_path, epochs=8, target_kl=1e-4)
    run.begin()
    run.iterate(0)
    assert run.history[0]["stopped_early"] == 1 and run.history[0]["steps"] < 16


def test_a_policy_that_has_moved_too_far_makes_no_further_step(tiny: Model, tmp_path: Path) -> None:
    """The second epoch finds it: what is left is what one epoch leaves."""
    ended = []
    for name, epochs, target in (("held", 2, 1e-6), ("one", 1, None), ("free", 2, None)):
        out = train(
            tiny, tmp_path / name, epochs=epochs, target_kl=target, minibatches=1, iterations=1,
            monitor_every=9,
        )  # fmt: skip
        ended.append((curves(out)[0], (out / "adapter" / WEIGHTS).read_bytes()))
    (held, weights), (_, one), (_, free) = ended
    assert held["stopped_early"] == 1 and held["steps"] == 1
    assert weights == one != free


def test_answers_of_every_iteration_differ_and_prompts_come_round(
    tiny: Model, tmp_path: Path
) -> None:
    run = trainer(tiny, tmp_path)
    turns = [[q.prompt.id for q in run.questions(iteration)] for iteration in range(20)]
    assert all(len(set(turn)) == 4 for turn in turns)  # of ten: two an epoch are left out
    assert all(not set(turns[i]) & set(turns[i + 1]) for i in range(0, 20, 2))
    assert len({prompt for turn in turns for prompt in turn}) == 10
    assert turns[:2] != turns[2:4]
    one, _ = run.experience(run.questions(0), 0)
    other, _ = run.experience(run.questions(0), 1)
    assert [r.completion for r in one.rollouts.rows] != [r.completion for r in other.rollouts.rows]


def test_the_files_that_are_left_can_be_used_and_run_no_code(tiny: Model, tmp_path: Path) -> None:
    train(tiny, tmp_path, value="adapter")
    assert sorted(left(tmp_path)) == [
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "counts.json",
        "curves.jsonl", "metrics.json", "samples.jsonl", "value/adapter_config.json",
        "value/adapter_model.safetensors", "value/head.safetensors",
        "warnings.jsonl",
    ]  # fmt: skip
    told = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(told) == 4 * 4 and {"id", "text", "reward", "score", "kl"} <= told[0].keys()
    for step in range(4):
        scores = [line["score"] for line in told if line["step"] == step + 1]
        assert scores == sorted(scores)
    assert json.loads((tmp_path / "counts.json").read_text())["reference"].startswith("base")


@pytest.mark.parametrize("value", ["trunk", "adapter"])
def test_killed_at_every_iteration_and_resumed_is_undisturbed_bit_for_bit(
    tiny_nf4: Model, tmp_path: Path, value: str
) -> None:
    changes: dict[str, Any] = {
        "value": value, "kl_target": 0.5, "monitor_every": 1, "schedule": "cosine",
        "reward": "tests.algorithms.ppo.running:chance",
    }  # fmt: skip
    random.seed(0)
    numpy.random.seed(0)
    whole = left(train(tiny_nf4, tmp_path / "whole", **changes))
    for seed in range(4):  # the first start as above, the others as a new process has it
        random.seed(seed)
        numpy.random.seed(seed)
        run = trainer(tiny_nf4, tmp_path / "cut", **changes)
        (tmp_path / "cut").mkdir(exist_ok=True)
        run.begin()
        run.iterate(run.iteration)  # and the process ends
    assert left(train(tiny_nf4, tmp_path / "cut", **changes)) == whole


def test_sigkill_in_the_middle_of_an_iteration_loses_nothing(
    tiny_folder: Path, tmp_path: Path
) -> None:
    words = ["iterations=6", "checkpoint_every=2"]

    def start(out: Path) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "tests.algorithms.ppo.running", str(tiny_folder), "none"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([*command, str(out), *words], env=environment, cwd=ROOT)

    cut = start(tmp_path / "cut")
    deadline = time.monotonic() + 120
    while not (tmp_path / "cut" / state.STATE).exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    cut.send_signal(signal.SIGKILL)
    cut.wait()
    assert not (tmp_path / "cut" / "metrics.json").exists()
    assert start(tmp_path / "cut").wait() == 0
    assert start(tmp_path / "whole").wait() == 0
    assert left(tmp_path / "cut") == left(tmp_path / "whole")


def test_a_damaged_checkpoint_is_one_line(tiny: Model, tmp_path: Path) -> None:
    run = trainer(tiny, tmp_path)
    run.begin()
    run.iterate(0)
    path = tmp_path / state.STATE
    whole = path.read_bytes()
    for damaged in (whole[:-100], b"\0" * 100 + whole[100:], b"no zip", b""):
        path.write_bytes(damaged)
        with pytest.raises(StageError, match="damaged checkpoint") as raised:
            trainer(tiny, tmp_path).begin()
        assert "\n" not in str(raised.value)


def test_an_iteration_without_a_single_reward_ends_the_run_and_keeps_the_checkpoint(
    tiny: Model, tmp_path: Path
) -> None:
    run = trainer(tiny, tmp_path)
    run.begin()
    run.iterate(0)
    run.source = FunctionReward("tests.algorithms.ppo.running:nothing")
    with pytest.raises(StageError, match="none of the 8 answers of this iteration has a reward"):
        run.iterate(1)
    again = trainer(tiny, tmp_path)
    again.begin()
    assert again.iteration == 1


def test_a_judge_that_cannot_watch_does_not_end_the_training(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers that are the reference's are a tie that it is not even asked about."""
    asked: list[int] = []

    async def refused(comparisons: Any, *, settings: Any) -> Any:
        asked.append(len(comparisons))
        if comparisons:
            raise JudgeError("the budget is spent")
        for _ in comparisons:
            yield

    monkeypatch.setattr(monitor, "verdicts_of", refused)
    given = online(tiny, monitor="a judge")
    run = made(given, settings=settings(**LEARNING), out=tmp_path, ranks=ALONE)
    run.begin()
    assert run.monitor.measure()["eval_win_rate"] == 0.5 and asked == [0]
    for iteration in range(4):
        run.iterate(iteration)
    told = capsys.readouterr().err
    assert "training goes on: the budget is spent" in told and asked[-1] > 0
    assert "eval_win_rate" not in run.history[1] and "eval_reward" in run.history[1]


def test_every_process_has_a_prompt_to_calibrate_on(tiny: Model) -> None:
    given = online(tiny)
    assert len(calibration_questions(given, samples=64, least=8)) == 8
    few = calibration_questions(given, samples=64)
    assert len(few) == 4 and few != given.questions[:4]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"kl_target": 1.0, "beta": 0.0}, r"algorithm\.kl_target=1: .*; type algorithm\.beta="),
        ({"critic_warmup": 4}, r"algorithm\.critic_warmup=4: the policy would stand still"),
    ],
)
def test_settings_that_undo_each_other_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        settings(**changes)


def test_two_processes_make_the_steps_of_one(tiny_folder: Path, tmp_path: Path) -> None:
    """Loss, whitening, rewards and the final adapter, within rounding; with answers of all lengths,
    some without a reward, micro-batches that do not go round, and epochs that end early.
    """
    module = ["-m", "tests.algorithms.ppo.running", str(tiny_folder), "none"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [
        "iterations=3", "value=adapter", "micro_batch_tokens=80", "epochs=4", "target_kl=0.02",
        "reward=tests.algorithms.ppo.running:picky", "ragged=true", "max_new_tokens=36",
        "truncated=penalty",
    ]  # fmt: skip
    subprocess.run(
        [sys.executable, *module, str(tmp_path / "one"), *words],
        check=True, env=environment, cwd=ROOT,
    )  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    subprocess.run(
        [sys.executable, *launcher, f"--master_port={free_port()}", *module,
         str(tmp_path / "two"), *words],
        check=True, env=environment, cwd=ROOT, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    for one, two in zip(curves(tmp_path / "one"), curves(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert two[key] == pytest.approx(one[key], rel=2e-3, abs=2e-4), key
    assert any("stopped_early" in line for line in curves(tmp_path / "one"))
    assert any(line["taught"] < 1 for line in curves(tmp_path / "one"))
    assert any(0 < line["eos_rate"] < 1 for line in curves(tmp_path / "one"))
    for folder in ("adapter", "value"):
        one = load_file(tmp_path / "one" / folder / "adapter_model.safetensors")
        two = load_file(tmp_path / "two" / folder / "adapter_model.safetensors")
        for key in one:
            assert torch.allclose(one[key], two[key], rtol=2e-2, atol=2e-4), key


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_other_architectures_and_adapters_learn(
    tmp_path: Path, architecture: str, variant: str
) -> None:
    model = model_settings(save_tiny(tmp_path / "model", architecture), quantization="nf4")
    given = online(model, lora=replace(LORA, name=variant))
    lines = curves(train(model, tmp_path / "out", given=given, **LEARNING))
    assert gain(lines) > 0.05
    assert lines[0]["sampler_gap"] < 1e-4


def test_all_weights_can_be_trained_and_the_model_that_is_left_is_whole(
    tiny: Model, tmp_path: Path
) -> None:
    given = online(tiny, lora=Full(name="full"))
    before = weights_hash(given.base)
    out = train(
        tiny, tmp_path, given=given, **{**LEARNING, "learning_rate": 1e-3, "iterations": 30}
    )
    assert gain(curves(out)) > 0.05 and weights_hash(given.base) == before
    whole = load_adapter(given.base, out / "adapter")
    assert weights_hash(whole) != before
    with torch.no_grad(), without_adapter(whole, given.base) as base:
        assert base is given.base
    with pytest.raises(ConfigError, match="adapter=full describes none"):
        made(given, settings=settings(value="adapter"), out=tmp_path / "x", ranks=ALONE)


def test_more_prompts_than_there_are_is_one_line(tiny: Model, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"algorithm\.prompts=11: more than the 10 prompts"):
        trainer(tiny, tmp_path, prompts=11)


def test_with_dropout_in_the_adapter_two_passes_are_alike_before_and_after_a_step(
    tiny: Model, tmp_path: Path
) -> None:
    dropping = Lora(name="lora", rank=4, alpha=8, dropout=0.5, target_modules="all-linear")
    run = made(online(tiny, lora=dropping), settings=settings(), out=tmp_path, ranks=ALONE)
    run.begin()
    for iteration in range(2):
        run.iterate(iteration)
        assert run.history[-1]["sampler_gap"] < 1e-5
        drawn = run.experience(run.questions(0), 0)[0].rollouts
        one, other = (passes(run.roles, drawn, settings=run.settings) for _ in range(2))
        assert torch.equal(one.logprobs, other.logprobs)
