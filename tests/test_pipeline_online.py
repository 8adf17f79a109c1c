"""RLHF proper on the starter, made small: from prompts to a policy that learnt from a reward model
of the same run, and a page for each.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.test_pipeline import finish, start

SMALL = [
    "recipe=ppo", "data.limit=24", "sampler.n=2", "sampler.max_new_tokens=32",
    "sampler.batch_size=48", "label.k=1", "reward.batch_size=4", "reward.micro_batch_size=4",
    "reward.held_out=0.3", "reward.evaluations=1", "algorithm.iterations=2", "algorithm.prompts=4",
    "algorithm.samples=2", "algorithm.minibatches=1", "algorithm.max_new_tokens=32",
    "algorithm.held_out=0.2", "algorithm.monitor_every=1", "evaluate.limit=12",
    "evaluate.max_new_tokens=32", "evaluate.precision_samples=0", "evaluate.resamples=100",
    "launch.threads=1",
]  # fmt: skip
STEPS = [
    "prompts", "candidates", "preferences", "reference", "reward", "train", "test_prompts",
    "before", "after", "evaluate", "report",
]  # fmt: skip
SHOWN = [
    "preferences.jsonl", "reward_model/adapter_model.safetensors", "reward_model/reward.json",
    "reward.html", "adapter/adapter_model.safetensors", "curves.jsonl", "samples.jsonl",
    "metrics.json", "report.html",
]  # fmt: skip


def run(workspace: Path, *words: str) -> str:
    return finish(start(workspace, *words, small=SMALL))


def rows(workspace: Path, name: str) -> list[dict[str, Any]]:
    text = (workspace / "ppo" / "latest" / name).read_text()
    return [json.loads(line) for line in text.splitlines()]


def made(workspace: Path) -> list[str]:
    return [e["step"] for e in rows(workspace, "events.jsonl") if e["event"] == "made"]


def metrics(workspace: Path) -> dict[str, float]:
    return json.loads((workspace / "ppo" / "latest" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workspace = tmp_path_factory.mktemp("online")
    run(workspace)
    return workspace


def test_prompts_become_a_policy_that_learnt_from_a_reward_model_and_a_page_for_each(
    finished: Path,
) -> None:
    latest = finished / "ppo" / "latest"
    assert made(finished) == STEPS
    assert not [name for name in SHOWN if not (latest / name).is_file()]
    assert "train/kl" in (found := metrics(finished)) and found["train/answers"] == 16
    assert 0 <= found["evaluate/win_rate_low"] <= found["evaluate/win_rate"] <= 1
    assert found["evaluate/n"] == 12
    lines = rows(finished, "curves.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-4) and lines[1]["kl"] != 0
    assert all(line["reward_std"] > 0 and line["taught"] == 1 for line in lines)


def test_the_rewards_are_those_that_the_saved_reward_model_gives_to_the_texts(
    finished: Path,
) -> None:
    """By role on the policy's base in training, on a base of its own here."""
    from align.models.scorer import open_scorer
    from align.records import read_messages

    scorer = open_scorer(finished / "ppo" / "latest" / "reward_model", base=None)
    lines = [line for line in rows(finished, "samples.jsonl") if line["finish"] == "eos"]
    found = scorer.scores([(read_messages(line), line["text"]) for line in lines])
    assert found == pytest.approx([line["reward"] for line in lines], abs=1e-3)
    assert max(found) - min(found) > 0.01
    calibrated = [min(1.5, scorer.normalised(raw)) for raw in found]  # reward_clip
    assert calibrated == pytest.approx([line["score"] for line in lines], abs=5e-3)


def test_the_same_command_again_makes_nothing(finished: Path) -> None:
    def written() -> dict[Path, int]:
        manifests = (finished / "artifacts").glob("*/*/manifest.json")
        return {path: path.stat().st_mtime_ns for path in manifests}

    before, latest = written(), (finished / "ppo" / "latest").resolve()
    assert "everything is up to date" in run(finished)
    assert len(before) == len(STEPS) and written() == before
    assert (finished / "ppo" / "latest").resolve() == latest and made(finished) == STEPS


@pytest.mark.slow
def test_another_algorithm_learns_from_the_same_reward_model(
    finished: Path, tmp_path: Path
) -> None:
    workspace = tmp_path / "copy"
    shutil.copytree(finished, workspace, symlinks=True)
    run(workspace, "algorithm=rloo")
    assert made(workspace) == ["train", "after", "evaluate", "report"]
    assert (workspace / "ppo" / "latest" / "reward.html").is_file()
    assert "train/kl" in metrics(workspace) and "evaluate/win_rate" in metrics(workspace)
