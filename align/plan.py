"""What a run consists of: from the configuration to an ordered list of steps, checked before
anything starts.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from align.algorithms.needs import Needs
from align.algorithms.settings import PairTraining, PreferenceTraining, Reward
from align.artifacts import HashCache, files_below
from align.config import Config
from align.errors import ConfigError
from align.judge.settings import called
from align.models.settings import Model
from align.named import named_module
from align.records import Preference, Prompt
from align.samplers.settings import Hf
from align.stages.settings import (
    EvaluateStage,
    GenerateStage,
    HoldOutStage,
    LabelStage,
    ReadStage,
    ReferenceStage,
    ReportStage,
    RewardStage,
    TrainStage,
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One stage at work: `name` is what it makes, `stage` the module that makes it, `inputs` what
    it makes it from.

    `links` are the files that the run's folder shows of it, by the name that they have there;
    `distributed` steps may run on several processes.
    """

    name: str
    stage: str
    settings: Any
    inputs: Mapping[str, str] = field(default_factory=dict)
    links: Mapping[str, str] = field(default_factory=dict)
    distributed: bool = False


def plan(config: Config, *, yaml: str, command: str) -> list[Step]:
    """The steps in order.

    Raises:
        ConfigError: a stage would lack what it needs; says which and how to add it.
    """
    steps: list[Step] = []
    if "generate" in config.stages:
        steps += generation(config)
    if "label" in config.stages:
        steps.append(labelling(config))
    if {"reward", "train"} & set(config.stages):
        steps += pairs(config)
    if "reward" in config.stages:
        steps.append(rewarding(config))
    if "train" in config.stages:
        steps.append(training(config))
    if "evaluate" in config.stages:
        steps += evaluation(config, yaml=yaml, command=command)
    return steps


def generation(config: Config) -> list[Step]:
    provides = named_module("align.sources", config.data.name, config.data.module).PROVIDES
    if provides is not Prompt:
        raise ConfigError(
            f"stages={shown(config)}: generate needs prompts, and data={config.data.name} gives "
            f"{provides.__name__.lower()}s; leave generate and label out: stages=[train,evaluate]"
        )
    read = ReadStage(source=config.data, test=False, limit=config.data.limit)
    sample = GenerateStage(model=config.model, sampler=config.sampler, seed=config.seed)
    return [
        Step(name="prompts", stage="read", settings=read),
        Step(
            name="candidates",
            stage="generate",
            settings=sample,
            inputs={"prompts": "prompts"},
            links={"candidates.jsonl": "candidates.jsonl"},
        ),
    ]


def labelling(config: Config) -> Step:
    if "generate" not in config.stages:
        raise ConfigError(f"stages={shown(config)}: label needs candidates; add generate before it")
    if config.judge is None:
        raise ConfigError(
            "judge=none: label needs a judge; type judge=NAME, or judge.module=… for your own"
        )
    return Step(
        name="preferences",
        stage="label",
        settings=LabelStage(label=config.label, judge=config.judge, seed=config.seed),
        inputs={"candidates": "candidates"},
        links={"preferences.jsonl": "preferences.jsonl"},
    )


def learners(config: Config) -> dict[str, tuple[PairTraining, Needs]]:
    """What learns from pairs, by the setting that chooses it.

    Raises:
        ConfigError: a policy's algorithm where a reward model's is wanted, or none at all.
    """
    chosen: dict[str, PairTraining] = {}
    if "reward" in config.stages:
        if config.reward is None:
            raise ConfigError(
                f"stages={shown(config)}: reward trains a reward model, and no algorithm for it is "
                "chosen; type algorithm@reward=reward"
            )
        chosen["algorithm@reward"] = config.reward
    if "train" in config.stages:
        if config.algorithm is None:
            raise ConfigError("algorithm=none: train needs one; type algorithm=dpo")
        chosen["algorithm"] = config.algorithm
    if isinstance(chosen.get("algorithm"), Reward):
        raise ConfigError("algorithm=reward: trains a reward model, no policy; type recipe=reward")
    if isinstance(chosen.get("algorithm@reward"), PreferenceTraining):
        raise ConfigError(
            f"algorithm@reward={chosen['algorithm@reward'].name}: trains a policy, no reward "
            "model; type algorithm@reward=reward"
        )
    return {
        key: (a, named_module("align.algorithms", a.name, a.module).NEEDS)
        for key, a in chosen.items()
    }


