"""Settings of the algorithms; values and comments are in conf/algorithm/."""

from dataclasses import dataclass, field
from typing import ClassVar

from align.checks import check_choice, check_range
from align.errors import ConfigError
from align.rewards.settings import JUDGE, kind_of

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "paged_adamw_8bit")
SCORES = ("head", "implicit")
DPO_LOSSES = ("sigmoid", "ipo", "hinge")
VALUES = ("trunk", "adapter", "none")
TRUNCATED = ("penalty", "score", "bootstrap")
GRPO_LOSSES = ("dapo", "dr_grpo", "grpo", "bnpo")
SCALES = ("group", "batch", "none")
UNSHAPING = {"fingerprint": "ignore"}


@dataclass(frozen=True, kw_only=True)
class PairTraining:
    """What every training on pairs shares. Batches are counted in pairs, over all devices
    together.
    """

    name: str
    module: str | None
    epochs: float
    batch_size: int
    micro_batch_size: int
    learning_rate: float
    schedule: str
    warmup: float
    weight_decay: float
    max_grad_norm: float
    optimizer: str
    gradient_checkpointing: bool
    held_out: float
    evaluations: int

    @property
    def stands_at(self) -> str:
        """Where it stands in the configuration, as `align.config` noted."""
        return str(getattr(self, "_stands_at", "algorithm"))

    def __post_init__(self) -> None:
        check_range("algorithm.epochs", self.epochs, low=0, above=True)
        check_range("algorithm.batch_size", self.batch_size, low=1)
        check_range("algorithm.micro_batch_size", self.micro_batch_size, low=1)
        check_range("algorithm.learning_rate", self.learning_rate, low=0, above=True)
        check_choice("algorithm.schedule", self.schedule, SCHEDULES)
        check_range("algorithm.warmup", self.warmup, low=0, high=0.99)
        check_range("algorithm.weight_decay", self.weight_decay, low=0)
        check_range("algorithm.max_grad_norm", self.max_grad_norm, low=0, above=True)
        check_choice("algorithm.optimizer", self.optimizer, OPTIMIZERS)
        check_range("algorithm.held_out", self.held_out, low=0, high=0.5, above=True)
        check_range("algorithm.evaluations", self.evaluations, low=1)


@dataclass(frozen=True, kw_only=True)
class PreferenceTraining(PairTraining):
    """Training of a policy on pairs, which may lose only so much of the chosen answers."""

    max_drop: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("algorithm.max_drop", self.max_drop, low=0, above=True)


@dataclass(frozen=True, kw_only=True)
class Dpo(PreferenceTraining):
    """Direct preference optimization and its relatives."""

    loss: str
    beta: float
    label_smoothing: float
    soft_labels: bool
    offset: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("algorithm.offset", self.offset, low=0)
        if self.offset and self.loss != "sigmoid":
            raise ConfigError(
                f"algorithm.offset={self.offset:g}: algorithm.loss={self.loss} has no offset; type "
                "algorithm.loss=sigmoid or algorithm.offset=0"
            )
        check_choice("algorithm.loss", self.loss, DPO_LOSSES)
        check_range("algorithm.beta", self.beta, low=0, above=True)
        check_range("algorithm.label_smoothing", self.label_smoothing, low=0, high=0.49)


@dataclass(frozen=True, kw_only=True)
class Reward(PairTraining):
    """A reward model: a score for an answer, from pairs of them."""

    score: str
    beta: float
    label_smoothing: float
    soft_labels: bool
    margin: float
    centre: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algorithm.score", self.score, SCORES)
        check_range("algorithm.beta", self.beta, low=0, above=True)
        check_range("algorithm.label_smoothing", self.label_smoothing, low=0, high=0.49)
        check_range("algorithm.margin", self.margin, low=0)
        check_range("algorithm.centre", self.centre, low=0)

    @property
    def implicit(self) -> bool:
        """Whether the score is a log-probability's, against the base's."""
        return self.score == "implicit"


@dataclass(frozen=True, kw_only=True)
class OnAnswers:
    """What every training on a policy's own answers shares. Prompts and minibatches are counted
    over all devices.
    """

    name: str
    module: str | None
    reward: str = field(metadata={"fingerprint": "reward"})
    calibrate: bool
    reward_clip: float
    truncated: str
    penalty: float
    iterations: int
    prompts: int
    samples: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    sampler_batch_size: int
    epochs: int
    minibatches: int
    micro_batch_tokens: int
    clip: float
    beta: float
    kl_band: list[float]
    learning_rate: float
    schedule: str
    warmup: float
    weight_decay: float
    max_grad_norm: float
    optimizer: str
    gradient_checkpointing: bool
    held_out: float
    monitor_every: int
    monitor_prompts: int
    checkpoint_every: int = field(metadata=UNSHAPING)
    logged_samples: int

    def __post_init__(self) -> None:
        kind_of(self.reward)
        for key in ("iterations", "prompts", "samples", "max_new_tokens", "sampler_batch_size",
                    "epochs", "minibatches", "micro_batch_tokens", "monitor_every",
                    "monitor_prompts", "checkpoint_every"):  # fmt: skip
            check_range(f"algorithm.{key}", getattr(self, key), low=1)
        for key in ("learning_rate", "max_grad_norm", "reward_clip", "clip", "temperature",
                    "top_p"):  # fmt: skip
            check_range(f"algorithm.{key}", getattr(self, key), low=0, above=True)
        for key in ("beta", "weight_decay", "top_k", "logged_samples"):
            check_range(f"algorithm.{key}", getattr(self, key), low=0)
        check_range("algorithm.top_p", self.top_p, low=0, high=1)
        check_choice("algorithm.schedule", self.schedule, SCHEDULES)
        check_choice("algorithm.optimizer", self.optimizer, OPTIMIZERS)
        check_range("algorithm.warmup", self.warmup, low=0, high=0.99)
        check_range("algorithm.held_out", self.held_out, low=0, high=0.5, above=True)
        if len(self.kl_band) != 2 or not 0 <= self.kl_band[0] < self.kl_band[1]:
            raise ConfigError(
                f"algorithm.kl_band={self.kl_band}: must be two numbers, the lower one first, in "
                "nats an answer; type algorithm.kl_band=[0,40]"
            )


