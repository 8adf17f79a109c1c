"""The chat's command line and what it lets through to a terminal."""

import subprocess
import sys
from pathlib import Path

import pytest

from align.chat import parse, visible
from align.errors import ConfigError
from align.pipeline import Outcome
from align.sweep import comparison_table


def test_an_answer_cannot_steer_the_terminal():
    shown = visible("a\x1b[2Jb\u202ec\td\n")
    assert "\x1b" not in shown and "\u202e" not in shown
    assert shown.startswith("a\\u001b[2Jb\\u202ec") and shown.endswith("\n")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "no run given"),
        (["rnu=dpo"], "did you mean run?"),
        (["run=dpo", "seed=x"], "seed=x: must be of type int"),
        (["run=nothing"], "no trained adapter"),
    ],
)
def test_a_mistake_is_one_line(words, says, tmp_path):
    with pytest.raises(ConfigError, match=".*".join(map(str, [says.split("?")[0]]))):
        parse([*words, f"workspace={tmp_path}"] if words != [] else [])


def test_help_is_quick_and_needs_no_run():
    command = [sys.executable, "-m", "align.chat", "--help"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert answer.returncode == 0 and "run=NAME" in answer.stdout


def test_a_sweeps_table_shows_what_differs_and_what_failed():
    outcomes = [
        Outcome(
            overrides=["recipe=dpo", "algorithm.beta=0.1"],
            folder=Path("runs/dpo/aaaa"),
            metrics={"evaluate/win_rate": 0.81},
        ),
        Outcome(overrides=["recipe=dpo", "stages=[label]"], error="training [/x] collapsed"),
    ]
    table = comparison_table(outcomes)
    assert "algorithm.beta=0.1" in table and "0.810" in table and "training [/x] collapsed" in table
    assert "stages=[label]" in table, "brackets are no markup"
    assert "recipe=dpo" not in table, "what all runs share tells nothing"
