"""What is watched on held-out prompts: win rates, rewards and lengths of the answers that are
shown.
"""

import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align.algorithms.ppo.experience import POLICY
from align.algorithms.ppo.monitor import Monitor
from align.algorithms.ppo.run import made
from align.judge.settings import Scripted
from align.models.settings import Model
from align.records import OK, Comparison, Verdict
from tests.algorithms.ppo.running import even, online, settings, train
from tests.algorithms.ppo.test_trainer import ALONE, curves
from tests.rewards.test_sources import scripted

LONGEST = scripted(prefer="longest", p=0.9)
PLACES = replace(LONGEST, module="tests.algorithms.ppo.test_monitor")
shown: list[Comparison] = []


async def compare(comparisons: Iterable[Comparison], *, settings: Any) -> AsyncIterator[Verdict]:
    """A judge that likes whatever it is shown first."""
    for one in comparisons:
        shown.append(one)
        yield Verdict(
            id=one.prompt.id, first=one.first_index, second=one.second_index, status=OK,
            p_first=1.0, consistent=True, judge="places",
        )  # fmt: skip


def watching(model: Model, out: Path, judge: Scripted) -> Monitor:
    """Ten prompts, watched beside a policy that is the reference no more."""
    given = online(model, monitor=judge)
    given = replace(given, held_out=given.questions)
    changes = {"monitor_prompts": 10, "max_new_tokens": 4, "learning_rate": 2e-3}
    run = made(given, settings=settings(**changes), out=out, ranks=ALONE)
    run.begin()
    run.iterate(0)
    run.monitor.reference.clear()  # to be drawn again now that the policy has moved
    return run.monitor


def pairs(monitor: Monitor) -> list[tuple[str, str]]:
    """The policy's answer to each prompt, and the reference's."""
    new = monitor.answers(POLICY)
    return [(n.text, old.text) for n, old in zip(new, monitor.reference, strict=True)]


@pytest.mark.parametrize("prefer", ["longest", "shortest"])
def test_the_win_rate_is_what_a_count_of_the_shown_answers_gives(
    tiny: Model, tmp_path: Path, prefer: str
) -> None:
    monitor = watching(tiny, tmp_path, replace(LONGEST, prefer=prefer))
    found = monitor.measure()
    answers = pairs(monitor)
    leads = [len(new) - len(old) for new, old in answers]
    won = [0.5 if lead == 0 else 0.9 if (lead > 0) == (prefer == "longest") else 0.1
           for lead in leads]  # fmt: skip
    assert found["eval_win_rate"] == pytest.approx(sum(won) / 10)
    assert found["eval_judged"] == 10 and min(leads) < 0 < max(leads) and 0 in leads


def test_the_policys_answer_is_shown_first_and_second_by_turns(tiny: Model, tmp_path: Path) -> None:
    """A judge that only looks at places finds neither better."""
    monitor = watching(tiny, tmp_path, PLACES)
    shown.clear()
    found = monitor.measure()
    answers = pairs(monitor)
    turned = [(new, old) if i % 2 == 0 else (old, new) for i, (new, old) in enumerate(answers)]
    assert [(one.first, one.second) for one in shown] == [t for t in turned if t[0] != t[1]]
    won = [0.5 if new == old else float(i % 2 == 0) for i, (new, old) in enumerate(answers)]
    assert found["eval_win_rate"] == sum(won) / 10 and 0.3 < found["eval_win_rate"] < 0.7


def test_answers_without_a_verdict_are_left_out_of_the_win_rate(
    tiny: Model, tmp_path: Path
) -> None:
    """What is failed at depends on the pair alone, so each is asked about once more by itself."""
    monitor = watching(tiny, tmp_path, replace(LONGEST, statuses={"failed": 0.5}))
    found = monitor.measure()
    questions, won = list(monitor.questions), []
    new, old = monitor.answers(POLICY), list(monitor.reference)
    for i in range(10):
        monitor.questions, monitor.reference = questions[i : i + 1], old[i : i + 1]
        won += monitor.win_probabilities(new[i : i + 1])
    assert 0 < len(won) < 10 and found["eval_judged"] == len(won)
    assert found["eval_win_rate"] == pytest.approx(sum(won) / len(won))


def test_reward_and_length_are_means_over_the_watched_answers(tiny: Model, tmp_path: Path) -> None:
    monitor = watching(tiny, tmp_path, LONGEST)
    found = monitor.measure()
    answers = monitor.answers(POLICY)
    rewards = even([], [one.text for one in answers])
    assert found["eval_reward"] == pytest.approx(sum(rewards) / 10)
    assert found["eval_length"] == sum(len(one.completion_ids) for one in answers) / 10
    assert monitor.measure() == found  # always from the same noise


def test_the_win_rate_stands_in_the_curves_where_it_is_due_and_in_the_last_measures(
    tiny: Model, tmp_path: Path
) -> None:
    train(tiny, tmp_path, given=online(tiny, monitor=LONGEST), iterations=5, monitor_every=3)
    watched = [line["step"] for line in curves(tmp_path) if "eval_win_rate" in line]
    assert watched == [1, 3, 5]
    last = json.loads((tmp_path / "metrics.json").read_text())
    assert last["train/eval_win_rate"] == curves(tmp_path)[-1]["eval_win_rate"]