@dataclass(frozen=True, kw_only=True)
class Ppo(OnAnswers):
    """Proximal policy optimization."""

    value: str
    gamma: float
    lam: float
    whiten: bool
    dual_clip: float | None
    value_clip: float | None
    value_coef: float
    critic_warmup: int
    kl_target: float | None
    kl_horizon: int
    kl_loss: float
    target_kl: float | None
    importance_cap: float | None
    value_learning_rate: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("algorithm.kl_horizon", self.kl_horizon, low=1)
        check_range("algorithm.value_learning_rate", self.value_learning_rate, low=0, above=True)
        for key in ("kl_loss", "value_coef", "critic_warmup"):
            check_range(f"algorithm.{key}", getattr(self, key), low=0)
        for key in ("gamma", "lam"):
            check_range(f"algorithm.{key}", getattr(self, key), low=0, high=1)
        for key in ("kl_target", "target_kl", "value_clip"):
            if (value := getattr(self, key)) is not None:
                check_range(f"algorithm.{key}", value, low=0, above=True)
        for key in ("dual_clip", "importance_cap"):
            if (value := getattr(self, key)) is not None:
                check_range(f"algorithm.{key}", value, low=1, above=True)
        check_choice("algorithm.truncated", self.truncated, TRUNCATED)
        check_choice("algorithm.value", self.value, VALUES)
        check_range("algorithm.minibatches", self.minibatches, low=1, high=self.prompts)
        self.check_together()

    def check_together(self) -> None:
        """
        Raises:
            ConfigError: a setting makes another one useless.
        """
        judged = kind_of(self.reward) == JUDGE
        if self.samples < 2 and (judged or self.value == "none"):
            needed = "algorithm.reward=judge" if judged else "algorithm.value=none"
            raise ConfigError(
                f"algorithm.samples={self.samples}: {needed} compares the answers to one prompt "
                "with each other; type algorithm.samples=4"
            )
        if self.kl_target is not None and self.beta == 0:
            raise ConfigError(
                f"algorithm.kl_target={self.kl_target:g}: beta is steered by factors, and "
                "algorithm.beta=0 stays 0 whatever it is multiplied with; type algorithm.beta=0.05"
            )
        if self.value != "none" and self.critic_warmup >= self.iterations:
            raise ConfigError(
                f"algorithm.critic_warmup={self.critic_warmup}: the policy would stand still in "
                f"all {self.iterations} iterations; type algorithm.critic_warmup="
                f"{self.iterations // 10}"
            )
        if self.truncated == "bootstrap" and self.value == "none":
            raise ConfigError(
                "algorithm.truncated=bootstrap: there is no value function to go on with; type "
                "algorithm.truncated=penalty, or algorithm.value=trunk"
            )


@dataclass(frozen=True, kw_only=True)
class CriticFree(OnAnswers):
    """Training on sampled answers that are compared with their prompt's other ones, by one of TRL's
    trainers.
    """

    value: ClassVar[str] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algorithm.truncated", self.truncated, ("penalty", "score"))
        self.check_batches()

    def check_batches(self) -> None:
        """
        Raises:
            ConfigError: TRL would refuse such a batch.
        """
        if self.samples < 2:
            raise ConfigError(
                f"algorithm.samples={self.samples}: an answer is compared with its prompt's other "
                "ones, so there must be two at least; type algorithm.samples=4"
            )
        answers = self.prompts * self.samples
        if answers % self.minibatches:
            raise ConfigError(
                f"algorithm.minibatches={self.minibatches}: TRL's optimizer steps are all of one "
                f"size, and the {answers} answers of an iteration cannot be split so; type "
                f"algorithm.minibatches={divisor(answers, most=self.minibatches)}"
            )


@dataclass(frozen=True, kw_only=True)
class Rloo(CriticFree):
    """REINFORCE with the mean of a prompt's other answers as baseline."""

    whiten: bool


@dataclass(frozen=True, kw_only=True)
class Grpo(CriticFree):
    """Group relative policy optimization."""

    loss: str
    scale_rewards: str

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("algorithm.loss", self.loss, GRPO_LOSSES)
        check_choice("algorithm.scale_rewards", self.scale_rewards, SCALES)


def divisor(number: int, *, most: int) -> int:
    """The largest one that is at most `most`."""
    return max(m for m in range(1, max(1, min(number, most)) + 1) if number % m == 0)
