"""The evaluation is blind, tells every verdict from the right side, and measures KL in nats."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from align.errors import JudgeError
from align.jsonl import dump_line
from align.models.adapters import add_lora, without_adapter
from align.models.chat import encode_completion, encode_prompt
from align.models.load import load_model, load_tokenizer
from align.models.settings import Lora, Model
from align.records import Candidate, Message, Response
from align.stages import evaluate
from align.stages.settings import EvaluateStage

PROMPTS = 60
JUDGES = '''
"""Judges with one opinion each; `seen` is what they were shown."""
from align.records import Verdict

MANNERS = ("kind",)

async def compare(comparisons, *, settings):
    for c in comparisons:
        with open(settings.log, "a") as log:
            log.write(c.first[:3] + "\\n")
            asked = log.tell()
        if settings.opinion == "dies" and asked > 4 * 40:
            raise RuntimeError("killed")
        if settings.opinion == "skips" and "3" in c.first:
            continue
        status = "ok"
        scores = tuple({"correct": float("new" in t), "kind": float("3" in t)}
                       for t in (c.first, c.second))
        if settings.opinion == "mixed" and "3" in c.first:
            scores = tuple({"tone": float("new" in t)} for t in (c.first, c.second))
        if settings.opinion == "mixed" and "2" in c.first:
            scores = ()
        if settings.opinion == "first":
            p = 1.0
        elif settings.opinion == "refuses" and "3" in c.first:
            status, p, scores = "refusal", None, ()
        else:
            p = float("new" in c.first)
        yield Verdict(id=c.prompt.id, first=c.first_index, second=c.second_index, status=status,
                      p_first=p, consistent=True, judge=settings.opinion, scores=scores)
'''


@dataclass(frozen=True, kw_only=True)
class Judge:
    opinion: str
    log: str
    name: str = "opinionated"
    module: str = "opinionated_judge"


Measure = Callable[[str], dict[str, float]]


def answers(folder: Path, tokenizer: Any, said: str) -> Path:
    """What a model said to each prompt, as generate leaves it."""
    folder.mkdir()
    lines = []
    for i in range(PROMPTS):
        text = f"{said} answer {i}"
        tokens = encode_completion(tokenizer, text)
        response = Response(text=text, finish="eos", tokens=tokens, logprob=-1.0, seed=0)
        candidate = Candidate(
            id=str(i), messages=(Message(role="user", content=f"{i}?"),), responses=(response,)
        )
        lines.append(dump_line(candidate.to_json()))
    (folder / "candidates.jsonl").write_bytes(b"".join(lines))
    return folder


@pytest.fixture
def policy(tiny: Model, lora: Lora, tmp_path: Path) -> Any:
    """An adapter that moved, saved as train leaves it."""
    policy = add_lora(load_model(tiny), settings=lora, seed=0)
    torch.manual_seed(2)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    (tmp_path / "train").mkdir()
    policy.save_pretrained(tmp_path / "train" / "adapter")
    (tmp_path / "train" / "metrics.json").write_text('{"train/held_out_accuracy": 0.75}')
    return policy.eval()


@pytest.fixture
def stage(tiny: Model, policy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the stage with a judge of some opinion, or with none; returns its settings' runner."""
    (tmp_path / "opinionated_judge.py").write_text(JUDGES)
    monkeypatch.syspath_prepend(tmp_path)
    tokenizer = load_tokenizer(tiny)
    inputs = {
        "before": answers(tmp_path / "before", tokenizer, "old"),
        "after": answers(tmp_path / "after", tokenizer, "new"),
        "train": tmp_path / "train",
    }

    def run(opinion: str | None, out: Path) -> dict[str, float]:
        out.mkdir(exist_ok=True)
        judge = opinion and Judge(opinion=opinion, log=str(tmp_path / "log"))
        settings = EvaluateStage(
            model=tiny, judge=judge, max_new_tokens=32, resamples=200, precision_samples=0, seed=5
        )
        evaluate.run(settings, inputs, out)
        found: dict[str, float] = json.loads((out / "metrics.json").read_text())
        return found

    return run


def test_the_new_answer_wins_wherever_it_is_shown(stage: Any, tmp_path: Path) -> None:
    found = stage("new", tmp_path / "out")
    assert found["evaluate/win_rate"] == found["evaluate/win_rate_high"] == 1.0
    assert found["evaluate/correct_before"] == 0.0 and found["evaluate/correct_after"] == 1.0
    assert found["evaluate/criterion/correct/won"] == 1.0
    assert found["evaluate/n_equal_manners"] == PROMPTS
    assert found["evaluate/win_rate_equal_manners"] == 1.0
    shown = (tmp_path / "log").read_text().split()
    assert 15 < shown.count("new") < 45, "each comes first about as often"


