"""Configuration: every file composes, every mistake is one line that names the key, before torch is
imported.
"""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from align.config import CONF, plain, read_config, register_resolvers
from align.errors import ConfigError
from align.plan import plan

register_resolvers()
GROUPS = sorted(path.parent.name for path in CONF.glob("*/*.yaml"))
FILES = sorted(f"{path.parent.name}={path.stem}" for path in CONF.glob("*/*.yaml"))
NEEDS_MORE = {
    "model=hf": ["model.name=owner/name"],
    "data=prompts": [f"data.path={__file__}"],
    "data=preferences": [f"data.path={__file__}"],
    "data=qa_feedback": [f"data.path={__file__}"],
    "judge=openai": ["judge.model=gpt-4.1-mini"],
    "judge=local": ["judge.model.name=owner/name"],
    "judge=reward_model": [f"judge.path={Path(__file__).parent}"],
    "tuned=starter_reward": ["algorithm=reward"],
    **{f"tuned=starter_{name}": [f"algorithm={name}"] for name in ("ppo", "rloo", "grpo")},
    "judge=jury": ["+judge@judge.members.a=rubric", "+judge@judge.members.b=scripted"],
}


def composed(*overrides: str, conf: Path = CONF):
    with initialize_config_dir(str(conf), version_base="1.3"):
        return plain(compose("config", list(overrides)))


def run(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """The real command; a module that imports torch would be seen in the time it takes."""
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "align.run", *words],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def said(answer: subprocess.CompletedProcess) -> list[str]:
    assert "import time:" in answer.stderr
    assert not [line for line in answer.stderr.splitlines() if line.endswith("| torch")]
    return [line for line in answer.stderr.splitlines() if not line.startswith("import time:")]