def pairs(config: Config) -> list[Step]:
    """The preferences, where no judge makes them, and their tokens; scored by the base if a loss
    needs that.
    """
    steps = []
    learning = learners(config)
    for key, (algorithm, needs) in learning.items():
        records = f"{key}={algorithm.name} needs {needs.records.__name__.lower()}s"
        if "label" in config.stages:
            if needs.records is not Preference:
                raise ConfigError(
                    f"{records}, and label makes preferences; choose an algorithm that trains on "
                    "preferences"
                )
            continue
        provides = named_module("align.sources", config.data.name, config.data.module).PROVIDES
        if provides is not needs.records:
            raise ConfigError(
                f"stages={shown(config)}: {records}, and data={config.data.name} gives "
                f"{provides.__name__.lower()}s; add generate and label to stages, or type "
                "data=preferences"
            )
    if "label" not in config.stages:
        read = ReadStage(source=config.data, test=False, limit=config.data.limit)
        links = {"preferences.jsonl": "preferences.jsonl"}
        steps.append(Step(name="preferences", stage="read", settings=read, links=links))
    reference = ReferenceStage(
        model=config.model,
        max_length=config.data.max_length,
        score=any(needs.reference for _, needs in learning.values()),
    )
    inputs = {"preferences": "preferences"}
    return [*steps, Step(name="reference", stage="reference", settings=reference, inputs=inputs)]


def rewarding(config: Config) -> Step:
    assert config.reward is not None, "see learners"
    settings = RewardStage(
        model=config.model, adapter=config.reward_adapter, algorithm=config.reward, seed=config.seed
    )
    inputs = ("reference", *(["candidates"] if "generate" in config.stages else []))
    return Step(
        name="reward",
        stage="reward",
        settings=settings,
        inputs={name: name for name in inputs},
        links={"reward_model": "adapter", "reward.html": "report.html"},
        distributed=True,
    )


def training(config: Config) -> Step:
    assert config.algorithm is not None, "see learners"
    settings = TrainStage(
        model=config.model, adapter=config.adapter, algorithm=config.algorithm, seed=config.seed
    )
    return Step(
        name="train",
        stage="train",
        settings=settings,
        inputs={"reference": "reference"},
        links={"adapter": "adapter"},
        distributed=True,
    )


def evaluation(config: Config, *, yaml: str, command: str) -> list[Step]:
    if "train" not in config.stages:
        raise ConfigError(
            f"stages={shown(config)}: evaluate measures what train made; add train before it"
        )
    sample = GenerateStage(model=config.model, sampler=measuring_sampler(config), seed=config.seed)
    measure = EvaluateStage(
        model=config.model,
        judge=config.evaluate.judge,
        max_new_tokens=config.evaluate.max_new_tokens,
        resamples=config.evaluate.resamples,
        precision_samples=config.evaluate.precision_samples,
        seed=config.seed,
    )
    # An evaluation judge that is the labeller's own must be told from an independent one, so its
    # name goes along.
    label_judge = (called(config.judge) or "") if "label" in config.stages else ""
    made = ["prompts", "candidates"] if "generate" in config.stages else []
    everything = [
        *made, "preferences", "reference", "train", "test_prompts", "before", "after", "evaluate",
    ]  # fmt: skip
    return [
        test_prompts(config),
        Step(name="before", stage="generate", settings=sample, inputs={"prompts": "test_prompts"}),
        Step(
            name="after",
            stage="generate",
            settings=sample,
            inputs={"prompts": "test_prompts", "train": "train"},
        ),
        Step(
            name="evaluate",
            stage="evaluate",
            settings=measure,
            inputs={"before": "before", "after": "after", "train": "train"},
        ),
        Step(
            name="report",
            stage="report",
            settings=ReportStage(
                name=config.name, label_judge=label_judge, config=yaml, command=command
            ),
            inputs={name: name for name in everything},
            links={"report.html": "report.html", "adapter": "adapter"},
        ),
    ]


