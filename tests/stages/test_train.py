"""The train stage survives SIGKILL, and does the same work in one process or in two."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from align.errors import StageError
from align.launch import free_port
from align.models.settings import Model
from align.split import is_held_out
from align.stages import hold_out, reference, train
from tests.stages.pairs import ALGORITHM, reference_stage, train_stage, write_preferences

ROOT = Path(__file__).parent.parent.parent
SCRIPT = "tests.stages.pairs"


@pytest.fixture
def scored(tiny_nf4: Model, tmp_path: Path) -> Path:
    """A finished reference stage on the tiny model in 4 bits."""
    out = tmp_path / "reference"
    out.mkdir()
    preferences = write_preferences(tmp_path / "preferences")
    reference.run(reference_stage(tiny_nf4), {"preferences": preferences}, out)
    return out


def command(model: Model, scored: Path, out: Path) -> list[str]:
    return ["-m", SCRIPT, model.name, model.quantization, str(scored), str(out)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def left(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def curves(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "curves.jsonl").read_text().splitlines()]


def test_all_pairs_of_a_prompt_are_on_one_side(scored: Path) -> None:
    data = train.split(scored, share=0.3, seed=0)
    trained = {data.train[i]["id"] for i in range(len(data.train))}
    held_out = {data.held_out[i]["id"] for i in range(len(data.held_out))}
    assert len(data.train) == 2 * len(trained) and len(data.held_out) == 2 * len(held_out)
    assert not trained & held_out and len(trained | held_out) == 16
    keys = {data.held_out[i]["prompt"] for i in range(len(data.held_out))}
    assert len(keys) == len(held_out) and all(is_held_out(key, 0.3) for key in keys)


def test_pairs_with_numbers_for_ids_are_kept_together_by_their_prompt(
    tiny: Model, tmp_path: Path
) -> None:
    """Files of pairs often number their lines; what is trained on must not be measured on."""
    folder = write_preferences(tmp_path / "preferences", prompts=16, pairs=3)
    lines = [json.loads(line) for line in (folder / "preferences.jsonl").read_text().splitlines()]
    numbered = [json.dumps({**line, "id": str(i)}) for i, line in enumerate(lines)]
    (folder / "preferences.jsonl").write_text("\n".join(numbered))
    out = tmp_path / "reference"
    out.mkdir()
    reference.run(reference_stage(tiny), {"preferences": folder}, out)
    data = train.split(out, share=0.3, seed=0)
    sides = [
        {tuple(side[i]["prompt_ids"]) for i in range(len(side))}
        for side in (data.train, data.held_out)
    ]
    assert not sides[0] & sides[1]
    prompts = list(hold_out.held_out_prompts(folder / "preferences.jsonl", 0.3))
    assert len(prompts) == len(sides[1]), "each once, and the same ones"


def test_a_split_that_leaves_one_side_empty_is_an_error(scored: Path) -> None:
    with pytest.raises(StageError, match=r"algorithm\.held_out=1e-06"):
        train.split(scored, share=1e-6, seed=0)


def test_a_sigkill_in_the_middle_changes_no_bit(
    tiny_nf4: Model, scored: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        out.mkdir()
    child = subprocess.Popen(
        [sys.executable, *command(tiny_nf4, scored, killed)], cwd=ROOT, env=environment()
    )
    # Between the first whole checkpoint and the end.
    deadline = time.monotonic() + 120
    while not list(killed.glob("checkpoints/checkpoint-*/complete")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (killed / "metrics.json").exists()
    for out in (whole, killed):
        train.run(train_stage(tiny_nf4), {"reference": scored}, out)
    assert left(killed) == left(whole)


def test_two_processes_train_as_one(tiny_nf4: Model, scored: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for out in (one, two):
        out.mkdir()
    train.run(train_stage(tiny_nf4), {"reference": scored}, one)
    # accelerate has no flag for several processes on CPUs; its launcher for GPUs takes them with
    # this variable.
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes=2",
        "--num_machines=1",
        "--multi_gpu",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        f"--main_process_port={free_port()}",
    ]
    done = subprocess.run(
        [*launch, *command(tiny_nf4, scored, two)],
        cwd=ROOT,
        env={**environment(), "ACCELERATE_USE_CPU": "true"},
        timeout=240,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert left(one).keys() == left(two).keys()
    for here, there in zip(curves(one), curves(two), strict=True):
        known = {key: value for key, value in here.items() if "accuracy" not in key}
        assert known == pytest.approx({key: there[key] for key in known}, rel=1e-3, abs=1e-3)
    adapter = load_file(one / "adapter" / "adapter_model.safetensors")
    other = load_file(two / "adapter" / "adapter_model.safetensors")
    for name, weight in adapter.items():
        # Adam moves a weight by the learning rate whatever the gradient's size, noise included.
        assert (weight - other[name]).norm() <= 1e-2 * weight.norm() + 1e-3, name


def test_the_reference_is_named_beside_the_adapter(
    tiny_nf4: Model, scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = replace(ALGORITHM, epochs=0.5, evaluations=1)
    train.run(train_stage(tiny_nf4, once), {"reference": scored}, tmp_path)
    assert json.loads((tmp_path / "counts.json").read_text()) == {
        "reference": "base model, adapter off"
    }
    assert "reference: base model, adapter off" in capsys.readouterr().out
