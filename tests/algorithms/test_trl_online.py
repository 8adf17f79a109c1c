"""RLOO and GRPO by TRL's trainers: PPO's answers and rewards, the right adapter at work, and the
same end however often they are killed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from align.algorithms import trl_online
from align.algorithms.trl_answers import Answers
from align.algorithms.trl_conductor import Conductor
from align.errors import ConfigError, StageError
from align.launch import free_port
from align.models.adapters import WEIGHTS, add_lora, save_adapter
from align.models.load import load_model
from align.models.roles import HEAD, Roles, weights_hash
from align.models.settings import Full, Lora, Model
from align.records import Prompt
from align.rewards.role import RoleReward
from tests.algorithms.ppo import running as ppo_running
from tests.algorithms.ppo.running import online
from tests.algorithms.trl_running import settings, train

BOTH = pytest.mark.parametrize("name", ["rloo", "grpo"])
ROOT = Path(__file__).parents[2]
HERE = "tests.algorithms.test_trl_online"
calls: list[list[str]] = []


def long_words(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """Easily learnt: tokens of a large vocabulary differ in length."""
    return [float(len(text)) for text in responses]


def noted(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    calls.append([prompt.id for prompt in prompts])
    return long_words(prompts, responses)


def failing_later(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """As `noted`, until it has been called five times."""
    if len(calls) == 5:
        raise RuntimeError("killed")
    return noted(prompts, responses)


def one_or_none(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
    return [None if i % 3 == 0 else 1.0 for i in range(len(responses))]


def in_full(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
    return long_words(prompts, responses)


def every_third_missing(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
    given: list[float | None] = list(long_words(prompts, responses))
    return [None if i % 3 == 0 else value for i, value in enumerate(given)]


def lines(out: Path, name: str = "curves.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def left(out: Path) -> dict[str, bytes]:
    """What a run leaves, but for clock times."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != "timing.jsonl"]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[Answers]:
    """What a run worked with, after its end."""
    found: list[Answers] = []
    close = trl_online.close

    def keep(answers: Answers, *rest: Any) -> None:
        found.append(answers)
        close(answers, *rest)

    monkeypatch.setattr(trl_online, "close", keep)
    return found


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What TRL logs."""
    found: list[dict[str, float]] = []
    on_log = Conductor.on_log

    def note(self: Any, *given: Any, logs: Any = None, **rest: Any) -> None:
        found.append(dict(logs))
        on_log(self, *given, logs=logs, **rest)

    monkeypatch.setattr(Conductor, "on_log", note)
    return found


def save_reward(model: Model, lora: Lora, folder: Path) -> Path:
    """A reward model that says something: adapter, head and calibration."""
    roles = Roles(load_model(model))
    roles.add("reward", settings=lora, seed=7)
    draw = torch.Generator().manual_seed(7)
    for parameter in roles.adapter_parameters("reward"):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=draw)
    save_adapter(roles.model, folder, name="reward")
    state = load_file(folder / WEIGHTS) | {HEAD: torch.randn(1, 64, generator=draw)}
    save_file(state, folder / WEIGHTS)
    (folder / "reward.json").write_text(json.dumps({"mean": 0.0, "std": 8.0}))
    return folder


@BOTH
def test_what_is_rewarded_is_learnt(name: str, tiny: Model, tmp_path: Path) -> None:
    train(name, tiny, tmp_path, reward=f"{HERE}:long_words", iterations=14, beta=0.0, samples=8)
    rewards = [line["reward"] for line in lines(tmp_path)]
    assert sum(rewards[-3:]) > 1.15 * sum(rewards[:3])
    assert lines(tmp_path)[-1]["kl"] > 0.5


@BOTH
def test_the_first_answers_are_ppos(name: str, tiny: Model, tmp_path: Path) -> None:
    """Same prompts, same sampler, same seeds; and samples, curves and metrics in the same shape."""
    ours = ppo_running.train(tiny, tmp_path / "ppo", iterations=1, samples=4)
    theirs = train(name, tiny, tmp_path / name, iterations=1)
    mine, other = lines(ours, "samples.jsonl"), lines(theirs, "samples.jsonl")
    assert [line["text"] for line in mine] == [line["text"] for line in other]
    assert [line["reward"] for line in mine] == [line["reward"] for line in other]
    assert [list(line) for line in mine] == [list(line) for line in other]
    first, second = lines(ours)[0], lines(theirs)[0]
    for key in ("reward", "kl", "entropy", "length", "eos_rate", "eval_reward"):
        assert key in first and key in second
    assert second["learning_rate"] == first["learning_rate"] > 0
    assert second["entropy"] == pytest.approx(first["entropy"], rel=1e-6)
    metrics = [json.loads((out / "metrics.json").read_text()) for out in (ours, theirs)]
    assert list(metrics[0]) == list(metrics[1])
    assert sorted(left(theirs)) == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "counts.json",
        "curves.jsonl",
        "metrics.json",
        "samples.jsonl",
    ]


@BOTH
def test_trls_reference_is_the_base(
    name: str, tiny: Model, tmp_path: Path, logged: list[dict[str, float]]
) -> None:
    """Its KL, a mean over tokens, is the one that we measure with roles: the adapter is off in its
    reference pass, on in the others, and its prompts are our token ids.
    """
    train(name, tiny, tmp_path, minibatches=1, iterations=3)
    estimate = {"rloo": "kl", "grpo": "kl_k3"}[name]
    for line, trl in zip(lines(tmp_path), logged, strict=False):
        assert trl["kl"] * line["length"] == pytest.approx(line[estimate], rel=1e-3, abs=1e-5)
    assert lines(tmp_path)[-1]["kl_k3"] > 0.01


@BOTH
def test_the_reward_role_stays_frozen_beside_the_policy(
    name: str, tiny: Model, lora: Lora, tmp_path: Path, kept: list[Answers]
) -> None:
    folder = save_reward(tiny, lora, tmp_path / "reward")
    given = replace(online(tiny), reward_model=folder)
    before = weights_hash(given.base)
    train(name, tiny, tmp_path / "out", given=given, reward="role")
    answers = kept[0]
    model = answers.roles.model
    assert weights_hash(model) == before
    assert sorted(model.peft_config) == ["default", "reward"]
    saved = load_file(folder / WEIGHTS)
    for key, value in get_peft_model_state_dict(model, adapter_name="reward").items():
        assert torch.equal(value, saved[key])
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    assert trained and all(".default." in key for key in trained)
    started = Roles(load_model(tiny))
    started.add("default", settings=lora, seed=given.seed)
    moved = zip(
        answers.roles.adapter_parameters("default"), started.adapter_parameters("default"),
        strict=True,
    )  # fmt: skip
    assert all(not torch.equal(now, then) for now, then in moved)
    # What it was paid is what the reward model says by itself.
    alone = Roles(load_model(tiny))
    alone.load("reward", folder)
    assert answers.experience is not None
    expected = torch.tensor(RoleReward(alone).scores(answers.samples))
    torch.testing.assert_close(answers.experience.raw, expected, rtol=1e-4, atol=1e-4)


@BOTH
def test_small_steps_move_every_adapter_on_a_quantized_base(
    name: str, tiny_nf4: Model, lora: Lora, tmp_path: Path, kept: list[Answers]
) -> None:
    train(name, tiny_nf4, tmp_path, learning_rate=1e-6, iterations=3, monitor_every=3)
    started = add_lora(load_model(tiny_nf4), settings=lora, seed=0)
    first = {k: v for k, v in started.named_parameters() if v.requires_grad}
    now = {k: v for k, v in kept[0].roles.model.named_parameters() if v.requires_grad}
    assert first.keys() == now.keys()
    for key, value in now.items():
        assert value.dtype == torch.float32
        assert (value != first[key]).float().mean() > 0.9, key


@BOTH
def test_a_killed_run_ends_as_one_that_was_not(name: str, tiny: Model, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "epochs": 2, "minibatches": 2, "checkpoint_every": 2, "iterations": 5, "prompts": 3,
        "monitor_every": 9,
    }  # fmt: skip
    calls.clear()
    whole = train(name, tiny, tmp_path / "whole", reward=f"{HERE}:noted", **changes)
    killed = tmp_path / "killed"
    calls.clear()  # one for the calibration, one for the first look, then one an iteration
    with pytest.raises(StageError, match="killed"):
        train(name, tiny, killed, reward=f"{HERE}:failing_later", **changes)
    assert len(lines(killed)) == 3 and len(calls) == 5
    calls.clear()
    train(name, tiny, killed, reward=f"{HERE}:noted", **changes)
    assert len(calls) == 4  # iterations 3 to 5 and the last look: calibration is kept
    ours, other = left(whole), left(killed)
    assert ours == {**other, "counts.json": ours["counts.json"]}
    assert [line["step"] for line in lines(killed, "timing.jsonl")] == [1, 2, 3, 4, 5]


def test_a_run_that_is_killed_at_its_very_end_only_closes(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("rloo", tiny, tmp_path / "whole", iterations=2)

    def die(*given: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trl_online, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            train("rloo", tiny, tmp_path / "killed", iterations=2, calibrate=False)
    ended = train("rloo", tiny, tmp_path / "killed", iterations=2)
    assert sorted(left(ended)) == sorted(left(whole))
    again = left(whole)
    train("rloo", tiny, whole, iterations=2)
    assert left(whole) == again


@BOTH
def test_the_answers_to_a_prompt_are_scored_together(
    name: str, tiny: Model, tmp_path: Path
) -> None:
    calls.clear()
    train(name, tiny, tmp_path, reward=f"{HERE}:noted", calibrate=False, monitor_every=9)
    scored = [call for call in calls if len(call) == 16]
    assert len(scored) == 4
    for call in scored:
        groups = [call[i : i + 4] for i in range(0, 16, 4)]
        assert all(len(set(group)) == 1 for group in groups)
        assert len({group[0] for group in groups}) == 4


@BOTH
def test_an_answer_without_a_reward_teaches_nothing(
    name: str, tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(name, tiny, tmp_path, reward=f"{HERE}:every_third_missing", iterations=2)
    assert lines(tmp_path)[-1]["taught"] == pytest.approx(10 / 16)
    assert any(line["reward"] is None for line in lines(tmp_path, "samples.jsonl"))
    told = capsys.readouterr()
    assert "have no reward and teach nothing" in told.err
    assert "All reward functions returned None" not in told.err + told.out


@BOTH
def test_an_answer_without_a_reward_moves_nothing(name: str, tiny: Model, tmp_path: Path) -> None:
    """Neither do those that all got the same: what is left is the adapter of the start."""
    changes = {"calibrate": False, "beta": 0.0, "iterations": 2, "monitor_every": 9}
    out = train(name, tiny, tmp_path, reward=f"{HERE}:one_or_none", **changes)
    line = lines(out)[-1]
    assert 0 < line["taught"] < 1 and line["same_rewards"] == 1
    moved = load_file(out / "adapter" / WEIGHTS)
    assert not any(value.any() for key, value in moved.items() if "lora_B" in key)


def test_a_source_of_rewards_runs_outside_of_mixed_precision(tiny: Model, tmp_path: Path) -> None:
    given = online(replace(tiny, dtype="bfloat16"))
    train("rloo", tiny, tmp_path, given=given, reward=f"{HERE}:in_full", iterations=1)


@BOTH
def test_recomputed_activations_change_nothing(name: str, tiny: Model, tmp_path: Path) -> None:
    plain = train(name, tiny, tmp_path / "plain", iterations=2)
    saving = train(name, tiny, tmp_path / "saving", iterations=2, gradient_checkpointing=True)
    ours, other = (load_file(out / "adapter" / WEIGHTS) for out in (plain, saving))
    for key, value in ours.items():
        torch.testing.assert_close(value, other[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"samples": 1}, "algorithm.samples=1: .*; type algorithm.samples=4"),
        ({"minibatches": 3}, "algorithm.minibatches=3: .*; type algorithm.minibatches=2"),
        ({"truncated": "bootstrap"}, "algorithm.truncated=bootstrap: must be one of"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_loaded(
    changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        settings("grpo", **changes)


def test_a_prompts_answers_are_never_parted_among_processes() -> None:
    assert trl_online.answers_a_step(settings("rloo"), 2) == 4
    with pytest.raises(ConfigError, match=r"algorithm.prompts=4: .*; type algorithm.prompts=6"):
        trl_online.answers_a_step(settings("rloo"), 3)
    with pytest.raises(ConfigError, match=r"type algorithm.minibatches=4"):
        trl_online.answers_a_step(settings("rloo", minibatches=8, prompts=6), 6)


def test_more_prompts_than_there_are_cannot_be_asked_for(tiny: Model, tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"algorithm.prompts=11: .*; type algorithm.prompts=2"):
        train("rloo", tiny, tmp_path, prompts=11)


def test_whole_models_are_left_to_ppo(tiny: Model, tmp_path: Path) -> None:
    given = replace(online(tiny), adapter=Full(name="full"))
    with pytest.raises(ConfigError, match=r"adapter=full: .*; type adapter=lora, or algorithm=ppo"):
        train("rloo", tiny, tmp_path, given=given)


@pytest.mark.slow
@BOTH
def test_two_processes_make_the_steps_of_one(name: str, tiny: Model, tmp_path: Path) -> None:
    train(name, tiny, tmp_path / "one", minibatches=1)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
         f"--master_port={free_port()}", "-m", "tests.algorithms.trl_running", name, tiny.name,
         str(tmp_path / "two"), "minibatches=1"],
        check=True, cwd=ROOT, stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for one, two in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for key in one:
            assert two[key] == pytest.approx(one[key], rel=2e-3, abs=2e-4), key