def test_prompts(config: Config) -> Step:
    """What the policy is measured on: the source's test file, else prompts of held-out pairs."""
    if config.data.test_path is None:
        assert config.algorithm is not None, "see learners"
        hold_out = HoldOutStage(share=config.algorithm.held_out, limit=config.evaluate.limit)
        inputs = {"preferences": "preferences"}
        return Step(name="test_prompts", stage="hold_out", settings=hold_out, inputs=inputs)
    read = ReadStage(source=config.data, test=True, limit=config.evaluate.limit)
    return Step(name="test_prompts", stage="read", settings=read)


def measuring_sampler(config: Config) -> Hf:
    """One answer a prompt from the whole distribution, before and after alike."""
    return Hf(
        name="hf",
        module=None,
        n=1,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=config.evaluate.max_new_tokens,
        batch_size=config.sampler.batch_size,
    )


def shown(config: Config) -> str:
    return f"[{','.join(config.stages)}]"


def shape(value: Any, hashes: HashCache) -> Any:
    """What of a step's settings shapes its output, as plain values: paths become the hashes of what
    they hold.
    """
    if isinstance(value, Model):
        known = {f.name: shape(getattr(value, f.name), hashes) for f in fields(value)}
        if Path(value.name).is_dir():
            known |= {"name": hashes.content(Path(value.name)), "revision": None}
        if value.chat_template is not None:
            known["chat_template"] = hashes.content(Path(value.chat_template))
        return known
    if is_dataclass(value) and not isinstance(value, type):
        shaping = {}
        for f in fields(value):
            part, mark = getattr(value, f.name), f.metadata.get("fingerprint")
            if mark == "content" and part is not None:
                shaping[f.name] = contents(part, hashes)
            elif mark == "template":
                shipped = Path(getattr(value, f.metadata["shipped"]))
                shaping[f.name] = template(Path(part), shipped, hashes)
            elif f.name == "module" and part is not None:
                shaping[f.name] = source(part, hashes)
            elif mark != "ignore":
                shaping[f.name] = shape(part, hashes)
        return shaping
    if isinstance(value, Mapping):
        return {key: shape(part, hashes) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [shape(part, hashes) for part in value]
    return value


def contents(paths: str | Mapping[str, str], hashes: HashCache) -> Any:
    """Hash of what a path holds, or of each of several paths by name."""
    if isinstance(paths, Mapping):
        return {name: hashes.content(Path(path)) for name, path in paths.items()}
    return hashes.content(Path(paths))


def template(path: Path, shipped: Path, hashes: HashCache) -> dict[str, str | None]:
    """Hash of each file that a prompt's template is made of, by name. A folder counts without the
    workspace, which changes with every run.
    """
    from align.judge.template_files import template_files  # jinja2 is slow to load

    workspace = hashes.path.parent.parent.resolve()
    shaping: dict[str, str | None] = {}
    for name, file in sorted(template_files(path, shipped).items()):
        if name == path.name:
            name = ""  # what the file is called shapes nothing
        if file is None or file.is_file():
            shaping[name] = None if file is None else hashes.content(file)
            continue
        for part in files_below(file):
            if file.resolve() not in workspace.parents or workspace not in part.resolve().parents:
                shaping[f"{name}/{part.relative_to(file).as_posix()}"] = hashes.content(part)
    return shaping


def source(module: str, hashes: HashCache) -> str:
    """Hash of a user's module: its file, or all files of its package. What it imports from
    elsewhere does not count.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return module
    file = Path(spec.origin)
    return hashes.content(file.parent if spec.submodule_search_locations else file)
