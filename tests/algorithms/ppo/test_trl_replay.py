"""TRL's unmodified PPO trainer is the oracle: its rollouts, through ours, give the same numbers."""

import subprocess
from pathlib import Path

import pytest

from benchmarks import ppo_equal, ppo_trl


@pytest.fixture(scope="module")
def overlay() -> None:
    try:
        ppo_trl.install(ppo_trl.OVERLAY)
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"TRL {ppo_trl.TRL} cannot be installed beside: {error}")


@pytest.mark.slow
@pytest.mark.usefixtures("overlay")
def test_rollouts_of_trl_give_its_losses_and_gradients(tmp_path: Path) -> None:
    found = ppo_equal.equal(tmp_path)
    assert set(found) == set(ppo_equal.CASES)
    odd = [(case, each) for case, every in found.items() for each in every if not each.met]
    assert not odd
    names = {each.what for each in found["full length"]}
    assert {"advantages, all by `estimate`", "gradient, all by `Learner.accumulate`"} <= names


@pytest.mark.slow
@pytest.mark.usefixtures("overlay")
def test_the_comparison_notices_another_temperature(tmp_path: Path) -> None:
    dump = tmp_path / "dump.safetensors"
    ppo_trl.run(["--dump", str(dump)], threads=1)
    read = ppo_equal.read(dump)
    read.args["temperature"] *= 1.001
    found = {each.what: each.met for each in ppo_equal.before_steps(ppo_equal.Replay(read))}
    assert not found["logprobs"] and not found["reference logprobs"]
    assert found["values"] and found["scores"]
