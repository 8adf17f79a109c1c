"""The report and the card of a policy that learnt from rewards for its own answers."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from align.stages.evidence import gather
from align.stages.online_page import finding, phases, said
from tests.stages.fabricate import PPO_CONFIG, fabricate, fabricate_ppo, write, write_lines
from tests.stages.test_report import HOSTILE, Page, front, made


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return fabricate_ppo(tmp_path_factory.mktemp("inputs"))


def report(inputs: dict[str, Path], out: Path, **changed: Any) -> str:
    return made(inputs, out, **{"name": "ppo", "config": PPO_CONFIG, **changed})


def card_of(out: Path) -> str:
    return (out / "adapter" / "README.md").read_text(encoding="utf-8")


def titles(html: str) -> list[str]:
    labels = [str(figure["aria-label"]) for figure in Page(html).all("svg")]
    return [label.split(" by iteration")[0] for label in labels if " by iteration" in label]


# Curves


def test_the_curves_are_those_of_a_policy_that_learnt_online(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    html = report(inputs, tmp_path)
    assert titles(html) == [
        "Held-out prompts", "Reward", "KL", "Entropy", "Clipped", "Explained variance", "Length",
        "Ended by themselves",
    ]  # fmt: skip
    text = Page(html).text
    assert "asked to stay between 0 and 40" in text and "k1" in text and "k3" in text
    assert "60 iterations: 15,360 answers to 1,511 prompts" in text
    assert "Log-probabilities may fall" not in text and "chosen" not in titles(html)


def test_what_stands_still_is_left_out_and_what_moves_is_not(tmp_path: Path) -> None:
    inputs = fabricate_ppo(tmp_path / "in", count=10, prompts=8)
    path = inputs["train"] / "curves.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row |= {"explained_variance": 0.0, "beta": 0.05 * row["step"]}
    write_lines(path, rows)
    drawn = titles(report(inputs, tmp_path / "out"))
    assert "Explained variance" not in drawn and "Beta" in drawn


def test_the_page_is_whole_and_the_same_each_time(inputs: dict[str, Path], tmp_path: Path) -> None:
    html = report(inputs, tmp_path / "a")
    assert html == report(inputs, tmp_path / "b")
    ids = [attributes["id"] for _, attributes in Page(html).elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and "http://" not in html and "https://" not in html


# The reward against the judge


def test_over_optimisation_is_told_with_what_to_try(tmp_path: Path) -> None:
    inputs = fabricate_ppo(tmp_path / "in", overoptimised=True, prompts=8)
    text = Page(report(inputs, tmp_path / "out")).text
    assert "the judge's win rate fell since iteration 30, from 73.3% to 33.5%" in text
    assert "algorithm.iterations=30" in text
    assert "over-optimised" in card_of(tmp_path / "out")


def test_where_both_rose_nothing_is_warned_of(inputs: dict[str, Path], tmp_path: Path) -> None:
    text = Page(report(inputs, tmp_path)).text
    assert "Both rose: the reward from 0.0829 to 1.62, the judge" in text
    assert "over-optimised" not in card_of(tmp_path)


def line(reward: float, rate: float, n: float = 100) -> dict[str, float]:
    return {"step": 1, "eval_reward": reward, "eval_win_rate": rate, "eval_judged": n}


def test_the_finding_says_no_more_than_was_measured() -> None:
    few = [line(0.1, 0.5), line(0.4, 0.55)]
    assert finding(few, few, best=None)[0] == (
        "The reward rose from 0.1 to 0.4; the judge's win rate rose from 50.0% to 55.0%, which "
        "chance alone can do."
    )
    alone, remedy = finding(few, [], best=None)
    assert "No judge watched" in alone and "judge@evaluate.judge=NAME" in remedy
    judged = [line(0, 0.5), line(0, 0.8)]
    assert finding([], judged, best=None)[0] == "The judge's win rate rose from 50.0% to 80.0%."


def test_without_held_out_prompts_no_such_section_is_there(tmp_path: Path) -> None:
    inputs = fabricate_ppo(tmp_path / "in", count=3, prompts=8)
    path = inputs["train"] / "curves.jsonl"
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if not k.startswith("eval_")} for row in rows]
    write_lines(path, kept)
    assert "Did the reward stay true?" not in report(inputs, tmp_path / "out")


# Answers, time, trust


def test_answers_are_shown_of_the_first_the_last_and_some_between(
    inputs: dict[str, Path],
) -> None:
    shown = said(gather(inputs, config=PPO_CONFIG, label_judge="rubric"))
    assert [iteration.step for iteration in shown] == [1, 21, 40, 60]
    for iteration in shown:
        assert [answer.reward for _, answer in iteration.answers] == [-2.125, 1.5]


def test_what_a_policy_says_is_shown_and_never_obeyed(tmp_path: Path) -> None:
    inputs = fabricate_ppo(tmp_path / "in", count=2, prompts=8)
    sample = {
        "step": 1, "id": HOSTILE, "messages": [{"role": HOSTILE, "content": HOSTILE}] * 2,
        "text": HOSTILE, "finish": HOSTILE, "reward": None, "kl": float("nan"), "tokens": 3,
    }  # fmt: skip
    write_lines(inputs["train"] / "samples.jsonl", [sample])
    write_lines(inputs["train"] / "warnings.jsonl", [{"step": HOSTILE, "text": HOSTILE}])
    write(inputs["train"] / "counts.json", {"reward": HOSTILE})
    config = yaml.safe_dump({"algorithm": {"name": "ppo", "reward": "judge"}})
    html = report(inputs, tmp_path / "out", config=config)
    assert "<script" not in html and '<script>alert("1")</script>' in Page(html).text
    assert "\u202e" not in html and "\x1b" not in html and "\x1b" not in card_of(tmp_path / "out")
    assert "<script" not in card_of(tmp_path / "out")


def test_time_is_told_by_phase_and_learning_is_the_rest_where_only_the_whole_is_known(
    tmp_path: Path,
) -> None:
    inputs = fabricate_ppo(tmp_path / "in", count=2, prompts=8)
    evidence = gather(inputs, config=PPO_CONFIG, label_judge="")
    found = {phase.name: phase for phase in phases(evidence)}
    assert found["Learning"].seconds == 20 and found["Learning"].share == pytest.approx(20 / 32)
    assert found["Sampling answers"].speed == pytest.approx(2000)
    assert "Peak memory: 18.9 GB" in Page(report(inputs, tmp_path / "out")).text
    whole = {"step": 1, "generate_s": 4.0, "watch_s": 1.0, "iteration_s": 20.0, "tokens": 300}
    write_lines(inputs["train"] / "timing.jsonl", [whole])
    rest = {
        phase.name: phase.seconds
        for phase in phases(gather(inputs, config=PPO_CONFIG, label_judge=""))
    }
    assert rest == {"Sampling answers": 4.0, "Learning": 15.0, "Watching held-out prompts": 1.0}


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    inputs = fabricate_ppo(tmp_path / "in", count=2, prompts=8)
    for name in ("samples", "timing", "warnings", "curves"):
        (inputs["train"] / f"{name}.jsonl").unlink()
    (inputs["train"] / "counts.json").unlink()
    del inputs["reward"]
    text = Page(report(inputs, tmp_path / "out", config="{}", label_judge="")).text
    for title in ("What it said", "Training by phase", "The run warned", "reward.html", "Did the"):
        assert title not in text


def test_the_reward_model_and_the_warnings_are_told(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    text = Page(report(inputs, tmp_path)).text
    assert "The reward model ranks 74.2% (68.9–79.3) of 256 held-out pairs" in text
    assert "reward.html , beside this one" in text
    assert "Iteration 12: the policy moves far within one iteration." in text
    assert "reward 6 min 28 s" in text  # among the steps, after the pairs


def test_a_judge_that_gave_the_rewards_is_no_independent_one(tmp_path: Path) -> None:
    everything = fabricate_ppo(tmp_path / "in", count=2, prompts=8)
    inputs = {name: everything[name] for name in ("train", "evaluate")}
    write(inputs["evaluate"] / "judge.json", {"judge": "m"})
    text = Page(report(inputs, tmp_path / "out", label_judge="m")).text
    assert "The judge here is the one that gave the rewards." in text
    assert "It gave the rewards too" in card_of(tmp_path / "out")


# The card


def test_the_card_tells_what_was_sampled_and_what_paid_for_it(
    inputs: dict[str, Path], tmp_path: Path
) -> None:
    report(inputs, tmp_path)
    card = card_of(tmp_path)
    assert {"ppo", "qlora"} <= set(front(card)["tags"]) and "with PPO by" in card
    assert "- 15,360 answers that it sampled itself, in 60 iterations, to 1,511 prompts" in card
    assert "- Rewards: the reward model of this run, which ranks 74.2% of held-out pairs" in card
    assert "- KL from the reference: " in card and "preference pairs" not in card


@pytest.mark.parametrize(
    ("reward", "named", "words"),
    [
        ("judge", "gpt", "the judge gpt"),
        ("mine:score", "mine:score", "the function mine:score"),
        ("org/rm", "rm", "the reward model rm"),
    ],
)
def test_each_source_of_rewards_has_its_words(
    tmp_path: Path, reward: str, named: str, words: str
) -> None:
    inputs = fabricate_ppo(tmp_path / "in", count=2, prompts=8)
    write(inputs["train"] / "counts.json", {"reward": named})
    config = yaml.safe_dump({"algorithm": {"name": "grpo", "reward": reward}})
    assert f"rewarded by {words}." in Page(report(inputs, tmp_path / "out", config=config)).text


def test_a_whole_model_is_called_so_and_loaded_so(tmp_path: Path) -> None:
    inputs = fabricate_ppo(tmp_path / "in", count=2, prompts=8)
    adapter = inputs["train"] / "adapter"
    for file in adapter.iterdir():
        file.unlink()
    write(adapter / "config.json", {"model_type": "qwen3"})
    (adapter / "model.safetensors").write_bytes(b"\0" * 64)
    changes = {"model": {"name": "org/base", "quantization": "none"}, "adapter": {"name": "full"}}
    config = yaml.safe_dump({**yaml.safe_load(PPO_CONFIG), **changes})
    assert "the trained model with its model card" in report(
        inputs, tmp_path / "out", config=config
    )
    card = card_of(tmp_path / "out")
    known = front(card)
    assert known["library_name"] == "transformers" and "full-fine-tuning" in known["tags"]
    assert "A model aligned" in card and "peft" not in card and "without the adapter" not in card
    code = card.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert 'from_pretrained(".", dtype' in code and '"org/base", revision="b968826d9c46"' in code


@pytest.mark.parametrize(("quantization", "kind"), [("nf4", "qdora"), ("none", "dora")])
def test_dora_is_called_so(tmp_path: Path, quantization: str, kind: str) -> None:
    inputs = fabricate(tmp_path / "in", prompts=8)
    changes = {"adapter": {"name": "dora"}, "model": {"name": "b", "quantization": quantization}}
    made(inputs, tmp_path / "out", config=yaml.safe_dump(changes))
    assert kind in front(card_of(tmp_path / "out"))["tags"]