@pytest.mark.parametrize("file", FILES)
def test_every_file_composes_and_is_checked(file):
    recipe = [] if file.startswith("recipe=") else ["recipe=dpo"]
    config = read_config(composed(*recipe, file, *NEEDS_MORE.get(file, [])))
    assert config.recipe_name == (file.removeprefix("recipe=") if not recipe else "dpo")


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_key_has_a_comment_in_its_file(path):
    """A key is explained on its own line, or by the lines above its block."""
    lines = path.read_text().splitlines()
    assert lines[0].startswith("#") or lines[1].startswith("#")
    if path.parent.name in ("algorithm", "adapter", "launch", "sampler", "model", "tuned"):
        bare = [
            line
            for line in lines
            if ":" in line and not line.lstrip().startswith(("#", "-")) and "#" not in line
        ]
        assert not [
            line
            for line in bare
            if line.split(":")[0] not in ("name", "module", "weight_decay", "defaults")
        ]


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("algorithm.betta=1", "algorithm.betta: no such setting; did you mean algorithm.beta?"),
        ("++algorithm.betta=1", "algorithm.betta: no such setting; did you mean algorithm.beta?"),
        ("+algoritm.beta=1", "algoritm: no such setting; did you mean algorithm?"),
        ("algorithm.beta=-0.1", "algorithm.beta=-0.1: must be above 0"),
        ("algorithm.beta=nan", "algorithm.beta=nan: must be above 0"),
        ("algorithm.beta=much", "algorithm.beta=much: must be a valid number"),
        ("algorithm.epochs=[1]", "algorithm.epochs=[1]: must be a valid number"),
        ("algorithm.loss=sigmoyd", "algorithm.loss=sigmoyd: must be one of sigmoid, ipo, hinge"),
        ("algorithm=dop", "algorithm=dop: no such algorithm; did you mean dpo?"),
        ("recipe=dop", "recipe=dop: no such recipe; did you mean dpo?"),
        (
            "judge=null",
            "judge=null: judge is a group and wants a name; type judge=NAME (jury, ",
        ),
        (
            "judge@evaluate.judge=openai evaluate.judge.model=o3 evaluate.judge.samples=0",
            "evaluate.judge.samples=0: must be",
        ),
        (
            "judge=openai judge.model=o3 +judge@judge.escalate=openai "
            "judge.on_disagreement=escalate judge.escalate.model=o3 judge.escalate.batch=true",
            "type judge.escalate.batch=false",
        ),
        (
            "judge=jury +judge@judge.members.a=local +judge@judge.members.b=openai "
            "judge.members.a.model.name=x judge.members.b.model=o3 judge.members.b.prompt=nope",
            "judge.members.b.prompt=nope: neither one of",
        ),
        ("evaluate.judge=openai", "type judge@evaluate.judge=NAME with a file of conf/judge/"),
        ("model=hf", "model.name has no value; type model.name=VALUE"),
        ("data=preferences", "data=preferences: no file to read; type data.path=FILE"),
        ("data.path=nowhere.jsonl", "data.path=nowhere.jsonl: no such file"),
        ("stages=[train]", "add generate and label to stages, or type data=preferences"),
        ("stages=[label,train]", "label needs candidates; add generate before it"),
        ("stages=[generate,evaluate]", "add train before it"),
        ("stages=[trian]", "stages=trian: must be one of generate, label, reward, train, evaluate"),
        (
            "stages=[generate,label,reward]",
            "no algorithm for it is chosen; type algorithm@reward=reward",
        ),
        ("recipe=reward reward.learning_rate=-1", "reward.learning_rate=-1.0: must be above 0"),
        ("recipe=reward reward.centre=-1", "reward.centre=-1.0: must be at least 0"),
        ("recipe=reward reward.betta=1", "reward.betta: no such setting"),
        ("recipe=reward reward_adapter.rank=0", "reward_adapter.rank=0: must be at least 1"),
        ("recipe=reward reward=mine", "type algorithm@reward=NAME with a file of conf/algorithm/"),
        ("recipe=reward algorithm@reward=dpo", "type algorithm@reward=reward"),
        ("recipe=reward stages=[reward]", "algorithm@reward=reward needs preferences, and data="),
        ("recipe=reward algorithm.beta=1", "none has no settings; did you mean reward.beta?"),
        ("recipe=reward algorithm.nothing=1", "none has no settings; type algorithm=NAME"),
        (
            "recipe=reward algorithm=dpo algorithm.beta=1",
            "its settings are reward.KEY; type algorithm=none",
        ),
        (
            "recipe=reward algorithm=reward",
            "algorithm=reward: none of stages=[generate,label,reward] trains",
        ),
        (
            "recipe=reward algorithm@reward=ppo",
            "algorithm@reward=ppo: trains a policy, no reward model",
        ),
        ("recipe=reward adapter@reward_adapter=full", "type adapter@reward_adapter=lora"),
        (
            "recipe=reward reward_adapter=full",
            "type adapter@reward_adapter=NAME with a file of conf/adapter/",
        ),
        ("reward.epochs=1", "type algorithm@reward=NAME"),
        ("algorithm=reward", "algorithm=reward: trains a reward model"),
        ("algorithm=none", "algorithm=none: train needs one; type algorithm=dpo"),
        ("judge=reward_model", "judge.path has no value; type judge.path=VALUE"),
        ("judge=reward_model judge.path=no", "judge.path=no: no such folder"),
        (
            "judge=reward_model judge.path=. +model@judge.model=hf judge.model.name=x "
            "judge.model.quantization=int3",
            "judge.model.quantization=int3: must be one of",
        ),
        ("stages=[]", "nothing to do"),
        ("judge=none", "label needs a judge"),
        ("name=a/b", "name=a/b: must be a folder name of its own"),
        ("seed=-1", "seed=-1: must be at least 0"),
        ("launch.processes=0", "launch.processes=0: must be at least 1"),
        ("algorithm.micro_batch_size=0", "algorithm.micro_batch_size=0: must be at least 1"),
        ("algorithm.module=no.such.module", "algorithm.module=no.such.module: cannot be imported"),
        ("algorithm.warmup=1", "algorithm.warmup=1.0: must be at least 0 and at most 0.99"),
        ("~model", "a group that others build on was taken out"),
        ("foo", "foo"),
    ],
)
def test_a_mistake_is_one_line_without_torch(override, says, tmp_path):
    recipe = [] if override.startswith("recipe=") else ["recipe=dpo"]
    answer = run(*recipe, *override.split(), f"workspace={tmp_path}")
    lines = said(answer)
    assert answer.returncode == 1
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ") and says in lines[0]
    assert not list(tmp_path.iterdir()), "nothing was started"


def test_no_recipe_is_one_line_and_help_is_readable():
    answer = run()
    assert answer.returncode == 1 and said(answer) == [
        "error: no recipe given; type recipe=NAME (dpo, ppo, reward)"
    ]
    started = time.monotonic()
    answer = run("--help")
    assert time.monotonic() - started < 3, "a second, and room for a busy machine"
    assert answer.returncode == 0 and not said(answer)
    assert "recipe=dpo" in answer.stdout and "algorithm: dpo" in answer.stdout
    assert max(len(line) for line in answer.stdout.splitlines()) <= 120


