"""The report and the model card: what they say, what they withstand, and that they stand alone."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.errors import DataError, StageError
from align.stages.card import front_matter
from align.stages.evidence import gather
from align.stages.page import visible
from align.stages.plots import bin_edges
from align.stages.report import duration, run
from align.stages.verdict import number
from align.unseen import printable
from tests.stages.fabricate import CONFIG, fabricate, settings, write, write_lines


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One finished run; tests that change it make their own."""
    return fabricate(tmp_path_factory.mktemp("inputs"), prompts=120)


def made(inputs: dict[str, Path], out: Path, **changed: Any) -> str:
    out.mkdir(exist_ok=True)
    run(settings(**changed), inputs, out)
    return (out / "report.html").read_text(encoding="utf-8")


def change(path: Path, **values: Any) -> None:
    write(path, {**json.loads(path.read_text()), **values})


class Page(HTMLParser):
    """What a browser would see: elements with attributes, ids, and the text outside of elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


# The page


def test_the_verdict_stands_first_and_alone_in_its_file(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    page = made(inputs, tmp_path)
    heading = re.search(r"<h1>(.*?)</h1>", page, re.DOTALL)
    told = (tmp_path / "verdict.txt").read_text(encoding="utf-8").strip()
    assert heading is not None and heading[1] == told
    assert told.startswith("The tuned model wins")


def test_the_page_is_whole_without_network_or_script(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    html = made(inputs, tmp_path)
    page = Page(html)
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "form"), tag
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                assert value is not None and value.startswith("#"), (tag, value)
    assert "@import" not in html and "http://" not in html and "https://" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    policy = next(m for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in str(policy["content"])


def test_figures_have_names_and_ids_of_their_own_and_no_colour_of_their_own(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    html = made(inputs, tmp_path)
    page = Page(html)
    figures = page.all("svg")
    assert len(figures) == 9
    assert all(figure["role"] == "img" and figure["aria-label"] for figure in figures)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = [str(attributes["href"]).removeprefix("#") for attributes in page.all("use")]
    assert used and set(used) <= set(ids)
    drawn = "".join(re.findall(r"<svg.*?</svg>", html, re.DOTALL))
    assert not re.search(r"style=\"[^\"]*#[0-9a-f]{6}", drawn) and "DejaVu" not in drawn
    assert "var(--after)" in drawn and "var(--before)" in drawn


def test_same_inputs_same_bytes(inputs: dict[str, Path], tmp_path: Path) -> None:
    assert made(inputs, tmp_path / "a") == made(inputs, tmp_path / "b")
    first, second = (tmp_path / x / "adapter" / "README.md" for x in "ab")
    assert first.read_bytes() == second.read_bytes()


HOSTILE = (
    '<script>alert("1")</script> \u202edlrow\u202c & </details>\x1b[31m\x00\ud800 $x$ {{ 7*7 }}'
)


def test_text_of_others_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    inputs = fabricate(tmp_path / "in", prompts=12)
    row = {
        "id": HOSTILE,
        "messages": [{"role": "user", "content": HOSTILE}],
        "before": {"text": HOSTILE, "length": 3, "scores": {HOSTILE: 0.0}, "total": 0.0},
        "after": {"text": "\u05e9\u05dc\u05d5\u05dd", "length": 4, "scores": {HOSTILE: 1.0}},
        "p_after": 1.0,
        "status": "ok",
        "margin": 99.0,
    }
    write_lines(inputs["evaluate"] / "comparisons.jsonl", [row])
    write(inputs["evaluate"] / "judge.json", {"judge": HOSTILE, "note": HOSTILE})
    html = made(inputs, tmp_path / "out", name=HOSTILE, command=HOSTILE, config=HOSTILE)
    page = Page(html)
    assert not page.all("script") and "<script" not in html
    assert '<script>alert("1")</script>' in page.text
    assert "{{ 7*7 }}" in page.text and "U+202E" in page.text and "U+0000" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\ud800-\udfff]", html)
    assert "\u05e9\u05dc\u05d5\u05dd" in html and 'dir="auto"' in html
    card = (tmp_path / "out" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "\u202e" not in card and "\x1b" not in card


def test_invisible_characters_stand_as_their_code_points() -> None:
    assert str(visible("a\u200bb")) == 'a<span class="unseen">U+200B</span>b'
    assert str(visible("a\n\tb <b>")) == "a\n\tb &lt;b&gt;"
    assert printable("x\u202ey\n") == "x[U+202E]y\n"


def test_without_a_judge_the_page_says_so_and_how_to_get_one(tmp_path: Path) -> None:
    inputs = fabricate(tmp_path / "in", prompts=8)
    few = {"evaluate/n": 8, "evaluate/kl": 2.0, "evaluate/length_before": 9.0}
    write(inputs["evaluate"] / "metrics.json", few)
    write(inputs["evaluate"] / "judge.json", {"judge": None})
    sides: dict[str, Any] = {
        side: {"text": side, "length": 3, "scores": {}} for side in ("before", "after")
    }
    turn = {"role": "user", "content": "How many days?"}
    row = {"id": "1", "messages": [turn], **sides, "p_after": None, "status": None, "margin": None}
    write_lines(inputs["evaluate"] / "comparisons.jsonl", [row])
    text = Page(made(inputs, tmp_path / "out")).text
    assert "There is no win rate: no judge compared the answers" in text
    assert "judge@evaluate.judge=NAME" in text and "Some answers, before and after" in text
    assert "Where it got worse" not in text and "How often the new answer wins" not in text


@pytest.mark.parametrize(
    ("judge", "label_judge", "warned"),
    [("rubric", "rubric", "ground truth"), ("m", "m", "likely too high"), ("m", "rubric", None)],
)
def test_the_labellers_own_judge_is_warned_of(
    tmp_path: Path, judge: str, label_judge: str, warned: str | None
) -> None:
    inputs = fabricate(tmp_path / "in", prompts=8)
    write(inputs["evaluate"] / "judge.json", {"judge": judge})
    html = made(inputs, tmp_path / "out", label_judge=label_judge)
    assert ('class="warning"' in html) == (warned is not None)
    assert warned is None or warned in html


def test_losses_are_counted_all_and_shown_from_the_worst(tmp_path: Path) -> None:
    inputs = fabricate(tmp_path / "in", prompts=20)
    path = inputs["evaluate"] / "comparisons.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i, row in enumerate(rows):
        lost = i < 15
        row |= {"p_after": 0.0 if lost else 1.0, "margin": 1.0 + i, "status": "ok"}
        row["after"]["text"] = f"answer number {i}."
    write_lines(path, rows)
    html = made(inputs, tmp_path / "out")
    worse = html[html.index("Where it got worse") : html.index("How the training went")]
    assert "15 of 20 prompts were answered worse than before. Here are the 12 worst." in worse
    assert re.findall(r"answer number (\d+)\.", worse) == [str(i) for i in range(14, 2, -1)]


def test_failed_comparisons_are_counted(tmp_path: Path) -> None:
    inputs = fabricate(tmp_path / "in", prompts=10)
    path = inputs["evaluate"] / "comparisons.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0] |= {"status": "refusal", "p_after": None, "margin": None}
    write_lines(path, rows)
    assert "1 refusal: comparisons without a verdict" in Page(made(inputs, tmp_path / "out")).text


def test_a_resumed_step_claims_no_more_time_than_is_known(tmp_path: Path) -> None:
    inputs = fabricate(tmp_path / "in", prompts=8)
    assert "at least" not in Page(made(inputs, tmp_path / "whole")).text
    path = inputs["train"] / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "resumed": True}))
    assert "at least" in Page(made(inputs, tmp_path / "resumed")).text


def test_training_and_evaluation_alone_are_enough(tmp_path: Path) -> None:
    everything = fabricate(tmp_path / "in", prompts=8)
    inputs = {name: everything[name] for name in ("train", "evaluate")}
    for name in ("curves.jsonl", "manifest.json"):
        (inputs["train"] / name).unlink()
    (inputs["evaluate"] / "judge.json").unlink()
    text = Page(made(inputs, tmp_path / "out", config="[not: yaml", label_judge="")).text
    assert "an unnamed judge" in text and "What it was trained on" not in text


def test_curves_with_gaps_and_no_numbers_are_drawn_as_far_as_they_go(tmp_path: Path) -> None:
    inputs = fabricate(tmp_path / "in", prompts=8)
    rows = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": float("nan")}, {"epoch": 1.0, "loss": 3}]
    write_lines(inputs["train"] / "curves.jsonl", rows)
    text = Page(made(inputs, tmp_path / "out")).text
    assert "Loss" in text and "Reward margin" not in text


def test_what_is_needed_and_missing_is_named(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(StageError, match="needs evaluate"):
        run(settings(), {"train": inputs["train"]}, tmp_path)
    empty = {**inputs, "train": tmp_path}
    with pytest.raises(StageError, match="no trained adapter"):
        run(settings(), empty, tmp_path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    inputs = fabricate(tmp_path / "in", prompts=4)
    (inputs["evaluate"] / "metrics.json").write_text("{")
    with pytest.raises(DataError, match=r"evaluate/metrics\.json: not JSON"):
        run(settings(), inputs, tmp_path)


# The adapter and its card


def test_the_adapter_is_linked_and_the_trained_one_stays_as_it_is(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    made(inputs, tmp_path)
    made(inputs, tmp_path)
    trained, linked = inputs["train"] / "adapter", tmp_path / "adapter"
    assert (linked / "adapter_model.safetensors").samefile(trained / "adapter_model.safetensors")
    assert (trained / "README.md").read_text() == "what peft wrote"
    assert (linked / "README.md").read_text(encoding="utf-8").startswith("---\n")


def front(card: str) -> dict[str, Any]:
    found = yaml.safe_load(card.removeprefix("---\n").split("\n---")[0])
    assert isinstance(found, dict)
    return found


def test_the_card_tells_base_counts_results_and_how_to_load(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    made(inputs, tmp_path)
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    known = front(card)
    assert known["base_model"] == "Qwen/Qwen3-8B" and known["library_name"] == "peft"
    assert {"align", "dpo", "qlora"} <= set(known["tags"])
    assert "4,868 preference pairs" in card and "6,280 comparisons by the judge rubric" in card
    assert "| Win rate against the start | " in card and 'bnb_4bit_quant_type="nf4"' in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert 'revision="b968826d9c46"' in code


@pytest.mark.parametrize("name", ['evil/"x"\n- y: z', "org/no: yes #", "org/--- ", "org/null"])
def test_no_model_name_breaks_the_front_matter_or_the_code(
    inputs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    config = yaml.safe_dump({**yaml.safe_load(CONFIG), "model": {"name": name}})
    made(inputs, tmp_path, config=config)
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert front(card)["base_model"] == name and front(card)["library_name"] == "peft"
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert json.dumps(name) in code


def test_a_local_base_is_no_hub_name(inputs: dict[str, Path], tmp_path: Path) -> None:
    config = yaml.safe_dump({"model": {"name": "/work/models/base", "quantization": "none"}})
    evidence = gather(inputs, config=config, label_judge="rubric")
    known = front(front_matter(evidence))
    assert "base_model" not in known and "lora" in known["tags"]


@pytest.mark.parametrize(("how", "named"), [("int8", "load_in_8bit=True"), ("none", None)])
def test_the_card_loads_the_base_as_it_was_trained(
    inputs: dict[str, Path], tmp_path: Path, how: str, named: str | None
) -> None:
    config = yaml.safe_dump({"model": {"name": "org/base", "quantization": how}})
    made(inputs, tmp_path, config=config)
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert "4bit" not in code and ("BitsAndBytesConfig" in code) == (named is not None)
    assert named is None or named in code


# Small things


def test_durations_and_numbers_are_written_as_one_reads_them() -> None:
    assert [duration(s) for s in (0.43, 42.1, 200, 7500)] == [
        "0.4 s", "42 s", "3 min 20 s", "2 h 05 min",
    ]  # fmt: skip
    assert [number(x) for x in (1600, 33.42, 0.01234, -5.0)] == ["1,600", "33.4", "0.0123", "-5"]


def test_bins_hold_every_whole_number_in_its_middle() -> None:
    import numpy as np

    edges = bin_edges(np.array([0.0, 3.0, 15.0]))
    assert edges[0] == -0.5 and edges[-1] >= 15.5 and set(np.diff(edges)) == {1.0}
    alike = bin_edges(np.array([4.0, 4.0]))
    assert alike[0] < 4 < alike[-1]
