"""Trains the policy: the base with a fresh adapter, on pairs that were tokenized and scored
before.
"""

from pathlib import Path
from typing import Any

from datasets import Dataset

from align.algorithms.pairs import PairData, PairRows
from align.algorithms.preference_trainer import Policy
from align.artifacts import read_json
from align.errors import StageError
from align.models.adapters import add_lora
from align.models.load import load_model, load_tokenizer
from align.named import named_module
from align.split import is_held_out
from align.stages.reference import PAIRS, SCORES, load_scores
from align.stages.settings import TrainStage


def run(settings: TrainStage, inputs: dict[str, Path], out: Path) -> None:
    """Writes adapter/ (plain PEFT), curves.jsonl, metrics.json and counts.json (which
    names the reference).

    Goes on from checkpoints/. Runs the same in one process or as one of several of
    `accelerate launch`; only the first writes.
    """
    name, module = settings.algorithm.name, settings.algorithm.module
    algorithm = named_module("align.algorithms", name, module)
    data = split(inputs["reference"], share=settings.algorithm.held_out, seed=settings.seed)
    policy = Policy(
        model=add_lora(load_model(settings.model), settings=settings.adapter, seed=settings.seed),
        tokenizer=load_tokenizer(settings.model),
        reference=str(read_json(inputs["reference"] / "counts.json")["reference"]),
    )
    algorithm.train(policy, data, settings=settings.algorithm, out=out)


def split(folder: Path, *, share: float, seed: int) -> PairData:
    """The pairs of held-out prompts on one side, all others on the other.

    Raises:
        StageError: one side is empty.
    """
    rows: Any = Dataset.from_file(str(folder / PAIRS))
    scores = load_scores(folder / SCORES)
    sides: tuple[list[int], list[int]] = ([], [])
    for i, key in enumerate(rows["prompt"]):
        sides[is_held_out(key, share)].append(i)
    if not all(sides):
        raise StageError(
            f"algorithm.held_out={share}: of {len(rows)} pairs it leaves {len(sides[0])} to train "
            f"on and {len(sides[1])} to measure; give pairs of more prompts, or "
            f"{'raise' if sides[0] else 'lower'} algorithm.held_out"
        )
    train, held_out = (
        PairRows(rows, chosen=scores.chosen, rejected=scores.rejected, indices=side)
        for side in sides
    )
    return PairData(train=train, held_out=held_out, seed=seed)
