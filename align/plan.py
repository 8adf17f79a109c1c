"""What a run consists of: from the configuration to an ordered list of steps, checked before
anything starts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from align.algorithms.needs import Needs
from align.algorithms.settings import PairTraining, PreferenceTraining, Reward
from align.config import Config
from align.errors import ConfigError
from align.judge.settings import called
from align.models.settings import Lora
from align.named import named_module
from align.records import Preference, Prompt
from align.rewards.settings import JUDGE, ROLE, kind_of
from align.samplers.settings import Hf
from align.stages.settings import (
    EvaluateStage,
    GenerateStage,
    HoldOutStage,
    LabelStage,
    OnlineStage,
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
    config = replace(config, stages=needed(config))
    steps: list[Step] = []
    if "generate" in config.stages:
        steps += generation(config)
    if "label" in config.stages:
        steps.append(labelling(config))
    if learners(config):
        steps += pairs(config)
    if "reward" in config.stages:
        steps.append(rewarding(config))
    if "train" in config.stages:
        steps += training(config, made=[step.name for step in steps])
    if "evaluate" in config.stages:
        steps += evaluation(config, steps, yaml=yaml, command=command)
    return steps


def needs_of(algorithm: Any) -> Needs:
    needs: Needs = named_module("align.algorithms", algorithm.name, algorithm.module).NEEDS
    if isinstance(algorithm, Reward) and algorithm.implicit:
        return replace(needs, reference=True)
    return needs


def is_online(config: Config) -> bool:
    """Whether the policy learns from rewards for its own answers."""
    wanted = "train" in config.stages and config.algorithm is not None
    return wanted and needs_of(config.algorithm).reward


def wants_reward_model(algorithm: Any) -> bool:
    """Whether it learns from the reward model that the run trains."""
    return needs_of(algorithm).reward and kind_of(getattr(algorithm, "reward", ROLE)) == ROLE


def rewarded_by_judge(config: Config) -> bool:
    return is_online(config) and kind_of(getattr(config.algorithm, "reward", ROLE)) == JUDGE


def needed(config: Config) -> list[str]:
    """The stages without those that an online training with rewards from elsewhere has no use
    for.

    Raises:
        ConfigError: it wants a reward model, and no stage trains one.
    """
    if not is_online(config):
        return config.stages
    reward = getattr(config.algorithm, "reward", ROLE)
    if kind_of(reward) != ROLE:
        return [stage for stage in config.stages if stage not in ("generate", "label", "reward")]
    if "reward" not in config.stages:
        raise ConfigError(
            f"stages={shown(config)}: algorithm={config.algorithm.name} learns from a reward "
            f"model, and no stage trains one; type recipe=ppo algorithm={config.algorithm.name} or "
            "algorithm.reward=FOLDER, path.to:function or judge"
        )
    return config.stages


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
        check_reward(config)
        assert config.reward is not None, "see check_reward"
        chosen["algorithm@reward"] = config.reward
    if "train" in config.stages and config.algorithm is None:
        raise ConfigError("algorithm=none: train needs one; type algorithm=dpo")
    if "train" in config.stages and not is_online(config):
        chosen["algorithm"] = config.algorithm
    if isinstance(chosen.get("algorithm"), Reward):
        raise ConfigError("algorithm=reward: trains a reward model, no policy; type recipe=reward")
    return {key: (a, needs_of(a)) for key, a in chosen.items()}


def check_reward(config: Config) -> None:
    """
    Raises:
        ConfigError: no reward model's training is chosen, or beside it a policy's that no stage
            would do. One that wants a reward model may stop before it, to look at the reward model.
    """
    idle = (
        "train" not in config.stages
        and config.algorithm is not None
        and not wants_reward_model(config.algorithm)
    )
    if config.reward is None:
        raise ConfigError(
            f"stages={shown(config)}: reward trains a reward model, and no algorithm for it is "
            f"chosen; type algorithm@reward=reward{' algorithm=none' if idle else ''}"
        )
    if isinstance(config.reward, PreferenceTraining) or needs_of(config.reward).reward:
        raise ConfigError(
            f"algorithm@reward={config.reward.name}: trains a policy, no reward model; type "
            "algorithm@reward=reward"
        )
    if idle:
        raise ConfigError(
            f"algorithm={config.algorithm.name}: none of stages={shown(config)} trains a policy by "
            "it; the reward model's algorithm is algorithm@reward and its settings are reward.KEY; "
            "type algorithm=none, or add train to stages"
        )


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
    if not isinstance(config.reward_adapter, Lora):
        raise ConfigError(
            f"adapter@reward_adapter={config.reward_adapter.name}: a reward model is trained as an "
            "adapter; type adapter@reward_adapter=lora"
        )
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


def training(config: Config, *, made: Sequence[str]) -> list[Step]:
    """The policy's, and where it learns online from prompts that no earlier step reads, those."""
    if is_online(config):
        return online(config, made=made)
    if not isinstance(config.adapter, Lora):
        raise ConfigError(
            f"adapter={config.adapter.name}: algorithm={config.algorithm.name} trains an adapter; "
            "type adapter=lora"
        )
    settings = TrainStage(
        model=config.model, adapter=config.adapter, algorithm=config.algorithm, seed=config.seed
    )
    inputs = {"reference": "reference"}
    return [trained("train", settings, inputs)]


LOGS = ("curves.jsonl", "samples.jsonl", "timing.jsonl")


def trained(stage: str, settings: Any, inputs: Mapping[str, str]) -> Step:
    shown = ("adapter", *(LOGS if stage == "online" else ()))
    links = {name: name for name in shown}
    return Step(
        name="train", stage=stage, settings=settings, inputs=inputs, links=links, distributed=True
    )


def online(config: Config, *, made: Sequence[str]) -> list[Step]:
    """Prompts are those of the source, or of its preferences."""
    provides = named_module("align.sources", config.data.name, config.data.module).PROVIDES
    asks = "prompts" if provides is Prompt else "preferences"
    steps = []
    if asks not in made:
        read = ReadStage(source=config.data, test=False, limit=config.data.limit)
        steps.append(Step(name=asks, stage="read", settings=read))
    by_judge = rewarded_by_judge(config)
    if by_judge and config.judge is None:
        raise ConfigError("algorithm.reward=judge: judge=none gives no rewards; type judge=NAME")
    if not isinstance(config.adapter, Lora) and config.model.quantization != "none":
        raise ConfigError(
            f"adapter={config.adapter.name}: weights in {config.model.quantization} cannot be "
            "trained; type model.quantization=none, or adapter=lora"
        )
    settings = OnlineStage(
        model=config.model,
        adapter=config.adapter,
        algorithm=config.algorithm,
        judge=config.judge if by_judge else None,
        monitor=config.evaluate.judge,
        max_length=config.data.max_length,
        seed=config.seed,
    )
    inputs = {asks: asks} | ({"reward": "reward"} if "reward" in made else {})
    return [*steps, trained("online", settings, inputs)]


def evaluation(config: Config, steps: Sequence[Step], *, yaml: str, command: str) -> list[Step]:
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
    # An evaluation judge that also labelled or gave the rewards is not an independent one.
    taught = "label" in config.stages or rewarded_by_judge(config)
    label_judge = (called(config.judge) or "") if taught else ""
    made = [step.name for step in steps]
    everything = [*made, "test_prompts", "before", "after", "evaluate"]
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
