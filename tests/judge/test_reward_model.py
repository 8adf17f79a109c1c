"""A reward model as a judge: each answer scored by itself, ours or anybody's."""

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from align.artifacts import HashCache
from align.errors import ConfigError, StageError
from align.judge.reward_model import WINDOW, compare
from align.judge.settings import RewardModel
from align.models.adapters import add_lora
from align.models.load import load_model
from align.models.scorer import open_scorer
from align.models.settings import Lora, Model
from align.records import Comparison, Message, Prompt, Verdict
from align.shapes import shape
from tests.conftest import STARTER
from tests.models.test_classifier import save_words
from tests.stages.test_reward import trained


def settings(path: Path, **changes: Any) -> RewardModel:
    known: dict[str, Any] = {"identity": None, "model": None, "batch_tokens": 512}
    return RewardModel(name="reward_model", module=None, path=str(path), **{**known, **changes})


def comparisons(count: int) -> list[Comparison]:
    return [
        Comparison(
            prompt=Prompt(id=str(i), messages=(Message(role="user", content=f"Question {i}?"),)),
            first=f"Yes, {i} days a week.",
            second="No." * (i % 3 + 1),
        )
        for i in range(count)
    ]


def judge(asked: list[Comparison], chosen: RewardModel) -> list[Verdict]:
    async def all_of() -> list[Verdict]:
        return [verdict async for verdict in compare(asked, settings=chosen)]

    return asyncio.run(all_of())


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    from tests.conftest import model_settings

    folder = tmp_path_factory.mktemp("ours")
    return trained(model_settings(tiny_folder), folder) / "adapter"


def test_verdicts_are_the_sigmoid_of_the_difference_in_any_order(ours: Path) -> None:
    asked = comparisons(WINDOW + 3)
    found = judge(asked, settings(ours))
    swapped = judge([c.swap() for c in asked], settings(ours))
    assert [v.id for v in found] == [c.prompt.id for c in asked]
    for one, other in zip(found, swapped, strict=True):
        assert one.status == "ok" and one.p_first is not None and other.p_first is not None
        assert one.p_first == pytest.approx(1 - other.p_first, abs=1e-6)
        odds = math.log(one.p_first / (1 - one.p_first))
        assert one.margin == pytest.approx(abs(odds), abs=1e-5)
        assert (one.scores[0]["reward"] > one.scores[1]["reward"]) == (odds > 0)


def test_a_resumed_file_says_the_same_from_a_windows_border(ours: Path) -> None:
    asked = comparisons(WINDOW + 3)
    assert judge(asked, settings(ours))[WINDOW:] == judge(asked[WINDOW:], settings(ours))


def test_the_same_answer_twice_is_a_tie(ours: Path) -> None:
    (same,) = [Comparison(prompt=c.prompt, first=c.first, second=c.first) for c in comparisons(1)]
    (verdict,) = judge([same], settings(ours))
    assert verdict.status == "tie" and verdict.p_first == 0.5


def test_another_base_may_be_named_and_must_fit(ours: Path, tiny: Model) -> None:
    asked = comparisons(2)
    assert judge(asked, settings(ours, model=tiny)) == judge(asked, settings(ours))
    with pytest.raises(ConfigError, match=r"judge\.model\.name=/no/such"):
        from dataclasses import replace

        judge(asked, settings(ours, model=replace(tiny, name="/no/such")))


def standalone(folder: Path, *, labels: int = 1) -> Path:
    """Somebody's classifier with another tokenizer: its template ends a turn with a new line."""
    config = AutoConfig.for_model(
        "llama", vocab_size=1024, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        num_labels=labels, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(STARTER)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_a_classifier_of_others_scores_as_transformers_does(tmp_path: Path) -> None:
    folder = standalone(tmp_path / "theirs")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def theirs(prompt: Prompt, answer: str) -> float:
        turns = [m.to_json() for m in prompt.messages] + [{"role": "assistant", "content": answer}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            return float(model(input_ids=ids).logits[0, 0])

    for comparison, verdict in zip(
        comparisons(5), judge(comparisons(5), settings(folder)), strict=True
    ):
        first, second = (
            theirs(comparison.prompt, text) for text in (comparison.first, comparison.second)
        )
        assert verdict.p_first == pytest.approx(1 / (1 + math.exp(second - first)), abs=1e-5)
        assert verdict.judge == "theirs"


def test_a_cross_encoder_of_others_reads_question_and_answer_as_its_own_pair(
    tmp_path: Path,
) -> None:
    config = AutoConfig.for_model(
        "bert", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=32, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(save_words(tmp_path))
    pairs = [("three days", "no pay"), ("the office", "of the employer 0 1")]
    found = open_scorer(tmp_path, base=None).scores(
        [((Message(role="user", content=question),), answer) for question, answer in pairs]
    )
    with torch.no_grad():
        whole = [model(**tokenizer(*pair, return_tensors="pt")) for pair in pairs]
    assert found == pytest.approx([one.logits.item() for one in whole], abs=1e-5)


def test_a_classifier_of_others_has_its_head_in_float32(tmp_path: Path) -> None:
    folder = standalone(tmp_path / "theirs")
    half = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    half.save_pretrained(folder)
    base = Model(name="", revision=None, quantization="none", dtype="bfloat16", chat_template=None)
    scorer = open_scorer(folder, base=base)
    assert scorer.model.dtype == torch.bfloat16
    assert scorer.model.score.weight.dtype == torch.float32
    asked = comparisons(8)
    found = torch.tensor(scorer.scores([(c.prompt.messages, c.first) for c in asked]))
    assert (found.bfloat16() != found).any(), "more than eight bits"


def test_a_classifier_of_others_without_its_head_is_refused(tmp_path: Path) -> None:
    folder = standalone(tmp_path / "theirs")
    file = folder / "model.safetensors"
    kept = {key: value for key, value in load_file(file).items() if key != "score.weight"}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(StageError, match=r"judge\.path=.*its checkpoint has no score\.weight"):
        judge(comparisons(1), settings(folder))


def test_an_adapter_that_dpo_left_is_refused_whatever_base_is_named(
    tiny: Model, lora: Lora, tmp_path: Path
) -> None:
    add_lora(load_model(tiny), settings=lora, seed=0).save_pretrained(tmp_path)
    for base in (None, tiny):
        with pytest.raises(StageError, match=r"^judge\.path=.*(no reward\.json|no head)"):
            judge(comparisons(1), settings(tmp_path, model=base))


def test_a_classifier_of_classes_is_refused(tmp_path: Path) -> None:
    folder = standalone(tmp_path / "theirs", labels=3)
    with pytest.raises(StageError, match=r"judge\.path=.*3 classes"):
        judge(comparisons(1), settings(folder))


def test_what_the_folder_holds_is_what_its_verdicts_are_kept_by(ours: Path, tmp_path: Path) -> None:
    import shutil

    hashes = HashCache(tmp_path / "hashes.json")
    before = shape(settings(ours), hashes)
    copy = shutil.copytree(ours, tmp_path / "moved")
    assert shape(settings(copy), hashes) == before
    with (copy / "reward.json").open("a") as file:
        file.write("\n")
    assert shape(settings(copy), hashes) != before
    assert shape(settings(ours, batch_tokens=7), hashes) == before


def test_a_missing_folder_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"judge\.path=nowhere: no such folder"):
        settings(Path("nowhere"))
