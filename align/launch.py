"""Where a step runs: in this process, or on several through `accelerate launch`."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from align.artifacts import Run, write_json
from align.config import Launch
from align.errors import StageError
from align.named import named_module
from align.plan import Step

REQUEST = "launch.json"
SAID = ".said-"  # beside it: an error that one of the processes has told
# How often a waiting thread looks again before it sleeps, read by GNU OpenMP when torch is
# imported. Left alone it spins for milliseconds: where another program has one of two cores,
# training then makes 9 pairs/s, so 13; where both are free, 28 either way.
SPIN_COUNT = "3000"


def perform(step: Step, *, inputs: Mapping[str, Path], out: Path, run: Run, launch: Launch) -> None:
    """Runs one step to its end, where `launch` says."""
    set_threads(launch.threads or len(os.sched_getaffinity(0)))  # before anything imports torch
    processes = wanted_processes(launch) if step.distributed else 1
    if step.distributed and (launch.mode == "accelerate" or processes > 1):
        spawn(step, inputs=inputs, out=out, run=run, launch=launch, processes=processes)
        return
    named_module("align.stages", step.stage).run(step.settings, inputs, out)


def wanted_processes(launch: Launch) -> int:
    if launch.mode == "inline":
        return 1
    if launch.processes is not None:
        return launch.processes
    import torch

    return max(1, torch.cuda.device_count())


def thread_environment(threads: int) -> dict[str, str]:
    """What thread pools read before torch is imported; a user's own choice of waiting is kept."""
    chosen = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys()
    waiting = {} if chosen else {"GOMP_SPINCOUNT": SPIN_COUNT}
    return {"OMP_NUM_THREADS": str(threads), **waiting}


def set_threads(threads: int) -> None:
    """One number for every thread pool, so that a result does not depend on the shell's
    environment.
    """
    os.environ |= thread_environment(threads)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)


def spawn(
    step: Step, *, inputs: Mapping[str, Path], out: Path, run: Run, launch: Launch, processes: int
) -> None:
    """Starts `python -m align.rank` on each process and waits.

    Raises:
        StageError: the processes failed; their own last line says why.
    """
    request = run.path / REQUEST
    for told in run.path.glob(f"{SAID}*"):
        told.unlink()
    write_json(
        request,
        {
            "config": str(run.path / "config.yaml"),
            "step": step.name,
            "inputs": {name: str(path) for name, path in inputs.items()},
            "out": str(out),
        },
    )
    threads = launch.threads or max(1, len(os.sched_getaffinity(0)) // processes)
    command = [*accelerate_command(processes), "-m", "align.rank", str(request)]
    # In a session of their own: Ctrl-C reaches this process alone, and it ends the others without
    # a traceback from each. A stage goes on from any moment, so there is nothing to say goodbye to.
    child = subprocess.Popen(
        command,
        env=accelerate_environment(threads),
        preexec_fn=die_with_parent,
        start_new_session=True,
    )
    try:
        status = child.wait()
    except KeyboardInterrupt:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    if status != 0:
        raise StageError(
            f"{step.name}: accelerate's processes ended with status {status}; the lines above say "
            "why. "
            "What is finished is kept, the same command goes on"
        )


def accelerate_command(processes: int) -> list[str]:
    """`accelerate launch` and its options; the module to run follows."""
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        f"--num_processes={processes}",
        "--num_machines=1",
        "--mixed_precision=no",  # model.dtype says which: launching does not shape the result
        "--dynamo_backend=no",
        f"--main_process_port={free_port()}",
        # accelerate has no flag for several processes on CPUs; its launcher for GPUs takes them
        # when ACCELERATE_USE_CPU is set.
        *(["--multi_gpu"] if processes > 1 else []),
    ]


def accelerate_environment(threads: int) -> dict[str, str]:
    import torch

    cpu = {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
    return {**os.environ, **cpu, **thread_environment(threads)}


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def die_with_parent() -> None:
    """Asks the kernel to kill this process when its parent dies, even by SIGKILL (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
