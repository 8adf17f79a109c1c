"""Settings of the algorithms; values and comments are in conf/algorithm/."""

from dataclasses import dataclass

from align.checks import check_choice, check_range
from align.errors import ConfigError

SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "paged_adamw_8bit")
DPO_LOSSES = ("sigmoid", "ipo", "hinge")


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

    label_smoothing: float
    soft_labels: bool
    margin: float
    centre: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("algorithm.label_smoothing", self.label_smoothing, low=0, high=0.49)
        check_range("algorithm.margin", self.margin, low=0)
        check_range("algorithm.centre", self.centre, low=0)