def test_a_model_that_does_not_exist_is_one_line(tmp_path):
    answer = run(
        "recipe=dpo", "model=hf", "model.name=no/such", f"workspace={tmp_path}", HF_HUB_OFFLINE="1"
    )
    assert answer.returncode == 1
    assert len(said(answer)) == 1 and "model.name=no/such" in said(answer)[0]


def test_a_workspace_that_cannot_be_written_is_one_line():
    answer = run("recipe=dpo", "workspace=/proc/nowhere")
    assert answer.returncode == 1
    assert (
        len(said(answer)) == 1 and "workspace=/proc/nowhere: cannot write there" in said(answer)[0]
    )


def test_started_by_torchrun_it_says_what_to_type_instead():
    answer = run("recipe=dpo", RANK="0", LOCAL_RANK="0", WORLD_SIZE="2")
    assert answer.returncode == 1
    assert "launch=accelerate" in said(answer)[0] and len(said(answer)) == 1


def test_cfg_job_prints_a_configuration_that_can_be_read_back():
    answer = run("recipe=dpo", "--cfg", "job", "--resolve")
    assert read_config(yaml.safe_load(answer.stdout)).algorithm.beta == 0.5


def test_a_recipe_chooses_and_tunes_nothing():
    for path in (CONF / "recipe").glob("*.yaml"):
        tree = yaml.safe_load(path.read_text())
        assert set(tree) <= {"defaults", "recipe_name", "stages", "rounds"}


def test_defaults_live_once_in_yaml():
    config = read_config(composed("recipe=dpo"))
    for node in (
        config,
        config.algorithm,
        config.model,
        config.adapter,
        config.sampler,
        config.launch,
    ):
        assert all(
            f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            for f in dataclasses.fields(node)
        )


def test_own_preferences_switch_the_embedded_judge_off_and_the_command_line_still_wins():
    tree = composed(
        "recipe=dpo", "data=preferences", f"data.path={__file__}", "stages=[train,evaluate]"
    )
    config = read_config(tree)
    assert config.judge is None and config.evaluate.judge is None
    tree = composed(
        "recipe=dpo", "data=preferences", f"data.path={__file__}", "judge@evaluate.judge=rubric"
    )
    assert read_config(tree).evaluate.judge.name == "rubric"


def test_what_was_tuned_on_the_starter_stays_with_its_model_and_algorithm():
    """A model of a billion parameters would not survive the starter's learning rate."""
    own = ("model=hf", "model.name=owner/name")
    starter, other = (composed("recipe=dpo", *words)["algorithm"] for words in ((), own))
    assert starter["learning_rate"] > 1e-4 > 1e-5 > other["learning_rate"]
    assert other["beta"] == 0.1
    assert composed("recipe=dpo", "algorithm.beta=0.2")["algorithm"]["beta"] == 0.2
    assert composed("recipe=dpo")["label"]["pairs"] == "best_vs_worst"
    data = ("data=prompts", f"data.path={__file__}")
    assert composed("recipe=dpo", *data)["label"]["pairs"] == "random", "judges cost money"


def test_a_recipe_of_ones_own_has_the_last_word_but_for_the_command_line(tmp_path):
    recipes = tmp_path / "conf" / "recipe"
    recipes.mkdir(parents=True)
    (recipes / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [override /algorithm: dpo]\nrecipe_name: mine\n"
        "stages: [generate, label, train]\nalgorithm: {learning_rate: 1.0e-4, beta: 0.3}\n"
    )
    words = ["--config-dir", str(tmp_path / "conf"), "recipe=mine", "algorithm.beta=0.2"]
    answer = run(*words, "--cfg", "job")
    algorithm = yaml.safe_load(answer.stdout)["algorithm"]
    assert algorithm["learning_rate"] == 1e-4 and algorithm["beta"] == 0.2
    assert algorithm["epochs"] == 3, "the rest as tuned"


