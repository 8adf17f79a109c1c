"""The whole way on the starter, made small: what a run leaves behind, and what cannot lose it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

SMALL = [
    "recipe=dpo", "data.limit=40", "sampler.n=3", "sampler.max_new_tokens=48", "label.k=2",
    "evaluate.limit=24", "evaluate.max_new_tokens=48", "evaluate.precision_samples=4",
    "algorithm.batch_size=8", "algorithm.micro_batch_size=8", "algorithm.epochs=1",
    "algorithm.held_out=0.15", "algorithm.evaluations=3", "sampler.batch_size=48",
    "launch.threads=1",
]  # fmt: skip
STEPS = [
    "prompts", "candidates", "preferences", "reference", "train", "test_prompts", "before", "after",
    "evaluate", "report",
]  # fmt: skip
SHOWN = [
    "config.yaml", "candidates.jsonl", "preferences.jsonl", "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors", "adapter/README.md", "metrics.json", "report.html",
    "events.jsonl",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def start(
    workspace: Path, *words: str, options: tuple[str, ...] = (), small: Sequence[str] = SMALL
) -> subprocess.Popen:
    command = [
        sys.executable, *options, "-m", "align.run", *small, f"workspace={workspace}", *words
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def finish(child: subprocess.Popen) -> str:
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err[-3000:]
    return out


def events(workspace: Path) -> list[dict]:
    lines = (workspace / "dpo" / "latest" / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def made(workspace: Path) -> list[str]:
    return [event["step"] for event in events(workspace) if event["event"] == "made"]


def metrics(workspace: Path) -> dict[str, float]:
    return json.loads((workspace / "dpo" / "latest" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    workspace = tmp_path_factory.mktemp("undisturbed")
    finish(start(workspace))
    return workspace


def test_a_run_leaves_what_others_build_on(finished):
    latest = finished / "dpo" / "latest"
    assert made(finished) == STEPS
    assert not [name for name in SHOWN if not (latest / name).is_file()]
    found = metrics(finished)
    wanted = "win_rate win_rate_low win_rate_high n correct_before correct_after kl length_before"
    assert not [key for key in wanted.split() if f"evaluate/{key}" not in found]
    assert all(isinstance(value, int | float) for value in found.values())
    assert found["evaluate/n"] == 24
    shares = {k: v for k, v in found.items() if not k.endswith("/n")}
    fractions = [v for k, v in shares.items() if "rate" in k or "correct" in k]
    assert all(0 <= value <= 1 for value in fractions)
    assert not list((finished / "artifacts").rglob("*.bin")), "no pickle stays behind"
    adapter = Path(next(e["artifact"] for e in events(finished) if e.get("step") == "train"))
    manifest = json.loads((adapter / "manifest.json").read_text())
    assert manifest["counts"] == {"reference": "base model, adapter off"}


def test_the_same_command_again_does_nothing_quickly_and_says_so(finished):
    started = time.monotonic()
    child = start(finished, options=("-X", "importtime"))
    out, err = child.communicate(timeout=60)
    assert time.monotonic() - started < 5
    assert child.returncode == 0 and "everything is up to date" in out
    assert not [line for line in err.splitlines() if line.endswith("| torch")]


def test_kill_9_at_any_moment_and_the_same_command_ends_as_if_undisturbed(finished, tmp_path):
    for step, pause in (("candidates", 4.5), ("reference", 2.5), ("train", 6.0), ("after", 2.0)):
        child = start(tmp_path)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.05)
            log = tmp_path / "dpo" / "latest" / "events.jsonl"
            if log.exists() and f'"step": "{step}"' in log.read_text().rpartition("\n{")[2]:
                time.sleep(pause)
                break
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
    finish(start(tmp_path))
    assert any(event["event"] == "resumed" for event in events(tmp_path))
    assert metrics(tmp_path) == metrics(finished)
    for name in ("candidates.jsonl", "preferences.jsonl", "adapter/adapter_model.safetensors"):
        ours, theirs = (w / "dpo" / "latest" / name for w in (tmp_path, finished))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_another_beta_trains_anew_reuses_the_rest_and_keeps_the_earlier_run(finished, tmp_path):
    workspace = tmp_path / "copy"
    shutil.copytree(finished, workspace, symlinks=True)
    earlier = (workspace / "dpo" / "latest").resolve()
    finish(start(workspace, "algorithm.beta=0.3"))
    assert made(workspace) == ["train", "after", "evaluate", "report"]
    assert (workspace / "dpo" / "latest").resolve() != earlier
    assert (earlier / "report.html").is_file()


def test_a_damaged_artifact_is_set_aside_and_made_again(finished, tmp_path):
    workspace = tmp_path / "copy"
    shutil.copytree(finished, workspace, symlinks=True)
    file = (workspace / "dpo" / "latest" / "candidates.jsonl").resolve()
    whole = file.read_bytes()
    file.write_bytes(whole[:-100] + b"?" * 100)
    out = finish(start(workspace, "stages=[generate]"))
    assert "another sha256" in out and "moved it to" in out
    assert file.read_bytes() == whole
    assert list(file.parent.parent.glob("*.damaged-*/candidates.jsonl"))


def test_retry_makes_anew_only_that_at_which_a_judge_failed(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "runs", symlinks=True)
    words = ["judge@evaluate.judge=scripted", "evaluate.judge.statuses={failed:0.5}"]
    first = finish(start(tmp_path / "runs", *words))
    assert "of 24 pairs; to ask the failed ones again: retry=true" in first
    assert made(tmp_path / "runs") == ["evaluate", "report"]
    finish(start(tmp_path / "runs", *words, "retry=true"))
    assert made(tmp_path / "runs")[2:] == ["evaluate"]  # the script fails at the same ones
    assert list((tmp_path / "runs" / "artifacts" / "evaluate").glob("*.retried-*"))


@pytest.mark.parametrize("moment", [0.2, 0.8, 1.3])
def test_ctrl_c_ends_with_130_and_the_line_that_goes_on(tmp_path, moment):
    """Also within imports, whose libraries report the interrupt as an error of their own."""
    child = start(tmp_path, "name=stopped")
    while not list(tmp_path.glob("artifacts/generate/*/")):
        time.sleep(0.05)
    time.sleep(moment)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "To go on: python -m align.run recipe=dpo" in err and "name=stopped" in err
    assert "Traceback" not in err


def test_two_runs_at_once_share_the_work(tmp_path):
    both = [start(tmp_path, "stages=[generate]") for _ in range(2)]
    said = [finish(child) for child in both]
    assert sum("waiting for it to finish" in out for out in said) >= 1
    assert made(tmp_path) == ["prompts", "candidates"]


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        child = start(small, "stages=[generate]")
        _, err = child.communicate(timeout=120)
        assert child.returncode == 1
        lines = [line for line in err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and "no space left" in lines[0].lower(), err[-2000:]
        assert "Traceback" not in err
        subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
        finish(start(small, "stages=[generate]"))
    finally:
        subprocess.run(["umount", str(small)])


@pytest.mark.parametrize(("bf16_kernel", "tolerance"), [(False, 1e-3), (True, 0.05)])
def test_the_adapter_loads_with_plain_peft_and_scores_the_samplers_own_numbers(
    finished, bf16_kernel, tolerance
):
    """Nothing of ours below: transformers, bitsandbytes and peft alone, on the same NF4 base.

    On CPUs with AVX512-BF16 bitsandbytes rounds to bfloat16 in passes without gradient unless told
    otherwise; as we load the base, it does not.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    latest = finished / "dpo" / "latest"
    base = json.loads((latest / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]
    quantized = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantized, dtype=torch.float32
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and not bf16_kernel:
            module.support_avx512bf16_for_cpu = False
    policy = PeftModel.from_pretrained(model, latest / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    after = next(e["artifact"] for e in events(finished) if e.get("step") == "after")
    for line in (Path(after) / "candidates.jsonl").read_text().splitlines()[:3]:
        row = json.loads(line)
        prompt = tokenizer.apply_chat_template(
            row["messages"], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        answer = row["responses"][0]["tokens"]
        with torch.no_grad():
            logits = policy(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        total = sum(logits[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))
        assert total == pytest.approx(row["responses"][0]["logprob"], abs=tolerance)


@pytest.mark.slow
def test_a_sweep_ends_with_a_table_that_compares_the_runs(tmp_path):
    out = finish(sweep(tmp_path))
    assert "the runs compared" in out
    assert "algorithm.beta=0.05" in out and "algorithm.beta=0.3" in out
    assert len(list((tmp_path / "dpo").glob("*/report.html"))) >= 2


def sweep(workspace: Path) -> subprocess.Popen:
    words = [*SMALL, f"workspace={workspace}", "algorithm.beta=0.05,0.3"]
    return subprocess.Popen(
        [sys.executable, "-m", "align.run", "--multirun", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


@pytest.mark.slow
def test_two_processes_end_like_one(finished, tmp_path):
    finish(start(tmp_path, "launch=accelerate", "launch.processes=2"))
    one, two = metrics(finished), metrics(tmp_path)
    assert two["train/steps"] == one["train/steps"]
    assert two["train/held_out_loss"] == pytest.approx(one["train/held_out_loss"], rel=1e-4)
    assert two["evaluate/kl"] == pytest.approx(one["evaluate/kl"], abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_of_a_launch_outlives_the_command_and_it_goes_on(tmp_path, how):
    words = ("launch=accelerate", "launch.processes=2")

    def ranks() -> list[str]:
        listed = ["pgrep", "-f", f"align.rank {tmp_path}"]
        return subprocess.run(listed, capture_output=True, text=True).stdout.split()

    child = start(tmp_path, *words)
    while len(ranks()) < 3:  # accelerate's launcher and two ranks
        assert child.poll() is None
        time.sleep(0.1)
    time.sleep(10)
    os.killpg(child.pid, how)
    _, err = child.communicate(timeout=60)
    assert child.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in err
    deadline = time.monotonic() + 10
    while ranks() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not ranks()
    finish(start(tmp_path, *words))
    assert metrics(tmp_path)["train/steps"] == 4


@pytest.mark.slow
def test_kill_9_at_twenty_random_moments_ends_as_if_undisturbed(finished, tmp_path):
    draw, kills = random.Random(11), 0
    while kills < 20:
        child = start(tmp_path)
        try:
            child.communicate(timeout=draw.uniform(0.3, 9.0))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.communicate()
            kills += 1
        else:
            assert child.returncode == 0
            shutil.rmtree(tmp_path / "artifacts" / draw.choice(["train", "label", "generate"]))
    finish(start(tmp_path))
    assert metrics(tmp_path) == metrics(finished)
    for name in ("candidates.jsonl", "preferences.jsonl", "adapter/adapter_model.safetensors"):
        ours, theirs = (w / "dpo" / "latest" / name for w in (tmp_path, finished))
        assert ours.read_bytes() == theirs.read_bytes(), name
