"""What a run warns of: over-optimisation by hand-worked numbers, and each warning once."""

import json
from pathlib import Path

import pytest

from align.algorithms.ppo.health import overoptimised, warnings_of
from align.algorithms.ppo.warned import WARNINGS, Warned
from tests.algorithms.ppo.running import settings

CALM = {
    "kl": 1.0, "kl_error": 0.1, "ratio_std": 0.0, "entropy": 2.0, "length": 20.0, "eos_rate": 1.0,
    "clipped_rewards": 0.0, "reward": 0.0, "beta": 0.05, "taught": 1.0,
}  # fmt: skip


def watched(*seen: tuple[float, float], n: float = 100) -> list[dict[str, float]]:
    """Lines of rewards and win rates, one not watched before each."""
    lines: list[dict[str, float]] = []
    for reward, rate in seen:
        lines += [
            CALM,
            {**CALM, "eval_reward": reward, "eval_win_rate": rate, "eval_judged": n},
        ]
    return lines


def test_a_win_rate_that_falls_beyond_chance_while_the_reward_rises_is_over_optimisation() -> None:
    # 0.7 and 0.5 of 100 each: the error of the difference is sqrt(0.0021 + 0.0025) = 0.068.
    assert overoptimised(watched((0.1, 0.5), (0.4, 0.7), (0.9, 0.5))) == 4
    # of 64: sqrt(0.0033 + 0.0039) = 0.085, and a fall by 0.16 is less than two of them
    assert overoptimised(watched((0.4, 0.7), (0.9, 0.54), n=64)) is None


def test_no_other_course_is_over_optimisation() -> None:
    assert overoptimised([]) is None and overoptimised([CALM]) is None
    assert overoptimised(watched((0.1, 0.5), (0.9, 0.7))) is None  # both rose
    assert overoptimised(watched((0.9, 0.7), (0.4, 0.4))) is None  # both fell
    assert overoptimised(watched((0.1, 0.7), (0.4, 0.4), (0.9, 0.7))) is None  # recovered
    assert overoptimised([{"eval_win_rate": 0.9, "eval_judged": 100}]) is None  # no reward known


def test_a_line_that_knows_its_step_is_named_by_it() -> None:
    lines = [{**line, "step": 10 * i} for i, line in enumerate(watched((0.1, 0.8), (0.9, 0.4)))]
    assert overoptimised(lines) == 10


def test_the_run_says_so_with_what_to_try() -> None:
    found = warnings_of(
        watched((0.1, 0.8), (0.9, 0.4)), settings=settings(), best_reference=None
    )  # fmt: skip
    assert list(found) == ["over_optimised"]
    assert "algorithm.iterations=2" in found["over_optimised"]


def test_each_warning_is_told_once_and_again_after_an_older_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = Warned(tmp_path)
    first.tell({}, step=1)
    assert not (tmp_path / WARNINGS).exists()
    first.tell({"kl": "KL is odd"}, step=2)
    first.tell({"kl": "KL is odd", "eos": "no end\x1b[31m"}, step=4)
    whole = (tmp_path / WARNINGS).read_bytes()
    assert [json.loads(line)["step"] for line in whole.splitlines()] == [2, 4]
    assert "iteration 4: no end[U+001B]" in capsys.readouterr().err

    resumed = Warned(tmp_path)
    resumed.go_on_from(3)
    resumed.tell({"kl": "KL is odd", "eos": "no end\x1b[31m"}, step=4)
    assert (tmp_path / WARNINGS).read_bytes() == whole
    assert capsys.readouterr().err.count("KL is odd") == 0
    Warned(tmp_path).go_on_from(0)
    assert not (tmp_path / WARNINGS).exists()
