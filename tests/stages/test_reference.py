"""The reference is the base model's own opinion, cached once, whatever interrupts it."""

import json
from collections.abc import Sequence
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer

from align.errors import ConfigError, DataError
from align.models.adapters import add_lora, without_adapter
from align.models.load import load_model
from align.models.settings import Model
from align.stages import reference
from align.stages.settings import ReferenceStage
from tests.conftest import model_settings
from tests.models.test_classifier import save_encoder, save_words
from tests.stages.pairs import LORA, reference_stage, write_preferences


def run(model: Model, out: Path, *, max_length: int | None = None, **plenty: int) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    preferences = write_preferences(out.parent / "preferences", **plenty)
    reference.run(reference_stage(model, max_length=max_length), {"preferences": preferences}, out)
    return out


def rows(out: Path) -> Any:
    return Dataset.from_file(str(out / "pairs.arrow"))


def test_the_cache_holds_what_the_policy_says_with_its_adapter_off(
    tiny_nf4: Model, tmp_path: Path
) -> None:
    out = run(tiny_nf4, tmp_path / "reference", prompts=5)
    scores = load_file(out / "reference.safetensors")
    policy = add_lora(load_model(tiny_nf4), settings=LORA, seed=0)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    for i, row in enumerate(rows(out)):
        for side in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
            with torch.no_grad(), without_adapter(policy):
                table = policy(input_ids=ids).logits[0].log_softmax(-1)
            first = len(row["prompt_ids"])
            alone = sum(table[t - 1, ids[0, t]] for t in range(first, ids.shape[1]))
            assert scores[side][i].item() == pytest.approx(float(alone), rel=1e-4, abs=1e-3)


def test_rows_stand_in_the_order_of_the_preferences(tiny: Model, tmp_path: Path) -> None:
    out = run(tiny, tmp_path / "reference")
    assert rows(out)["id"][:] == [f"p{i}" for i in range(16) for _ in range(2)]
    counts = json.loads((out / "counts.json").read_text())
    assert counts["pairs"] == 32 and counts["prompts_cut"] == counts["completions_cut"] == 0
    assert counts["reference"] == "base model, adapter off"
    assert sorted(p.name for p in out.iterdir()) == [
        "counts.json",
        "pairs.arrow",
        "reference.safetensors",
    ]


def test_cuts_are_counted(tiny: Model, tmp_path: Path) -> None:
    out = run(tiny, tmp_path / "reference", max_length=20)
    counts = json.loads((out / "counts.json").read_text())
    assert counts["prompts_cut"] > 0 and counts["completions_cut"] > 0
    assert all(length <= 20 for length in rows(out)["length"])


def test_an_encoder_gives_no_answer_a_probability(tmp_path: Path) -> None:
    encoder = model_settings(save_words(save_encoder(tmp_path / "bert")))
    with pytest.raises(ConfigError, match=r"both directions.*type reward\.score=head"):
        run(encoder, tmp_path / "reference")


def test_an_unscored_decoder_is_not_given_an_encoders_template(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Its tokenizer may well have a separator; the reward model would be read another way."""
    bare = copytree(tiny_folder, tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(bare)
    tokenizer.chat_template, tokenizer.sep_token = None, tokenizer.eos_token
    (bare / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(bare)
    preferences = {"preferences": write_preferences(tmp_path / "preferences")}
    unscored = ReferenceStage(model=model_settings(bare), max_length=None, score=False)
    with pytest.raises(ConfigError, match="no chat template"):
        reference.run(unscored, preferences, tmp_path)


class Killed(BaseException):
    """As sudden as SIGKILL, but within this process."""


def test_a_killed_scoring_goes_on_and_ends_the_same(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "CHUNK_BATCHES", 1)
    monkeypatch.setattr(reference, "default_budget", lambda device: 200)
    whole = run(tiny, tmp_path / "a" / "reference")
    scored: list[Sequence[Sequence[int]]] = []
    real = reference.score_chunk

    def dying(model: Any, rows: Any, chunk: Sequence[Sequence[int]]) -> torch.Tensor:
        if len(scored) == 3:
            raise Killed
        scored.append(chunk)
        return real(model, rows, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(reference, "score_chunk", dying)
        with pytest.raises(Killed):
            run(tiny, tmp_path / "b" / "reference")
    again: list[Sequence[Sequence[int]]] = []

    def counting(model: Any, rows: Any, chunk: Sequence[Sequence[int]]) -> torch.Tensor:
        again.append(chunk)
        return real(model, rows, chunk)

    monkeypatch.setattr(reference, "score_chunk", counting)
    resumed = run(tiny, tmp_path / "b" / "reference")
    assert len(scored) == 3 and again and not [chunk for chunk in again if chunk in scored]
    for name in ("pairs.arrow", "reference.safetensors", "counts.json"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()


def test_an_answer_in_several_pairs_is_scored_once_and_stands_in_each(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pair(identifier: str, prompt: str, chosen: str, rejected: str) -> str:
        texts = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        return json.dumps({"id": identifier, **texts})

    folder = tmp_path / "preferences"
    folder.mkdir()
    lines = [
        pair("p", "How many days?", "Two days.", "Five days."),
        pair("p", "How many days?", "Two days.", "Nine days."),
        pair("p", "How many days?", "Five days.", "Nine days."),
        pair("q", "How many weeks?", "Two days.", "Five days."),
    ]
    (folder / "preferences.jsonl").write_text("\n".join(lines))
    sides: list[int] = []
    real = reference.score_chunk

    def counting(model: Any, rows: Any, chunk: Sequence[Sequence[int]]) -> torch.Tensor:
        sides.extend(side for batch in chunk for side in batch)
        return real(model, rows, chunk)

    monkeypatch.setattr(reference, "score_chunk", counting)
    out = tmp_path / "reference"
    out.mkdir()
    reference.run(reference_stage(tiny), {"preferences": folder}, out)
    assert len(sides) == 5, "three answers to one prompt, two to the other"
    found = load_file(out / "reference.safetensors")
    chosen, rejected = found["chosen"].tolist(), found["rejected"].tolist()
    assert chosen[0] == chosen[1] and rejected[0] == chosen[2] and rejected[1] == rejected[2]
    assert chosen[3] != chosen[0] and rejected[3] != rejected[0]


def test_no_preferences_are_an_error(tiny: Model, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not one preference"):
        run(tiny, tmp_path / "reference", prompts=0)


def test_a_prompt_that_cannot_fit_is_named(tiny: Model, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"preferences\.jsonl: id 'p0': .*data\.max_length"):
        run(tiny, tmp_path / "reference", max_length=4)