def test_the_reward_model_has_tuned_values_of_its_own_and_shapes_no_step_of_dpo():
    tree = composed("recipe=reward")
    own = composed("recipe=reward", "model=hf", "model.name=owner/name")
    assert tree["reward"]["learning_rate"] > 1e-4 > 1e-5 < own["reward"]["learning_rate"] < 1e-4
    assert tree["reward"]["score"] == "implicit" and own["reward"]["score"] == "head"
    config = read_config(tree)
    assert config.algorithm is None and config.reward is not None
    assert [step.name for step in plan(config, yaml="", command="")] == [
        "prompts", "candidates", "preferences", "reference", "reward",
    ]  # fmt: skip
    stopped = read_config(composed("recipe=ppo", "stages=[generate,label,reward]"))
    assert [step.name for step in plan(stopped, yaml="", command="")][-1] == "reward"
    other = ["algorithm.reward=judge", "stages=[generate,label,reward]"]
    with pytest.raises(ConfigError, match="none of stages"):
        plan(read_config(composed("recipe=ppo", *other)), yaml="", command="")
    alone = read_config(composed("recipe=dpo"))
    assert alone.reward is None
    both = read_config(
        composed("recipe=dpo", "algorithm@reward=reward", "stages=[generate,label,reward,train]")
    )
    steps = {step.name: step for step in plan(both, yaml="", command="")}
    assert list(steps) == ["prompts", "candidates", "preferences", "reference", "reward", "train"]
    for step in plan(alone, yaml="", command=""):
        if step.name in steps:
            assert step == steps[step.name], "reward models and policies share what they can"


def test_the_report_knows_the_judge_that_gives_the_rewards():
    def named(*words):
        steps = plan(read_config(composed("recipe=ppo", *words)), yaml="", command="")
        return steps[-1].settings.label_judge

    assert named("algorithm.reward=judge") == named() == "rubric"
    assert named("algorithm.reward=my.module:function") == "", "no judge taught anything"


def test_a_reward_models_adapter_may_be_of_another_kind_where_none_is_trained():
    words = ("recipe=ppo", "algorithm.reward=align.judge.rubric:score")
    config = read_config(composed(*words, "adapter@reward_adapter=full"))
    assert "reward" not in [step.name for step in plan(config, yaml="", command="")]
    dora = read_config(composed("recipe=reward", "adapter@reward_adapter=dora"))
    assert plan(dora, yaml="", command="")[-1].settings.adapter.name == "dora"


def test_only_an_implicit_score_has_the_pairs_scored_by_the_base():
    for score, wanted in (("implicit", True), ("head", False)):
        config = read_config(composed("recipe=reward", f"reward.score={score}"))
        steps = {step.name: step for step in plan(config, yaml="", command="")}
        assert steps["reference"].settings.score is wanted


def test_another_model_in_the_starters_place_is_warned_of(tmp_path):
    answer = run("recipe=dpo", "model.name=no/such", f"workspace={tmp_path}", HF_HUB_OFFLINE="1")
    warning, error = said(answer)
    assert "type model=hf model.name=no/such" in warning and error.startswith("error: ")


MODULE = """
from dataclasses import dataclass
from align.algorithms.needs import Needs
from align.algorithms.settings import PreferenceTraining
from align.records import Preference

NEEDS = Needs(records=Preference, reference=False)

@dataclass(frozen=True, kw_only=True)
class Settings(PreferenceTraining):
    gamma: float
"""


def test_a_second_algorithm_brings_its_own_defaults_and_leaves_the_others_behind(
    tmp_path, monkeypatch
):
    own = tmp_path / "conf" / "algorithm"
    own.mkdir(parents=True)
    body = yaml.safe_load((CONF / "algorithm" / "dpo.yaml").read_text())
    for key in ("beta", "loss", "label_smoothing", "soft_labels", "offset"):
        del body[key]
    body |= {"name": "mine", "module": "my_algorithm", "gamma": 0.7, "learning_rate": 1e-5}
    (own / "mine.yaml").write_text(yaml.safe_dump(body))
    (tmp_path / "my_algorithm.py").write_text(MODULE)
    answer = subprocess.run(
        [sys.executable, "-m", "align.run", "--config-dir", str(tmp_path / "conf"), "recipe=dpo",
         "algorithm=mine", "--cfg", "job", "--resolve"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    tree = yaml.safe_load(answer.stdout)
    assert tree["algorithm"]["gamma"] == 0.7 and "beta" not in tree["algorithm"]
    assert tree["algorithm"]["learning_rate"] == 1e-5, "not what another one was tuned to"
    monkeypatch.syspath_prepend(tmp_path)
    config = read_config(tree)
    assert config.algorithm.gamma == 0.7 and config.algorithm.learning_rate == 1e-5
    steps = plan(config, yaml="", command="")
    assert next(step for step in steps if step.name == "reference").settings.score is False
    with pytest.raises(ConfigError, match=r"algorithm\.gama"):
        read_config({**tree, "algorithm": {**tree["algorithm"], "gama": 1}})
