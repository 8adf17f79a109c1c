"""PPO learns from every source of rewards, and pays each answer what its source says of it."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from align.artifacts import write_json
from align.models.adapters import WEIGHTS
from align.models.load import load_tokenizer
from align.models.settings import Lora, Model
from align.records import Message, Prompt
from align.rewards.model import ModelReward
from align.rewards.source import Sample
from tests.algorithms.ppo.running import even, online, train
from tests.algorithms.ppo.test_experience import reward_folder
from tests.algorithms.ppo.test_trainer import LEARNING, curves, gain
from tests.conftest import model_settings, save_tiny
from tests.models.test_classifier import trained
from tests.rewards.test_sources import scripted

HERE = "tests.algorithms.ppo.test_reward_sources"
LONGEST = scripted(prefer="longest", p=0.9)


async def slow_even(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    await asyncio.sleep(0)
    return even(prompts, responses)


@pytest.fixture
def stranger(tmp_path: Path) -> Model:
    """A model of another vocabulary, to which the policy's ids mean something else."""
    folder = save_tiny(tmp_path / "stranger", vocab_size=1100)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["Question", " days", "ing"])
    tokenizer.save_pretrained(folder)
    return model_settings(folder)


def ours(model: Model, lora: Lora, folder: Path) -> Path:
    """What a reward training leaves: an adapter with a head, and what it stands on."""
    trained(model, lora).save_pretrained(folder)
    told = {"mean": 0.0, "std": 1.0, "base": asdict(model), "max_length": 256}
    write_json(folder / "reward.json", told)
    return folder


def theirs(model: Model, folder: Path) -> Path:
    """A whole classifier, as others publish it."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        whole = AutoModelForSequenceClassification.from_pretrained(model.name, num_labels=1)
        torch.nn.init.normal_(whole.score.weight)
    whole.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model.name).save_pretrained(folder)
    return folder


def plain(model: Model, folder: Path) -> Any:
    """What `ours` is to transformers and PEFT alone."""
    base = AutoModelForSequenceClassification.from_pretrained(model.name, num_labels=1)
    return PeftModel.from_pretrained(base, str(folder))


def by_hand(model: Any, tokenizer: Any, messages: Sequence[Message], answer: str) -> float:
    """The logit at the last token of the conversation as the starter's template writes it."""
    turns = "".join(f"<|{m.role}|>{m.content}<|end|>" for m in messages)
    text = f"{turns}<|assistant|>{answer}<|end|>"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    with torch.no_grad():
        return float(inner.score(inner.model(ids).last_hidden_state[0, -1]))


def asked(prompt: str, text: str) -> Sample:
    messages = (Message(role="user", content=prompt),)
    return Sample(
        prompt=Prompt(id=prompt, messages=messages), text=text, prompt_ids=(5, 6),
        completion_ids=(3, 1), finish="eos",
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["ours", "theirs"])
def test_a_folder_with_another_tokenizer_scores_what_transformers_read_at_the_last_token(
    tiny: Model, stranger: Model, lora: Lora, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "saved"
    if kind == "ours":
        model = plain(stranger, ours(stranger, lora, folder))
    else:
        model = AutoModelForSequenceClassification.from_pretrained(theirs(stranger, folder))
    tokenizer, policys = AutoTokenizer.from_pretrained(stranger.name), load_tokenizer(tiny)
    samples = [
        asked("How many days?", "Three days."), asked("Pay?", "No."), asked("Pay?", "Working a day")
    ]  # fmt: skip
    assert all(tokenizer(s.text).input_ids != policys(s.text).input_ids for s in samples[::2])
    expected = [by_hand(model, tokenizer, s.prompt.messages, s.text) for s in samples]
    assert ModelReward(str(folder)).scores(samples) == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1


# Iterations.

FEW: dict[str, Any] = {"iterations": 2, "samples": 3, "logged_samples": 99, "monitor_every": 9}
Line = dict[str, Any]


def told(out: Path) -> list[Line]:
    """All answers, those to one prompt together."""
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["step"], line["id"]))


def check_learnt(out: Path, expected: Sequence[float]) -> None:
    """Each answer was paid what is expected, and the policy is the base no more."""
    assert [line["reward"] for line in told(out)] == pytest.approx(list(expected), abs=1e-4)
    for i, line in enumerate(curves(out)):
        mean = sum(expected[12 * i : 12 * (i + 1)]) / 12
        assert line["reward"] == pytest.approx(mean, abs=1e-4) and line["reward_std"] > 0
    assert len(curves(out)) == 2 and curves(out)[1]["kl"] > 0
    state = load_file(out / "adapter" / WEIGHTS)
    assert all(bool(value.any()) for key, value in state.items() if "lora_B" in key)


def test_a_folder_with_another_tokenizer_is_learnt_from(
    tiny: Model, stranger: Model, lora: Lora, tmp_path: Path
) -> None:
    folder = ours(stranger, lora, tmp_path / "saved")
    out = train(tiny, tmp_path / "out", reward=str(folder), **FEW)
    model, tokenizer = plain(stranger, folder), AutoTokenizer.from_pretrained(stranger.name)
    expected = []
    for line in told(out):
        messages = [Message(**message) for message in line["messages"]]
        expected.append(by_hand(model, tokenizer, messages, line["text"]))
    check_learnt(out, expected)


def test_a_judges_preferences_among_a_prompts_answers_are_learnt_from(
    tiny: Model, tmp_path: Path
) -> None:
    """Of three answers each is compared with the two others; the longer one wins by 0.9."""
    out = train(tiny, tmp_path, given=online(tiny, judge=LONGEST), reward="judge", **FEW)
    expected = []
    for _, group in groupby(told(out), key=lambda line: (line["step"], line["id"])):
        lengths = [len(line["text"]) for line in group]
        for one in lengths:
            won = [0.9 if one > other else 0.5 if one == other else 0.1 for other in lengths]
            expected.append((sum(won) - 0.5) / 2)  # an answer is not compared with itself
    check_learnt(out, expected)


def test_an_async_function_is_learnt_from(tiny: Model, tmp_path: Path) -> None:
    out = train(tiny, tmp_path, reward=f"{HERE}:slow_even", **FEW)
    check_learnt(out, even([], [line["text"] for line in told(out)]))


def test_the_reward_role_on_the_policys_own_base_is_learnt_from(
    tiny: Model, lora: Lora, tmp_path: Path
) -> None:
    folder = reward_folder(tiny, lora, tmp_path / "saved", mean=0.0, std=3.0)
    given = online(tiny, reward_model=folder)
    changes = {**LEARNING, "iterations": 8, "max_new_tokens": 1, "reward": "role"}
    lines = curves(train(tiny, tmp_path / "out", given=given, **changes))
    assert gain(lines) > 0.5  # a standard deviation among the answers is 1.5
    assert lines[-1]["score"] == pytest.approx(lines[-1]["reward"] / 3.0, abs=1e-4)
