"""Labelling: which pairs are compared, and that nothing but a verdict becomes data."""

import json
from collections import Counter
from dataclasses import dataclass

import pytest

from align.errors import JudgeError, StageError
from align.jsonl import dump_line, read_records
from align.records import Candidate, Preference, Prompt, Verdict
from align.stages.label import comparisons, distinct, preferences, run
from align.stages.settings import Label, LabelStage

ALL = Label(pairs="all", k=4, ties="drop")


def candidate(*texts: str, id: str = "a") -> Candidate:
    return Candidate.from_json({"id": id, "prompt": "?", "responses": list(texts)})


def verdict(first: int, second: int, p: float | None, status: str = "ok") -> Verdict:
    return Verdict(
        id="a", first=first, second=second, status=status, p_first=p, consistent=True, judge="t"
    )


def test_equal_and_empty_answers_are_not_compared():
    assert distinct(candidate("x", " x", "", "y", "  ")) == [0, 3]
    assert comparisons(candidate("x", "x ", ""), label=ALL, seed=0) == []


@pytest.mark.parametrize(("pairs", "count"), [("all", 6), ("best_vs_worst", 6), ("random", 4)])
def test_the_number_of_comparisons_is_as_configured(pairs, count):
    label = Label(pairs=pairs, k=4, ties="drop")
    made = comparisons(candidate("w", "x", "y", "z"), label=label, seed=0)
    assert len({frozenset((c.first_index, c.second_index)) for c in made}) == len(made) == count


def test_who_is_shown_first_is_a_fair_draw_that_a_second_run_repeats():
    label = Label(pairs="random", k=1, ties="drop")
    drawn = [
        comparisons(candidate("x", "y", id=str(i)), label=label, seed=3)[0] for i in range(400)
    ]
    again = [
        comparisons(candidate("x", "y", id=str(i)), label=label, seed=3)[0] for i in range(400)
    ]
    assert drawn == again
    assert 160 < Counter(c.first for c in drawn)["x"] < 240


@pytest.mark.parametrize("status", ["refusal", "malformed", "overflow", "failed"])
def test_a_failure_never_becomes_data(status):
    keep = Label(pairs="all", k=4, ties="keep")
    assert not list(preferences(candidate("x", "y"), [verdict(0, 1, None, status)], label=keep))


def test_the_preferred_answer_is_chosen_with_the_judges_probability():
    made = list(preferences(candidate("x", "y"), [verdict(0, 1, 0.2)], label=ALL))
    assert [(p.chosen, p.rejected, p.p) for p in made] == [("y", "x", 0.8)]


def test_ties_are_dropped_or_kept_at_one_half():
    tie = [verdict(0, 1, 0.5, "tie")]
    assert not list(preferences(candidate("x", "y"), tie, label=ALL))
    keep = Label(pairs="all", k=4, ties="keep")
    assert [p.p for p in preferences(candidate("x", "y"), tie, label=keep)] == [0.5]


def test_best_against_worst_is_the_pair_with_most_and_fewest_wins():
    label = Label(pairs="best_vs_worst", k=4, ties="drop")
    said = [verdict(0, 1, 1.0), verdict(0, 2, 0.0), verdict(1, 2, 0.0)]  # 2 beats 0 beats 1
    made = list(preferences(candidate("x", "y", "z"), said, label=label))
    assert [(p.chosen, p.rejected) for p in made] == [("z", "y")]


SCRIPTED = '''
"""A judge that prefers the longer answer, refuses "?", and counts how often it was asked."""
import pathlib
from align.records import Verdict

async def compare(comparisons, *, settings):
    for c in comparisons:
        with open(settings.log, "a+") as log:
            log.write(c.prompt.id + "\\n")
            log.seek(0)
            asked = len(log.readlines())
        if settings.stop_after and asked > settings.stop_after:
            raise RuntimeError("killed")
        refused = "?" in (c.first, c.second)
        yield Verdict(id=c.prompt.id, first=c.first_index, second=c.second_index,
                      status="refusal" if refused else "ok",
                      p_first=None if refused else float(len(c.first) > len(c.second)),
                      consistent=True, judge="longer", cost=0.5)
'''


@dataclass(frozen=True, kw_only=True)
class Scripted:
    log: str
    stop_after: int = 0
    name: str = "scripted"
    module: str = "scripted_judge"


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    (tmp_path / "scripted_judge.py").write_text(SCRIPTED)
    monkeypatch.syspath_prepend(tmp_path)
    folder = tmp_path / "candidates"
    folder.mkdir()
    rows = [candidate("a" * (i % 3 + 1), "bb" * 3, "?", id=str(i)) for i in range(300)]
    (folder / "candidates.jsonl").write_bytes(b"".join(dump_line(row.to_json()) for row in rows))
    return tmp_path


def test_a_run_killed_in_the_middle_ends_like_an_undisturbed_one_and_asks_nothing_twice(scripted):
    inputs = {"candidates": scripted / "candidates"}
    results = []
    for name, stop in (("whole", 0), ("killed", 700)):
        out = scripted / name
        out.mkdir()
        log = str(scripted / f"{name}.log")
        if stop:
            with pytest.raises(JudgeError, match="RuntimeError: killed"):
                run(
                    LabelStage(label=ALL, judge=Scripted(log=log, stop_after=stop), seed=0),
                    inputs,
                    out,
                )
            with (out / "verdicts.jsonl").open("ab") as file:
                file.write(b'{"v": 1, "id": "9')
        run(LabelStage(label=ALL, judge=Scripted(log=log), seed=0), inputs, out)
        results.append((out / "preferences.jsonl").read_bytes())
        counts = json.loads((out / "counts.json").read_text())
        assert (
            counts["comparisons"] == 900
            and counts["refusal"] == 600
            and counts["preferences"] == 300
        )
        assert counts["cost_usd"] == 450.0
    assert results[0] == results[1]
    asked = len((scripted / "killed.log").read_text().splitlines())
    assert asked <= 900 + 256, "at most the block that was not written yet is asked again"
    assert all(
        p.chosen == "bbbbbb"
        for p in read_records(scripted / "whole" / "preferences.jsonl", Preference.from_json)
    )


def test_labels_that_teach_nothing_stop_the_run_with_counts(scripted):
    folder = scripted / "candidates"
    (folder / "candidates.jsonl").write_bytes(dump_line(candidate("x", "?").to_json()))
    out = scripted / "out"
    out.mkdir()
    settings = LabelStage(label=ALL, judge=Scripted(log=str(scripted / "log")), seed=0)
    with pytest.raises(StageError, match=r"no verdict on any of 1 comparisons \(1 refusal\)"):
        run(settings, {"candidates": folder}, out)


def test_prompts_keep_what_a_judge_needs_to_know():
    row = Candidate.from_json(
        {"id": "a", "prompt": "?", "responses": ["x", "y"], "meta": {"gold": "14"}}
    )
    assert isinstance(comparisons(row, label=ALL, seed=0)[0].prompt, Prompt)
    assert comparisons(row, label=ALL, seed=0)[0].prompt.meta == {"gold": "14"}
