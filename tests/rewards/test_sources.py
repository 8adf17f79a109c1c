"""Sources of rewards: a number for each answer, or one clear line."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.artifacts import write_json
from align.errors import ConfigError, StageError
from align.judge.settings import Scripted
from align.models.classifier import load_reward_model, scores
from align.models.load import load_model
from align.models.logprobs import Row, collate, sequence_logprobs
from align.models.roles import Roles
from align.models.settings import Lora, Model
from align.records import Message, Prompt
from align.rewards.function import FunctionReward
from align.rewards.judge import JudgeReward
from align.rewards.model import ModelReward
from align.rewards.role import RoleReward
from align.rewards.settings import kind_of
from align.rewards.source import Sample
from tests.conftest import model_settings, save_tiny
from tests.models.test_classifier import trained

HERE = "tests.rewards.test_sources"


def sample(text: str, *, prompt: str = "p0", ids: Sequence[int] = (9, 1)) -> Sample:
    return Sample(
        prompt=Prompt(id=prompt, messages=(Message(role="user", content="How many days?"),)),
        text=text,
        prompt_ids=(5, 6, 7),
        completion_ids=tuple(ids),
        finish="eos",
    )


def length(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    assert all(isinstance(prompt, Prompt) for prompt in prompts)
    return [float(len(text)) for text in responses]


async def slow_length(prompts: Sequence[Prompt], responses: Sequence[str]) -> Any:
    await asyncio.sleep(0)
    return torch.tensor([float(len(text)) for text in responses])


def fails(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    raise KeyError("gold")


def nan(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    return [math.nan for _ in responses]


def short(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
    return [1.0]


def words(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Any]:
    return ["good" for _ in responses]


def nothing(prompts: Sequence[Prompt], responses: Sequence[str]) -> Any:
    return None


def some(prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float | None]:
    return [None if not text else 1.0 for text in responses]


@pytest.mark.parametrize("name", ["length", "slow_length"])
def test_a_function_sync_or_async_gives_a_number_for_each(name: str) -> None:
    found = FunctionReward(f"{HERE}:{name}").scores([sample("ab"), sample("")])
    assert found == [2.0, 0.0]


def test_a_function_may_say_that_there_is_no_reward() -> None:
    assert FunctionReward(f"{HERE}:some").scores([sample("ab"), sample("")]) == [1.0, None]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("fails", r"failed at .*test_sources\.py:\d+ \(KeyError: 'gold'\)"),
        ("nan", "gave nan for a response to prompt p0"),
        ("short", "gave 1 for 2 responses"),
        ("words", "gave 'good' for a response to prompt p0"),
        ("nothing", "gave NoneType for 2 responses"),
    ],
)
def test_a_function_that_goes_wrong_is_one_line_that_says_where(name: str, says: str) -> None:
    with pytest.raises(StageError, match=says) as raised:
        FunctionReward(f"{HERE}:{name}").scores([sample("ab"), sample("")])
    assert "\n" not in str(raised.value) and "goes on from the last checkpoint" in str(raised.value)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("no.such.module:f", "cannot be imported"),
        (f"{HERE}:no_such", "has no no_such"),
        (f"{HERE}:HERE", "is no function"),
    ],
)
def test_a_function_that_is_not_there_is_one_line(path: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        FunctionReward(path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def f(:", r"cannot be imported \(SyntaxError: .*; mend it"),
        ("import os\nos.environ['NO_SUCH_KEY']", r"\(KeyError: 'NO_SUCH_KEY'\); mend it"),
        ("import os\nos.no_such", r"\(AttributeError: .*; mend it"),
    ],
)
def test_a_module_that_fails_when_it_is_imported_is_one_line(
    text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_rewards.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=says) as raised:
        FunctionReward("broken_rewards:f")
    assert "\n" not in str(raised.value)


def test_what_a_setting_names_is_told_by_its_form(tmp_path: Path) -> None:
    found = [kind_of(name) for name in ("role", "judge", "a.b:c", str(tmp_path), "owner/name")]
    assert found == ["role", "judge", "function", "model", "model"]
    with pytest.raises(ConfigError, match=r"algorithm\.reward=rolle"):
        kind_of("rolle")


def scripted(**changes: Any) -> Scripted:
    node = {
        "name": "scripted", "module": None, "prefer": "longest", "text": None, "p": 1.0,
        "statuses": None, "noise": 0.0, "cost_usd": 0.0,
    }  # fmt: skip
    return Scripted(**{**node, **changes})


def test_a_judges_reward_is_the_share_of_the_other_answers_that_it_beats() -> None:
    group = [sample("a"), sample("aaa"), sample("aa"), sample("bb", prompt="p1")]
    other = sample("bbb", prompt="p1")
    found = JudgeReward(scripted()).scores([*group, other])
    assert found == [0.0, 1.0, 0.5, 0.0, 1.0]


def test_equal_answers_are_a_tie_that_no_judge_is_asked_about() -> None:
    found = JudgeReward(scripted(statuses={"failed": 1.0})).scores([sample("a"), sample("a")])
    assert found == [0.5, 0.5]


def test_what_a_judge_failed_at_gets_no_reward() -> None:
    found = JudgeReward(scripted(statuses={"failed": 1.0})).scores([sample("a"), sample("b")])
    assert found == [None, None]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("quantization", "dtype", "close"),
    [
        ("none", "float32", 1e-4),
        ("nf4", "float32", 1e-4),
        ("int8", "float32", 1e-4),
        # Rounded to eight bits, and the frozen adapter with it.
        ("none", "bfloat16", 0.06),
        ("nf4", "bfloat16", 0.06),
    ],
)
def test_a_role_scores_as_the_classifier_that_it_was_trained_as(
    tmp_path: Path, lora: Lora, architecture: str, quantization: str, dtype: str, close: float
) -> None:
    folder = save_tiny(tmp_path / "base", architecture)
    settings = replace(model_settings(folder, quantization=quantization), dtype=dtype)
    trained(settings, lora).save_pretrained(tmp_path / "saved")
    roles = Roles(load_model(settings))
    roles.load("reward", tmp_path / "saved")
    samples = [sample("", ids=(9, 8, 1)), sample("", ids=(1,)), sample("", ids=(20, 21, 22, 23))]
    found = RoleReward(roles).scores(samples)
    rows = [[*s.prompt_ids, *s.completion_ids] for s in samples]
    ids = torch.tensor([row + [0] * (7 - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    classifier = load_reward_model(settings, tmp_path / "saved")
    with torch.no_grad():
        expected = scores(classifier, input_ids=ids, lengths=lengths)
        before = scores(classifier, input_ids=ids, lengths=lengths - 1)
    assert found == pytest.approx(expected.tolist(), abs=close)
    assert float((before - expected).abs().min()) > 2 * close  # another position would be noticed
    assert roles.parameters("reward") == []


def test_an_implicit_reward_asks_the_base_only_what_nobody_knows_yet(
    tiny: Model, lora: Lora
) -> None:
    roles = Roles(load_model(tiny))
    roles.add("reward", settings=lora, seed=0)
    for parameter in roles.parameters("reward"):
        parameter.data += 0.1
    source = RoleReward(roles, beta=0.5)
    samples = [sample("", ids=(9, 8, 1)), sample("", ids=(1,))]
    expected = source.scores(samples)
    batch = collate([Row(prompt=s.prompt_ids, completion=s.completion_ids) for s in samples])
    with torch.no_grad(), roles.role("reward_base") as model:
        base = sequence_logprobs(
            model, input_ids=batch.input_ids, response_mask=batch.response_mask
        ).tolist()
    del roles.bound["reward_base"]
    known = [replace(s, base_logprob=value) for s, value in zip(samples, base, strict=True)]
    assert source.scores(known) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(KeyError, match="reward_base"):
        source.scores([known[0], samples[1]])


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ({"hidden_size": 128}, r"its head takes 128 values, the base gives 64"),
        ({"num_hidden_layers": 1}, r"4 weights are on one side only, \S*\.layers\.1\."),
        ({"num_hidden_layers": 3}, r"4 weights are on one side only, \S*\.layers\.2\."),
    ],
    ids=["wider", "shallower", "deeper"],
)
def test_a_reward_model_of_another_shape_is_one_line(
    tiny: Model, lora: Lora, tmp_path: Path, shape: dict[str, int], says: str
) -> None:
    """PEFT takes one of another depth, and leaves layers without weights or weights without layers.

    Layers go by their last name, as PEFT keeps them where there are twenty or more.
    """
    lora = replace(lora, target_modules=["q_proj", "down_proj"])
    other = model_settings(save_tiny(tmp_path / "other", **shape))
    trained(other, lora).save_pretrained(tmp_path / "saved")
    with pytest.raises(StageError, match=rf"does not fit the base model \({says}") as raised:
        Roles(load_model(tiny)).load("reward", tmp_path / "saved")
    assert "\n" not in str(raised.value) and str(tmp_path / "saved") in str(raised.value)


def test_a_reward_model_with_another_tokenizer_reads_the_text(
    tiny: Model, lora: Lora, tmp_path: Path
) -> None:
    """A model of another vocabulary: ids of the policy would mean something else to it."""
    from transformers import AutoTokenizer

    other = save_tiny(tmp_path / "other", vocab_size=1100)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens([" days", "How many"])  # the same text, other ids
    tokenizer.save_pretrained(other)
    settings = model_settings(other)
    classifier = trained(settings, lora)
    folder = tmp_path / "saved"
    classifier.save_pretrained(folder)
    base = {"base": asdict(settings), "max_length": 256}
    write_json(folder / "reward.json", {"mean": 0.0, "std": 1.0, "n": 2, "reference": "", **base})
    source = ModelReward(str(folder))
    found = source.scores([sample("Three days."), sample("No.")])
    assert found[0] != found[1] and all(isinstance(value, float) for value in found)
    # What the policy's ids are does not matter to it.
    assert source.scores([sample("Three days.", ids=(3, 1)), sample("No.", ids=(4, 1))]) == found
    with pytest.raises(StageError, match=r"algorithm\.reward="):
        ModelReward(str(tmp_path))


def test_the_starters_rubric_is_a_reward_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """What recipes/starter-ppo types."""
    recipe = Path(__file__).parents[2] / "recipes" / "starter-ppo"
    monkeypatch.syspath_prepend(str(recipe))
    meta = {"asked": "notice", "gold": "38"}
    asked = Prompt(id="p", messages=(Message(role="user", content="How long?"),), meta=meta)
    source = FunctionReward("rubric_reward:reward")
    right, wrong = (
        replace(sample(text), prompt=asked)
        for text in ("The notice is 38 days.", "The notice is 12 days.")
    )
    found = source.scores([right, wrong])
    assert found[0] is not None and found[1] is not None and found[0] > found[1] + 5
