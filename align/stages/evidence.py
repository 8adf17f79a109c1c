"""What the report and the model card stand on: the finished artifacts, read once into plain values.

Everything but `train` and `evaluate` may be missing; what is not there is left out, never made up.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from align.artifacts import COUNTS, MANIFEST, read_json
from align.errors import DataError, StageError
from align.jsonl import read_lines

ORDER = (
    "prompts", "candidates", "preferences", "reference", "reward", "train",
    "test_prompts", "before", "after", "evaluate",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One model's answer with the judge's marks, empty where it gives none."""

    text: str
    length: float | None
    scores: Mapping[str, float]
    total: float | None


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One held-out prompt: its turns, both answers, and what the judge made of them."""

    id: str
    turns: Sequence[tuple[str, str]]
    before: Answer
    after: Answer
    p_after: float | None
    margin: float
    status: str

    @property
    def gain(self) -> float:
        """How surely and by how much the new answer is better; negative where it is worse."""
        return 0.0 if self.p_after is None else (2 * self.p_after - 1) * (self.margin or 1.0)


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """An answer from the training, with its raw reward and KL where they are known."""

    step: int
    turns: Sequence[tuple[str, str]]
    text: str
    reward: float | None
    kl: float | None
    length: float | None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """All that is told.

    Attributes:
        metrics: flat, of the reward model, training and evaluation, finite numbers only.
        sampled, timing, warnings: of a training on the policy's own answers, in order.
        reward: what the source of rewards calls itself, "" where there was none.
        counts, manifests: by the step's name, in the order of the work.
        judge, label_judge: names; None or "" where there was none.
        config: the run's resolved configuration, {} where it is not YAML.
    """

    metrics: Mapping[str, float]
    curves: Sequence[Mapping[str, float]]
    compared: Sequence[Compared]
    sampled: Sequence[Sampled]
    timing: Sequence[Mapping[str, float]]
    warnings: Sequence[str]
    reward: str
    counts: Mapping[str, Mapping[str, float]]
    manifests: Mapping[str, Mapping[str, Any]]
    judge: str | None
    label_judge: str
    same_judge: bool
    note: str
    config: Mapping[str, Any]

    @property
    def online(self) -> bool:
        """Whether the policy learnt from rewards for its own answers."""
        return "train/answers" in self.metrics

    def setting(self, dotted: str) -> Any:
        """A value of the configuration, or None. Example: `setting("algorithm.beta")`."""
        node: Any = self.config
        for key in dotted.split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
        return node


def gather(inputs: Mapping[str, Path], *, config: str, label_judge: str) -> Evidence:
    """Reads the artifacts.

    Raises:
        StageError: training or evaluation is missing.
        DataError: a file of theirs is damaged.
    """
    for needed in ("train", "evaluate"):
        if needed not in inputs:
            raise StageError(
                f"inputs={sorted(inputs)}: a report needs {needed}; run that stage before it"
            )
    train = inputs["train"]
    metrics = {
        **(numbers(inputs["reward"] / "metrics.json") if "reward" in inputs else {}),
        **numbers(train / "metrics.json"),
        **numbers(inputs["evaluate"] / "metrics.json"),
    }
    judging = json_object(inputs["evaluate"] / "judge.json")
    judge = judging.get("judge") or ("an unnamed judge" if "evaluate/win_rate" in metrics else None)
    labeller = str(label_judge or judging.get("label_judge") or "")
    names = [name for name in ORDER if name in inputs] + sorted(set(inputs) - set(ORDER))
    return Evidence(
        metrics=metrics,
        curves=[finite(line) for line in lines(train / "curves.jsonl")],
        compared=[compared(line) for line in lines(inputs["evaluate"] / "comparisons.jsonl")],
        sampled=[sampled(line) for line in lines(train / "samples.jsonl")],
        timing=[finite(line) for line in lines(train / "timing.jsonl")],
        warnings=[
            f"Iteration {line.get('step')}: {line.get('text')}"
            for line in lines(train / "warnings.jsonl")
        ],
        reward=str(json_object(train / COUNTS).get("reward") or ""),
        counts={name: numbers(inputs[name] / "counts.json") for name in names},
        manifests={name: json_object(inputs[name] / MANIFEST) for name in names},
        judge=judge,
        label_judge=labeller,
        same_judge=judge is not None and bool(judging.get("same", judge == labeller)),
        note=str(judging.get("note") or ""),
        config=parsed(config),
    )


def json_object(path: Path) -> dict[str, Any]:
    """A file's JSON object, {} where there is no such file.

    Raises:
        DataError: it is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        value = read_json(path)
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); remove its artifact and run again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object; remove its artifact and run again")
    return value


def finite(values: Mapping[str, Any]) -> dict[str, float]:
    """Only what can be drawn: numbers, and neither NaN nor infinity."""
    return {
        key: float(value)
        for key, value in values.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def numbers(path: Path) -> dict[str, float]:
    return finite(json_object(path))


def lines(path: Path) -> list[dict[str, Any]]:
    return [line for _, line in read_lines(path)] if path.is_file() else []


def compared(line: Mapping[str, Any]) -> Compared:
    p, margin = line.get("p_after"), line.get("margin")
    return Compared(
        id=str(line.get("id")),
        turns=turns(line),
        before=answer(line.get("before") or {}),
        after=answer(line.get("after") or {}),
        p_after=None if p is None else float(p),
        margin=abs(float(margin)) if margin is not None else 0.0,
        status=str(line.get("status") or ""),
    )


def turns(line: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(str(turn["role"]), str(turn["content"])) for turn in line.get("messages") or []]


def sampled(line: Mapping[str, Any]) -> Sampled:
    known = finite({key: line.get(key) for key in ("step", "reward", "kl", "tokens")})
    return Sampled(
        step=int(known.get("step", 0)),
        turns=turns(line),
        text=str(line.get("text") or ""),
        reward=known.get("reward"),
        kl=known.get("kl"),
        length=known.get("tokens"),
    )


def answer(side: Mapping[str, Any]) -> Answer:
    scores = finite(side.get("scores") or {})
    known = finite({key: side.get(key) for key in ("length", "total")})
    total = known.get("total", sum(scores.values()) if scores else None)
    return Answer(
        text=str(side.get("text") or ""), length=known.get("length"), scores=scores, total=total
    )


def parsed(config: str) -> dict[str, Any]:
    """The configuration's tree, {} where the text, which the report shows as it is, is no YAML."""
    try:
        tree = yaml.safe_load(config)
    except yaml.YAMLError:
        return {}
    return tree if isinstance(tree, dict) else {}
