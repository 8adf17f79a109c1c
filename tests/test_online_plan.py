"""A run that learns from rewards: which steps it has, and what cannot work is one line."""

from pathlib import Path

import pytest

from align.artifacts import HashCache
from align.config import Config, read_config, register_resolvers
from align.errors import ConfigError
from align.pipeline import tell_left_out
from align.plan import Step, plan
from align.shapes import shape
from tests.test_config import composed

register_resolvers()


def config(*words: str) -> Config:
    return read_config(composed(*words))


def steps(*words: str) -> dict[str, Step]:
    return {step.name: step for step in plan(config(*words), yaml="", command="")}


def test_the_recipe_goes_from_prompts_to_a_report() -> None:
    found = steps("recipe=ppo")
    assert list(found) == [
        "prompts", "candidates", "preferences", "reference", "reward", "train", "test_prompts",
        "before", "after", "evaluate", "report",
    ]  # fmt: skip
    assert found["train"].stage == "online" and found["train"].distributed
    assert found["train"].inputs == {"prompts": "prompts", "reward": "reward"}
    assert "reward" in found["report"].inputs


@pytest.mark.parametrize("algorithm", ["ppo", "rloo", "grpo"])
def test_without_a_reward_model_it_says_how_to_get_one(algorithm: str) -> None:
    with pytest.raises(ConfigError, match="learns from a reward model") as raised:
        steps("recipe=dpo", f"algorithm={algorithm}")
    assert f"type recipe=ppo algorithm={algorithm}" in str(raised.value)


def test_with_rewards_from_elsewhere_nothing_is_made_for_a_reward_model(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("recipe=ppo", "algorithm.reward=my.module:score")
    found = steps(*words)
    assert list(found)[:3] == ["prompts", "train", "test_prompts"]
    tell_left_out(config(*words))
    assert "not needed with algorithm.reward=my.module:score: generate, label, reward" in (
        capsys.readouterr().out
    )


def test_a_judge_gives_rewards_and_shapes_the_training_only_then() -> None:
    assert steps("recipe=ppo", "algorithm.reward=judge")["train"].settings.judge is not None
    assert steps("recipe=ppo")["train"].settings.judge is None
    with pytest.raises(ConfigError, match="judge=none gives no rewards"):
        steps("recipe=ppo", "algorithm.reward=judge", "judge=none")


def test_the_prompts_of_preferences_will_do(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    found = steps(
        "recipe=ppo", "stages=[reward,train,evaluate]", "data=preferences", f"data.path={file}"
    )
    assert found["train"].inputs == {"preferences": "preferences", "reward": "reward"}
    assert found["test_prompts"].stage == "hold_out"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("adapter=full",), "adapter=full: weights in nf4 cannot be trained"),
        (("recipe=dpo", "adapter=full", "model.quantization=none"), "trains an adapter"),
        (("algorithm.samples=1", "algorithm.value=none"), "compares the answers to one prompt"),
        (("algorithm.reward=judge", "algorithm.samples=1"), "compares the answers to one prompt"),
        (("algorithm.reward=nowhere",), "neither a source of rewards nor an existing folder"),
        (("algorithm.truncated=bootstrap", "algorithm.value=none"), "no value function"),
        (("algorithm.kl_band=[5,1]",), "must be two numbers, the lower one first"),
        (("algorithm.minibatches=1000",), "algorithm.minibatches"),
        (("algorithm.dual_clip=0.5",), "algorithm.dual_clip"),
        (("adapter=dora", "adapter.name=adora"), "adapter.name"),
        (("algorithm.iteration=3",), "did you mean algorithm.iterations"),
    ],
)
def test_what_cannot_work_is_one_line(words: tuple[str, ...], says: str) -> None:
    recipe = () if words[0].startswith("recipe=") else ("recipe=ppo",)
    words = tuple(f"+{w}" if "iteration=" in w else w for w in words)
    with pytest.raises(ConfigError) as raised:
        steps(*recipe, *words)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_dora_and_full_fine_tuning_are_groups() -> None:
    assert steps("recipe=ppo", "adapter=dora")["train"].settings.adapter.name == "dora"
    whole = steps("recipe=ppo", "adapter=full", "model.quantization=none")
    assert whole["train"].settings.adapter.name == "full"
    assert whole["reward"].settings.adapter.name == "lora"


def test_another_source_of_the_function_is_another_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "my_reward_of_this_test.py"
    settings = steps("recipe=ppo", "algorithm.reward=my_reward_of_this_test:score")

    def shaped() -> object:
        hashes = HashCache(tmp_path / "hashes.json")
        return shape(settings["train"].settings, hashes)

    module.write_text("def score(prompts, responses): return [1.0] * len(prompts)\n")
    first = shaped()
    module.write_text("def score(prompts, responses): return [2.0 + 0 * len(p) for p in prompts]\n")
    assert shaped() != first


def test_how_often_a_checkpoint_is_written_shapes_nothing(tmp_path: Path) -> None:
    hashes = HashCache(tmp_path / "hashes.json")
    one, other = (
        shape(steps("recipe=ppo", f"algorithm.checkpoint_every={n}")["train"].settings, hashes)
        for n in (1, 7)
    )
    assert one == other
