"""Verdicts on disk: a file that a crash cut goes on as an undisturbed one, prompt by prompt."""

import pytest

from align.errors import JudgeError
from align.jsonl import dump_line
from align.judge.verdicts import windows
from align.records import Comparison, Prompt, Verdict
from align.stages.judging import Missing, Said, judge_missing, whole_prompts
from tests.judge.asking import openai_settings
from tests.judge.fake_server import FakeServer


def comparisons(prompts: int, answers: int = 4) -> list[Comparison]:
    made = []
    for number in range(prompts):
        prompt = Prompt.from_json({"id": str(number), "prompt": f"Question {number}?"})
        texts = [f"{'long ' * i}answer {number}" for i in range(answers)]
        made += [
            Comparison(
                prompt=prompt, first=texts[i], second=texts[j], first_index=i, second_index=j
            )
            for i in range(answers)
            for j in range(i + 1, answers)
        ]
    return made


def verdict(c: Comparison) -> Verdict:
    return Verdict(
        id=c.prompt.id, first=c.first_index, second=c.second_index, status="ok", p_first=1.0,
        consistent=True, judge="t",
    )  # fmt: skip


def written(path, found) -> None:
    path.write_bytes(b"".join(dump_line(verdict(c).to_json()) for c in found))


@pytest.mark.parametrize(
    ("on_disk", "whole"), [(0, 0), (1, 0), (5, 0), (6, 6), (7, 6), (12, 12), (18, 18)]
)
def test_what_a_crash_left_of_a_prompt_is_judged_again(tmp_path, on_disk, whole):
    asked = comparisons(3)  # six pairs each
    written(tmp_path / "v", asked[:on_disk])
    assert whole_prompts(asked, tmp_path / "v") == whole


@pytest.mark.parametrize(
    ("on_disk", "whole"), [(6, 0), (11, 0), (12, 12), (18, 12), (23, 12), (24, 24)]
)
def test_what_a_crash_left_of_a_window_is_judged_again_too(tmp_path, on_disk, whole):
    asked = comparisons(4)
    written(tmp_path / "v", asked[:on_disk])
    assert whole_prompts(asked, tmp_path / "v", window=7) == whole
    assert [len(w) for w in windows(asked, least=7)] == [12, 12]


def test_comparisons_that_a_judge_passes_over_do_not_hold_a_prompt_back(tmp_path):
    asked = comparisons(3)
    written(tmp_path / "v", [*asked[:5], asked[6]])  # the last of the first prompt passed over
    assert whole_prompts(asked, tmp_path / "v") == 5


def test_a_verdict_that_nobody_asked_for_is_one_line(tmp_path):
    asked = comparisons(2)
    written(tmp_path / "v", [asked[6], asked[0]])
    with pytest.raises(JudgeError, match="that nobody asked for, or in another order"):
        Missing(lambda: asked, tmp_path / "v")


def test_verdicts_find_their_comparisons_in_step(tmp_path):
    asked = comparisons(2)
    written(tmp_path / "v", [asked[0], asked[2], asked[7]])
    said = Said(tmp_path / "v")
    assert [c for c, _ in said.on(asked[:6])] == [asked[0], asked[2]]
    assert [c for c, _ in said.on(asked[6:])] == [asked[7]]


@pytest.mark.parametrize("kind", ["pairwise", "listwise", "scalar"])
@pytest.mark.parametrize("on_disk", [1, 4, 8])
def test_a_cut_file_ends_like_an_undisturbed_one_and_asks_nothing_twice(tmp_path, kind, on_disk):
    asked = comparisons(3)
    with FakeServer(tmp_path) as server:
        settings = openai_settings(tmp_path, server.url, kind=kind)
        judge_missing(lambda: asked, judge=settings, path=tmp_path / "whole", title="t")
        sent = server.stats()["received"]
        lines = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
        (tmp_path / "cut").write_bytes(b"".join(lines[:on_disk]) + lines[on_disk][:9])
        judge_missing(lambda: asked, judge=settings, path=tmp_path / "cut", title="t")
        assert server.stats()["received"] == sent
    assert (tmp_path / "cut").read_bytes() == b"".join(lines)
