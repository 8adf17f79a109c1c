"""Wherever a PPO run is killed and however often, it ends in the bytes of one that was not."""

import multiprocessing
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from align.algorithms.online import Online
from align.algorithms.ppo import state
from align.algorithms.ppo import trainer as training
from align.algorithms.ppo.run import made
from align.algorithms.ppo.trainer import Trainer
from align.launch import free_port
from align.models.settings import Full, Lora, Model
from align.process_group import Ranks, open_ranks
from align.records import Prompt
from tests.algorithms.ppo.running import LORA, chance, online, settings, train
from tests.algorithms.ppo.test_trainer import ALONE, curves, left
from tests.conftest import model_settings
from tests.rewards.test_sources import scripted

LUCK = "tests.algorithms.ppo.test_resume:luck"
FULL = Full(name="full")
LONGEST = scripted(prefer="longest", p=0.9)


def luck(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    """As `chance`, with noise from torch's generator too."""
    noise = torch.rand(len(responses)).tolist()
    return [r + 0.1 * n for r, n in zip(chance(prompts, responses), noise, strict=True)]


def reseed(seed: int) -> None:
    """The generators as another process has them."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def started(given: Online, out: Path, *, ranks: Ranks = ALONE, **changes: Any) -> Trainer:
    out.mkdir(exist_ok=True, parents=True)
    run = made(given, settings=settings(**changes), out=out, ranks=ranks)
    run.begin()
    return run


def die(*given: Any, **named: Any) -> None:
    raise KeyboardInterrupt


# At its end.


def dying_at(name: str, patched: pytest.MonkeyPatch) -> None:
    """The last writes go well up to the one of `name`, which does not happen any more."""
    for where, what in ((training, "write_json"), (Path, "unlink")):
        plain = getattr(where, what)

        def guarded(path: Path, *given: Any, plain: Any = plain, **named: Any) -> None:
            (die if path.name == name else plain)(path, *given, **named)

        patched.setattr(where, what, guarded)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("counts.json", ["adapter"]),
        ("metrics.json", ["adapter", "counts.json"]),
        (state.STATE, ["adapter", "counts.json", "metrics.json"]),
    ],
)
def test_killed_while_it_closes_it_keeps_the_checkpoint_and_only_closes_again(
    tiny: Model, tmp_path: Path, name: str, written: list[str]
) -> None:
    changes = {"iterations": 2, "reward": LUCK}
    reseed(0)
    whole = left(train(tiny, tmp_path / "whole", **changes))
    cut = tmp_path / "cut"
    reseed(0)
    with pytest.MonkeyPatch.context() as patched:
        dying_at(name, patched)
        with pytest.raises(KeyboardInterrupt):
            train(tiny, cut, **changes)
    last = ("adapter", "counts.json", "metrics.json", state.STATE)
    assert [p for p in last if (cut / p).exists()] == [*written, state.STATE]
    reseed(1)
    assert left(train(tiny, cut, **changes)) == whole


def test_a_run_that_has_its_last_measures_is_not_made_again(tiny: Model, tmp_path: Path) -> None:
    """Killed before its manifest was written: a run without prompts could not be made."""
    before = left(train(tiny, tmp_path, iterations=1))
    (tmp_path / state.STATE).write_bytes(b"")
    train(tiny, tmp_path, iterations=1, given=online(tiny, questions=[]))
    assert left(tmp_path) == before


# On its way.


@pytest.mark.parametrize(
    ("adapter", "changes"),
    [
        (LORA, {"value": "none"}),
        (FULL, {"value": "none", "learning_rate": 1e-3}),
        (FULL, {"value": "trunk", "learning_rate": 1e-3}),
    ],
    ids=["no critic", "whole model", "whole model with a head"],
)
def test_without_a_critic_or_an_adapter_a_run_killed_after_an_iteration_ends_bit_for_bit(
    tiny: Model, tmp_path: Path, adapter: Lora | Full, changes: dict[str, Any]
) -> None:
    """Its judge watches, and its rewards are drawn from every generator that a user may draw
    from.
    """
    changes = {**changes, "iterations": 3, "reward": LUCK, "monitor_every": 1}

    def given() -> Online:
        return online(tiny, lora=adapter, monitor=LONGEST)

    reseed(0)
    whole = left(train(tiny, tmp_path / "whole", given=given(), **changes))
    for seed in range(2):  # the first start as above, the others as a new process has it
        reseed(seed)
        run = started(given(), tmp_path / "cut", **changes)
        run.iterate(run.iteration)
    reseed(2)
    assert left(train(tiny, tmp_path / "cut", given=given(), **changes)) == whole
    assert all("eval_win_rate" in line for line in curves(tmp_path / "cut"))


def test_killed_before_the_first_checkpoint_it_begins_anew(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice while it calibrates, once after iterations that no checkpoint counts."""
    changes = {"checkpoint_every": 3, "monitor_every": 1}
    whole = left(train(tiny, tmp_path / "whole", **changes))
    for _ in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(training, "calibrated", die)
            with pytest.raises(KeyboardInterrupt):
                started(online(tiny), tmp_path / "cut", **changes)
    assert left(tmp_path / "cut") == {}
    run = started(online(tiny), tmp_path / "cut", **changes)
    for iteration in range(2):
        run.iterate(iteration)
    assert len(curves(tmp_path / "cut")) == 2 and not (tmp_path / "cut" / state.STATE).exists()
    assert left(train(tiny, tmp_path / "cut", **changes)) == whole


# With several processes.


def work(rank: int, port: int, folder: Path, out: Path, *, seed: int, killed: bool) -> None:
    """One of two processes, told what the launcher tells them; `killed` after its third
    iteration.
    """
    torch.set_num_threads(1)
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in told.items()} | {"MASTER_ADDR": "127.0.0.1"}
    changes = {"iterations": 4, "checkpoint_every": 2, "reward": LUCK}
    model = model_settings(folder)
    reseed(10 * seed + rank)
    if killed:
        run = started(online(model), out, ranks=open_ranks(), **changes)
        for iteration in range(3):
            run.iterate(iteration)
        os.kill(os.getpid(), signal.SIGKILL)
    train(model, out, **changes)


def together(folder: Path, out: Path, **given: Any) -> list[int | None]:
    """How two processes end; they are forks of a server that has imported all there is."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(
        [__name__, "accelerate", "transformers.models.llama.modeling_llama"]
    )
    port = free_port()
    begun = [
        forks.Process(target=work, args=(rank, port, folder, out), kwargs=given)
        for rank in range(2)
    ]
    for process in begun:
        process.start()
    for process in begun:
        process.join(timeout=120)
    for process in begun:
        process.kill()
    return [process.exitcode for process in begun]


def test_two_processes_killed_after_a_checkpoint_end_as_two_that_were_not(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Each draws random numbers of its own for its answers' rewards."""
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    assert together(tiny_folder, whole, seed=1, killed=False) == [0, 0]
    assert together(tiny_folder, cut, seed=1, killed=True) == [-signal.SIGKILL] * 2
    assert (cut / state.STATE).exists() and len(curves(cut)) == 3
    assert together(tiny_folder, cut, seed=2, killed=False) == [0, 0]
    assert left(cut) == left(whole)
