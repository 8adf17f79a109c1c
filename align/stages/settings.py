"""What shapes each stage's output, and each stage's version; torch-free, so that planning is quick.

`version` goes up when a mended bug changes what a stage makes: older artifacts are then made again.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from align.algorithms.settings import PairTraining
from align.checks import check_choice, check_range
from align.models.settings import Full, Lora, Model
from align.samplers.settings import Hf
from align.sources.settings import Source

PAIRS = ("all", "best_vs_worst", "random")
TIES = ("drop", "keep")
UNSHAPING = {"fingerprint": "ignore"}


@dataclass(frozen=True, kw_only=True)
class Label:
    """Which of a prompt's candidates are compared, and what becomes of ties. Values are in
    conf/config.yaml.
    """

    pairs: str
    k: int
    ties: str

    def __post_init__(self) -> None:
        check_choice("label.pairs", self.pairs, PAIRS)
        check_range("label.k", self.k, low=1)
        check_choice("label.ties", self.ties, TIES)


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """How the policy is measured, before and after. Values are in conf/config.yaml."""

    judge: Any
    limit: int | None
    max_new_tokens: int
    resamples: int
    precision_samples: int

    def __post_init__(self) -> None:
        if self.limit is not None:
            check_range("evaluate.limit", self.limit, low=1)
        check_range("evaluate.max_new_tokens", self.max_new_tokens, low=1)
        check_range("evaluate.resamples", self.resamples, low=100)
        check_range("evaluate.precision_samples", self.precision_samples, low=0)


@dataclass(frozen=True, kw_only=True)
class ReadStage:
    version: ClassVar[int] = 1
    source: Source
    test: bool
    limit: int | None


@dataclass(frozen=True, kw_only=True)
class CollectStage:
    """Candidates that somebody else made."""

    version: ClassVar[int] = 1
    path: str = field(metadata={"fingerprint": "content"})


@dataclass(frozen=True, kw_only=True)
class GenerateStage:
    version: ClassVar[int] = 1
    model: Model
    sampler: Hf
    seed: int


@dataclass(frozen=True, kw_only=True)
class LabelStage:
    version: ClassVar[int] = 2
    label: Label
    judge: Any
    seed: int


@dataclass(frozen=True, kw_only=True)
class ReferenceStage:
    version: ClassVar[int] = 2
    model: Model
    max_length: int | None
    score: bool


@dataclass(frozen=True, kw_only=True)
class HoldOutStage:
    version: ClassVar[int] = 2
    share: float
    limit: int | None


@dataclass(frozen=True, kw_only=True)
class RewardStage:
    version: ClassVar[int] = 2
    model: Model
    adapter: Lora
    algorithm: PairTraining
    seed: int


@dataclass(frozen=True, kw_only=True)
class TrainStage:
    version: ClassVar[int] = 2
    model: Model
    adapter: Lora
    algorithm: PairTraining
    seed: int


@dataclass(frozen=True, kw_only=True)
class OnlineStage:
    """`judge` gives rewards, where the algorithm asks one; `monitor` watches held-out prompts."""

    version: ClassVar[int] = 2
    model: Model
    adapter: Lora | Full
    algorithm: Any
    judge: Any
    monitor: Any
    max_length: int | None
    seed: int


@dataclass(frozen=True, kw_only=True)
class EvaluateStage:
    version: ClassVar[int] = 4
    model: Model
    judge: Any
    max_new_tokens: int
    resamples: int
    precision_samples: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class ReportStage:
    version: ClassVar[int] = 1
    name: str
    label_judge: str
    config: str = field(metadata=UNSHAPING)
    command: str = field(metadata=UNSHAPING)
