"""What becomes of a run that goes wrong, and that nothing is said of one that does not."""

from pathlib import Path
from typing import Any

import pytest
import torch

from align.algorithms.ppo import state
from align.algorithms.ppo.experience import POLICY
from align.algorithms.ppo.health import SETTLED, warnings_of
from align.algorithms.ppo.warned import WARNINGS
from align.errors import StageError
from align.models.settings import Model
from tests.algorithms.ppo.running import settings, train
from tests.algorithms.ppo.test_health import WELL, told
from tests.algorithms.ppo.test_trainer import curves, trainer


def test_a_collapse_is_one_line_and_the_last_good_checkpoint_stays(
    tiny: Model, tmp_path: Path
) -> None:
    """The policy moves in the second iteration first, and its second step is beyond all numbers."""
    changes: dict[str, Any] = {"critic_warmup": 1, "learning_rate": 1e30}
    kept = []
    for _ in range(2):  # the same command goes on from the first iteration's checkpoint
        with pytest.raises(StageError) as raised:
            train(tiny, tmp_path, **changes)
        assert str(raised.value) == (
            "training collapsed at iteration 2: policy_loss is nan; lower algorithm.learning_rate "
            "(now 1e+30; try 2.5e+29)"
        )
        kept.append((tmp_path / state.STATE).read_bytes())
        assert [line["step"] for line in curves(tmp_path)] == [1]
        assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 4
        assert not (tmp_path / "metrics.json").exists()
    assert kept[0] == kept[1]
    # What the checkpoint holds is well: at a rate that can be borne it goes on.
    run = trainer(tiny, tmp_path, **changes)
    run.begin()
    assert run.iteration == 1
    for group in run.learner.optimizer.param_groups:
        group["whole_lr"] = 1e-3
    run.iterate(1)
    assert [line["step"] for line in curves(tmp_path)] == [1, 2]


def test_a_value_adapter_that_collapses_is_told_its_own_learning_rate(
    tiny: Model, tmp_path: Path
) -> None:
    says = r"iteration 1: value_loss is nan; lower algorithm\.value_learning_rate \(now 1e\+30"
    with pytest.raises(StageError, match=says):
        train(tiny, tmp_path, value="adapter", value_learning_rate=1e30, learning_rate=1e-4)
    assert not (tmp_path / state.STATE).exists() and not (tmp_path / "curves.jsonl").exists()


def test_weights_that_are_no_numbers_end_the_run_before_an_answer_is_learnt_from(
    tiny: Model, tmp_path: Path
) -> None:
    run = trainer(tiny, tmp_path)
    run.begin()
    run.iterate(0)
    good = (tmp_path / state.STATE).read_bytes()
    with torch.no_grad():
        run.roles.parameters(POLICY)[0][0] = torch.nan
    with pytest.raises(StageError, match=r"no numbers.*lower algorithm\.learning_rate") as raised:
        run.iterate(1)
    assert "\n" not in str(raised.value) and len(curves(tmp_path)) == 1
    assert (tmp_path / state.STATE).read_bytes() == good


# What is not worth a word.


def test_answers_that_hardly_ever_ended_are_not_warned_of_for_it() -> None:
    cut = {**WELL, "eos_rate": 0.1}
    assert warnings_of([cut] * 9, settings=settings(), best_reference=None) == {}
    now = {**cut, "eos_rate": 0.05}
    assert warnings_of([cut] * 9 + [now], settings=settings(), best_reference=None) == {}
    assert list(told(eos_rate=0.1)) == ["eos"]


def test_a_kl_beyond_its_band_is_not_spoken_of_before_the_run_has_settled() -> None:
    assert told(before=SETTLED - 1, kl=25.0) == {}
    assert list(told(before=SETTLED, kl=25.0)) == ["kl_band"]


@pytest.mark.parametrize(
    ("changes", "warned"), [({}, False), ({"top_k": 50}, True), ({"top_p": 0.9}, True)]
)
def test_a_run_says_that_its_ratio_is_biased_only_where_something_is_left_out(
    tiny: Model,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    warned: bool,
) -> None:
    """A calm run's only line is its progress."""
    train(tiny, tmp_path, iterations=1, learning_rate=1e-5, **changes)
    lines = capsys.readouterr().err.splitlines()
    said = [line for line in lines if not line.startswith("train: 1/1")]
    assert len(said) == warned and all("algorithm.top_k=0" in line for line in said)
    assert not (tmp_path / WARNINGS).exists()
