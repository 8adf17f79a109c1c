"""Processes: how many threads they take, how they wait, and that none outlives its parent."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from align.config import Launch
from align.launch import accelerate_command, thread_environment, wanted_processes
from align.rank import first_to_say

LAUNCH = Launch(mode="auto", processes=None, threads=None)


def test_waiting_threads_sleep_soon_unless_the_user_says_how_they_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert thread_environment(2) == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "3000"}
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert thread_environment(2) == {"OMP_NUM_THREADS": "2"}


def test_inline_is_one_process_whatever_is_asked() -> None:
    assert wanted_processes(replace(LAUNCH, mode="inline", processes=4)) == 1
    assert wanted_processes(replace(LAUNCH, processes=4)) == 4


def test_several_processes_are_told_to_accelerate_and_one_is_not() -> None:
    assert "--multi_gpu" in accelerate_command(2)
    assert "--multi_gpu" not in accelerate_command(1)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_a_child_dies_with_its_parent_even_by_sigkill() -> None:
    code = (
        "import subprocess, sys, time\n"
        "from align.launch import die_with_parent\n"
        "child = subprocess.Popen(['sleep', '60'], preexec_fn=die_with_parent)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert alive(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def test_telemetry_is_off_before_anything_could_call_home() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "HF_HUB_DISABLE_TELEMETRY"}
    code = "import align, os; from huggingface_hub import constants as c; "
    code += "print(c.HF_HUB_DISABLE_TELEMETRY)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "True"


def test_of_several_processes_with_one_error_one_speaks(tmp_path: Path) -> None:
    assert [first_to_say("no prompt", tmp_path) for _ in range(3)] == [True, False, False]
    assert first_to_say("another", tmp_path)
