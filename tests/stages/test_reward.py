"""The reward stage: whole after a kill, frozen scale, and encoders as well as decoders."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from align.algorithms.online import open_source, saved_calibration
from align.errors import StageError
from align.jsonl import read_records
from align.models.load import load_model
from align.models.logprobs import score_rows
from align.models.roles import Roles
from align.models.scorer import Scorer, open_scorer
from align.models.settings import Model
from align.records import Candidate, Message, Prompt
from align.rewards.source import Sample
from align.stages import reference, reward
from align.stages.reward import Judged, measures
from align.stages.reward_page import sentence
from align.stages.settings import ReferenceStage, RewardStage
from tests.algorithms.test_reward import SETTINGS
from tests.conftest import model_settings
from tests.models.test_classifier import save_encoder, save_words
from tests.stages.pairs import LORA, write_preferences

ROOT = Path(__file__).parent.parent.parent
ALGORITHM = replace(SETTINGS, held_out=0.3, micro_batch_size=2, learning_rate=1e-3)
FILES = [
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/reward.json",
    "counts.json", "curves.jsonl", "held_out.jsonl", "metrics.json", "report.html", "verdict.txt",
]  # fmt: skip


def tokenized(model: Model, folder: Path, *, score: bool = False) -> Path:
    out = folder / "reference"
    out.mkdir()
    preferences = write_preferences(folder / "preferences")
    settings = ReferenceStage(model=model, max_length=None, score=score)
    reference.run(settings, {"preferences": preferences}, out)
    return out


def write_candidates(folder: Path) -> Path:
    folder.mkdir()
    lines = [
        {"id": str(i), "prompt": f"Question {i}?", "responses": ["Yes." * (i + 1), f"No, {i}.", ""]}
        for i in range(20)
    ]
    (folder / "candidates.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder


def stage(model: Model) -> RewardStage:
    return RewardStage(model=model, adapter=LORA, algorithm=ALGORITHM, seed=1)


def trained(model: Model, folder: Path, **inputs: Path) -> Path:
    given = {"reference": tokenized(model, folder), **inputs}
    out = folder / "out"
    out.mkdir()
    reward.run(stage(model), given, out)
    return out


def told(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def pair(difference: float, p: float, prompt: int) -> Judged:
    return Judged(
        id=str(prompt), place=prompt, prompt=str(prompt), p=p, score_chosen=difference,
        score_rejected=0.0, length_chosen=3, length_rejected=2,
    )  # fmt: skip


def left(out: Path) -> dict[str, bytes]:
    return {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_what_it_writes_agrees_with_itself(tiny: Model, tmp_path: Path) -> None:
    out = trained(tiny, tmp_path)
    assert sorted(left(out)) == FILES
    metrics = json.loads((out / "metrics.json").read_text())
    pairs = told(out / "held_out.jsonl")
    right = [pair["score_chosen"] > pair["score_rejected"] for pair in pairs]
    assert metrics["reward/held_out_accuracy"] == pytest.approx(numpy.mean(right))
    low, high = (metrics[f"reward/held_out_accuracy_{end}"] for end in ("low", "high"))
    assert low <= metrics["reward/held_out_accuracy"] <= high
    assert metrics["reward/held_out_prompts"] < metrics["reward/held_out_pairs"] == len(pairs)
    assert all(key.startswith("reward/") for key in metrics)
    page = (out / "report.html").read_text()
    assert f"{100 * numpy.mean(right):.1f}%" in page and page.count("<svg") == 7
    assert not re.search(r"(src|href)=.http", page)
    verdict = (out / "verdict.txt").read_text()
    assert verdict.endswith("\n") and str(len(pairs)) in verdict


def test_ties_of_the_judge_are_no_part_of_the_accuracy() -> None:
    """40 ties, all of them ranked one way, and 20 pairs of which 15 are right."""
    decided = [pair(1.0 if i % 4 else -1.0, 0.8, i) for i in range(20)]
    found = measures([*decided, *(pair(1.0, 0.5, 20 + i) for i in range(40))], seed=0)
    alone = measures(decided, seed=0)
    for end in ("", "_low", "_high"):
        assert found[f"reward/held_out_accuracy{end}"] == alone[f"reward/held_out_accuracy{end}"]
    assert found["reward/held_out_accuracy"] == 0.75
    assert (found["reward/held_out_pairs"], found["reward/held_out_ties"]) == (20, 40)
    assert found["reward/held_out_prompts"] == 20


def test_where_all_are_ties_it_cannot_be_told_from_chance() -> None:
    found = measures([pair(1.0, 0.5, i) for i in range(30)], seed=0)
    assert found["reward/held_out_accuracy"] == 0.5 and found["reward/held_out_pairs"] == 0
    assert "cannot be told from chance" in sentence(found) and "50.0%" in sentence(found)


@pytest.mark.parametrize(
    ("right", "says"),
    [
        (90, r"^The reward model ranks 90\.0% \(.*\) of 100 held-out pairs as the judge does\.$"),
        (50, r"cannot be told from chance: it ranks 50\.0%"),
        (
            10,
            r"the wrong way round more often than not: 10\.0% .*Check whether chosen and rejected",
        ),
    ],
)
def test_worse_than_chance_is_not_called_chance(right: int, says: str) -> None:
    found = measures([pair(1.0 if i < right else -1.0, 0.9, i) for i in range(100)], seed=0)
    assert re.search(says, sentence(found))


def test_an_answer_that_was_cut_off_is_no_reference_while_there_are_whole_ones(
    tmp_path: Path,
) -> None:
    """In use a cut answer is scored without the end of turn that a text would be given here."""

    def written(*finishes: str) -> set[tuple[str, int]]:
        lines = [
            {"id": str(i), "prompt": "q", "responses": [{"text": "a", "finish": f} for f in prompt]}
            for i, prompt in enumerate(finish.split() for finish in finishes)
        ]
        file = tmp_path / "candidates.jsonl"
        file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        seeds = range(20)
        found = [reward.drawn(file, numpy.random.default_rng(seed)) for seed in seeds]
        return {(candidate.id, k) for one in found for candidate, k in one}

    assert written("length eos length eos", "length length") == {("0", 1), ("0", 3)}
    assert written("length length", "length") == {("0", 0), ("0", 1), ("1", 0)}
    # One whole answer has no spread to calibrate by.
    assert len(written("eos", *["length"] * 19)) == 20


def test_reference_responses_have_mean_0_and_deviation_1_after_reload(
    tiny_nf4: Model, tmp_path: Path
) -> None:
    folder = write_candidates(tmp_path / "candidates")
    out = trained(tiny_nf4, tmp_path, candidates=folder)
    said = json.loads((out / "adapter" / "reward.json").read_text())
    assert said["n"] == 20 and said["reference"] == "answers of the model before training"
    scorer = open_scorer(out / "adapter", base=None)
    drawn = reward.drawn(folder / "candidates.jsonl", numpy.random.default_rng(1))
    raw = scorer.scores([(c.messages, c.responses[k].text) for c, k in drawn])
    normal = [scorer.normalised(value) for value in raw]
    assert numpy.mean(normal) == pytest.approx(0, abs=1e-4)
    assert numpy.std(normal) == pytest.approx(1, abs=1e-4)
    online: Any = SimpleNamespace(reward_model=out / "adapter")
    known = saved_calibration(online, reward="role")
    assert known is not None and known.highest == pytest.approx(max(raw), abs=1e-4)
    assert known.lowest == pytest.approx(min(raw), abs=1e-4)
    assert len({c.id for c, _ in drawn}) == 20
    candidates = read_records(folder / "candidates.jsonl", Candidate.from_json)
    assert {c.id for c, _ in drawn} == {c.id for c in candidates}


def test_text_scores_as_the_tokens_that_were_trained_on(tiny: Model, tmp_path: Path) -> None:
    out = trained(tiny, tmp_path)
    scorer = open_scorer(out / "adapter", base=None)
    file = tmp_path / "preferences" / "preferences.jsonl"
    lines, pairs = told(file), told(out / "held_out.jsonl")
    for pair in pairs:
        line = lines[pair["place"]]
        asked = (Message(role="user", content=line["messages"][0]["content"]),)
        found = scorer.scores([(asked, line["chosen"]), (asked, line["rejected"])])
        assert found == pytest.approx([pair["score_chosen"], pair["score_rejected"]], abs=1e-4)
        assert line["id"] == pair["id"] and line["p"] == pytest.approx(pair["p"])
    assert len({pair["place"] for pair in pairs}) == len(pairs) > 2


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_implicit_reward_is_a_plain_language_models_adapter_against_its_base(
    quantization: str, tiny_folder: Path, tmp_path: Path
) -> None:
    model = model_settings(tiny_folder, quantization=quantization)
    tokens = tokenized(model, tmp_path, score=True)
    out = tmp_path / "out"
    out.mkdir()
    implicit = replace(ALGORITHM, score="implicit", beta=0.7)
    reward.run(replace(stage(model), algorithm=implicit), {"reference": tokens}, out)
    assert sorted(left(out)) == FILES
    metrics = json.loads((out / "metrics.json").read_text())
    assert all(key.startswith("reward/") for key in metrics)
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    assert all(".lora_" in key for key in saved)
    scorer = open_scorer(out / "adapter", base=None)
    pairs = reward.split(tokens, share=0.3, seed=1).held_out
    rows = reward.both_rows(pairs, range(len(pairs)))
    base = load_model(model)
    before = score_rows(base, rows, title="base")
    after = score_rows(PeftModel.from_pretrained(base, out / "adapter"), rows, title="adapter")
    found = scorer.row_scores(rows)
    by_hand = [0.7 * (a - b) for a, b in zip(after, before, strict=True)]
    assert found == pytest.approx(by_hand, abs=1e-3) and numpy.std(found) > 0.01
    held_out = told(out / "held_out.jsonl")
    kept = [pair[f"score_{side}"] for pair in held_out for side in ("chosen", "rejected")]
    assert kept == pytest.approx(found, abs=1e-3)

    roles = Roles(load_model(model))
    given = SimpleNamespace(reward_model=out / "adapter")
    source = open_source(given, roles, reward="role")  # type: ignore[arg-type]
    samples = [
        Sample(
            prompt=Prompt(id="", messages=()), text="", finish="eos",
            prompt_ids=tuple(row.prompt), completion_ids=tuple(row.completion),
        )
        for row in rows
    ]  # fmt: skip
    assert source.scores(samples) == pytest.approx(found, abs=1e-3)


def test_an_encoder_learns_too_and_its_weights_are_not_needed_for_tokens(tmp_path: Path) -> None:
    folder = save_words(save_encoder(tmp_path / "bert"))
    model = model_settings(folder)
    weights = folder / "model.safetensors"
    hidden = weights.rename(tmp_path / "hidden")
    tokens = tokenized(model, tmp_path)
    hidden.rename(weights)
    out = tmp_path / "out"
    out.mkdir()
    reward.run(stage(model), {"reference": tokens}, out)
    assert sorted(left(out)) == FILES
    pairs = told(out / "held_out.jsonl")
    apart = numpy.mean([pair["score_chosen"] - pair["score_rejected"] for pair in pairs])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["reward/held_out_margin"] == pytest.approx(apart, abs=1e-4), "read as trained"
    scorer = open_scorer(out / "adapter", base=None)
    question = (Message(role="user", content="three days"),)
    row = scorer.encoded(question, "no pay")
    assert scorer.tokenizer.convert_ids_to_tokens([*row.prompt, *row.completion]) == [
        "[CLS]", "three", "days", "[SEP]", "no", "pay", "[SEP]",
    ]  # fmt: skip
    hostile = scorer.encoded(question, "no [SEP] pay")
    ids = [*hostile.prompt, *hostile.completion]
    assert ids.count(scorer.tokenizer.sep_token_id) == 2, "text cannot end a turn"
    one, two = scorer.scores([(question, "no pay"), (question, "the office of the employer")])
    assert one != two
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    plain = PeftModel.from_pretrained(plain, str(out / "adapter")).eval()
    given = scorer.tokenizer("three days", "no pay", return_tensors="pt")
    assert given.token_type_ids.tolist() == [[0, 0, 0, 0, 1, 1, 1]]
    with torch.no_grad():
        assert plain(**given).logits.item() == pytest.approx(one, abs=1e-5)
        given["token_type_ids"] *= 0
        assert abs(plain(**given).logits.item() - one) > 1e-3, "segments matter"


def test_a_sigkill_in_the_middle_changes_no_bit(tiny_nf4: Model, tmp_path: Path) -> None:
    tokens = tokenized(tiny_nf4, tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        out.mkdir()
    command = [sys.executable, "-m", "tests.stages.test_reward", tiny_nf4.name, str(tokens)]
    child = subprocess.Popen(
        [*command, str(killed)], cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(killed.glob("checkpoints/checkpoint-*/complete")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and not (killed / "verdict.txt").exists()
    for out in (whole, killed):
        reward.run(stage(tiny_nf4), {"reference": tokens}, out)
    assert left(killed) == left(whole)


def test_killed_while_measuring_it_measures_again(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tokenized(tiny, tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for out in (whole, killed):
        out.mkdir()
    reward.run(stage(tiny), {"reference": tokens}, whole)

    def die(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(reward, "calibrated", die)
        with pytest.raises(KeyboardInterrupt):
            reward.run(stage(tiny), {"reference": tokens}, killed)
    reward.run(stage(tiny), {"reference": tokens}, killed)
    assert left(killed) == left(whole)


def test_errors_name_the_keys_as_they_are_typed(tiny: Model, tmp_path: Path) -> None:
    tokens = tokenized(tiny, tmp_path)
    for change, says in (
        ({"algorithm": replace(ALGORITHM, batch_size=999)}, r"reward\.batch_size=999"),
        ({"algorithm": replace(ALGORITHM, held_out=1e-9)}, r"reward\.held_out=1e-09"),
        ({"adapter": replace(LORA, target_modules=["no"])}, r"reward_adapter\.target_modules"),
    ):
        with pytest.raises(Exception, match=says):
            reward.run(replace(stage(tiny), **change), {"reference": tokens}, tmp_path)


def test_a_folder_without_a_reward_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="neither an adapter nor a model"):
        open_scorer(tmp_path, base=None)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(StageError, match=r"no reward\.json that names its base; type"):
        open_scorer(tmp_path, base=None)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"mean": 0.0, "std"', r"reward\.json: damaged \(Expecting"),
        ("7", r"reward\.json: damaged"),
        ('{"base": {"name": "x"}}', r"no reward\.json that names its base \(.*revision"),
        ('{"base": "x"}', r"no reward\.json that names its base \("),
    ],
)
def test_a_damaged_reward_json_is_one_line(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "reward.json").write_text(text)
    with pytest.raises(StageError, match=says) as raised:
        open_scorer(tmp_path, base=None)
    assert "\n" not in str(raised.value)


def test_no_conversation_needs_no_model() -> None:
    assert Scorer(model=None, tokenizer=None, max_length=1).row_scores([], budget=1) == []


if __name__ == "__main__":
    name, tokens, out = sys.argv[1:]
    model = model_settings(Path(name), quantization="nf4")
    reward.run(stage(model), {"reference": Path(tokens)}, Path(out))