def test_a_judge_that_takes_the_first_place_finds_no_winner(stage: Any, tmp_path: Path) -> None:
    found = stage("first", tmp_path / "out")
    assert 0.3 < found["evaluate/win_rate"] < 0.7, "the draw of who is shown first, and no more"


def test_a_refusal_is_counted_and_is_no_verdict(stage: Any, tmp_path: Path) -> None:
    found = stage("refuses", tmp_path / "out")
    refused = sum("3" in str(i) for i in range(PROMPTS))
    assert found["evaluate/refusal"] == refused
    assert found["evaluate/n_judged"] == PROMPTS - refused
    assert found["evaluate/win_rate"] == 1.0
    rows = [
        json.loads(x) for x in (tmp_path / "out" / "comparisons.jsonl").read_text().split("\n")[:-1]
    ]
    assert [row["p_after"] is None for row in rows] == ["3" in row["id"] for row in rows]


def test_an_answer_that_the_judge_passed_over_counts_as_failed(stage: Any, tmp_path: Path) -> None:
    found = stage("skips", tmp_path / "out")
    skipped = sum("3" in str(i) for i in range(PROMPTS))
    assert found["evaluate/failed"] == skipped
    assert found["evaluate/n_judged"] == PROMPTS - skipped


def test_each_criterion_is_told_over_the_verdicts_that_carry_it(stage: Any, tmp_path: Path) -> None:
    """As with an escalation to a judge that has other criteria, or none."""
    found = stage("mixed", tmp_path / "out")
    other = sum("3" in str(i) and "2" not in str(i) for i in range(PROMPTS))
    bare = sum("2" in str(i) for i in range(PROMPTS))
    assert found["evaluate/n_judged"] == PROMPTS
    assert found["evaluate/criterion/tone/n"] == other
    assert found["evaluate/criterion/correct/n"] == PROMPTS - other - bare
    assert found["evaluate/criterion/tone/won"] == found["evaluate/criterion/correct/won"] == 1.0
    assert found["evaluate/n_equal_manners"] == PROMPTS - other - bare


def test_what_was_judged_before_an_error_is_not_asked_again(stage: Any, tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="RuntimeError: killed"):
        stage("dies", tmp_path / "out")
    asked = len((tmp_path / "log").read_text().split())
    found = stage("new", tmp_path / "out")
    assert found["evaluate/win_rate"] == 1.0
    assert len((tmp_path / "log").read_text().split()) == PROMPTS + 1, "one was asked, unanswered"
    assert asked == 41


def test_without_a_judge_there_are_accuracy_and_kl_and_no_win_rate(
    stage: Any, tmp_path: Path
) -> None:
    found = stage(None, tmp_path / "out")
    assert found["evaluate/held_out_accuracy"] == 0.75 and "evaluate/kl" in found
    assert not [key for key in found if "win_rate" in key or "correct" in key]
    assert found["evaluate/n"] == PROMPTS


def test_kl_is_the_mean_sum_of_log_ratios_over_the_policys_answers(
    stage: Any, policy: Any, tiny: Model, tmp_path: Path
) -> None:
    """Token by token, one answer at a time, without our batches."""
    found = stage(None, tmp_path / "out")
    tokenizer, total, length = load_tokenizer(tiny), 0.0, 0
    for i in range(PROMPTS):
        prompt = encode_prompt(tokenizer, (Message(role="user", content=f"{i}?"),)).ids
        answer = encode_completion(tokenizer, f"new answer {i}")
        ids = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            new = policy(input_ids=ids).logits[0].log_softmax(-1)
            with without_adapter(policy):
                old = policy(input_ids=ids).logits[0].log_softmax(-1)
        for t in range(len(prompt), ids.shape[1]):
            total += float(new[t - 1, ids[0, t]] - old[t - 1, ids[0, t]])
        length += len(answer) - 1
    assert found["evaluate/kl"] == pytest.approx(total / PROMPTS, rel=1e-3, abs=1e-4)
    assert abs(found["evaluate/kl"]) > 0.01, "the adapter moved the policy"
    assert found["evaluate/length_after"] == pytest.approx(length / PROMPTS)
