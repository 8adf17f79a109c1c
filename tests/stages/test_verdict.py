"""The one sentence: what each kind of measurement allows it to say."""

import pytest

from align.stages.verdict import verdict

RATE = "evaluate/win_rate"


def measures(mean: float, low: float, high: float, **more: float) -> dict[str, float]:
    known = {RATE: mean, f"{RATE}_low": low, f"{RATE}_high": high, "evaluate/n": 400}
    return {**known, **{f"evaluate/{key}": value for key, value in more.items()}}


def test_a_win_is_told_with_its_interval_and_the_correct_answers() -> None:
    told = verdict(
        measures(0.835, 0.799, 0.870, correct_before=0.41, correct_after=0.78), judge="rubric"
    )
    assert told.kind == "better"
    assert told.sentence == (
        "The tuned model wins 83.5% (79.9–87.0) of 400 held-out prompts against the model it "
        "started from; correct answers rose from 41% to 78%."
    )


def test_an_interval_that_includes_half_is_no_win() -> None:
    told = verdict(measures(0.53, 0.48, 0.58), judge="rubric")
    assert told.kind == "unclear"
    assert told.sentence.startswith("No clear difference: ")
    assert "that interval includes 50%" in told.sentence


@pytest.mark.parametrize(("low", "high"), [(0.5, 0.6), (0.4, 0.5)])
def test_an_interval_that_touches_half_includes_it(low: float, high: float) -> None:
    assert verdict(measures(0.5, low, high), judge="rubric").kind == "unclear"


def test_a_loss_is_called_worse() -> None:
    told = verdict(measures(0.31, 0.27, 0.36), judge="rubric")
    assert told.kind == "worse"
    assert told.sentence.startswith("The tuned model got worse: it wins only 31.0% (27.0–36.0)")


def test_a_win_that_cost_correct_answers_says_but() -> None:
    metrics = measures(0.8, 0.7, 0.9, correct_before=0.78, correct_after=0.41)
    assert "; but correct answers fell from 78% to 41%." in verdict(metrics, judge="x").sentence
    same = measures(0.8, 0.7, 0.9, correct_before=0.781, correct_after=0.779)
    assert "; correct answers stayed at 78%." in verdict(same, judge="x").sentence


def test_without_a_judge_there_is_no_win_rate_and_the_reason_is_given() -> None:
    metrics = {"evaluate/n": 400, "evaluate/kl": 3.1, "evaluate/held_out_accuracy": 0.71}
    told = verdict(metrics, judge=None)
    assert told.kind == "unjudged"
    assert "There is no win rate: no judge compared the answers" in told.sentence
    assert "ranks 71.0% of held-out preferences right and stands 3.1 nats" in told.sentence
    assert "(strict) gave no usable verdict" in verdict(metrics, judge="strict").sentence


def test_the_rate_rests_on_the_judged_prompts_not_on_all() -> None:
    assert "of 390 held-out" in verdict(measures(0.8, 0.7, 0.9, n_judged=390), judge="x").sentence
