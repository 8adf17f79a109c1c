"""Trains a reward model on pairs that were tokenized before, and measures what its scores are
worth.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from align import ranking
from align.algorithms.pairs import PairData, PairRows
from align.algorithms.preference_trainer import Policy
from align.algorithms.settings import Reward
from align.artifacts import COUNTS, read_json, write_atomic, write_json
from align.errors import keyed
from align.jsonl import IndexedRecords, dump_line
from align.models.adapters import add_lora
from align.models.classifier import is_encoder, load_classifier, load_weights, score_adapter
from align.models.load import load_model, load_tokenizer
from align.models.logprobs import Row
from align.models.scorer import REWARD, Scorer
from align.named import named_module
from align.progress import progress_bar
from align.records import Candidate
from align.stages.reward_page import page, sentence
from align.stages.settings import RewardStage
from align.stages.train import split
from align.stats import Interval

REFERENCES = 1000  # responses that mean and deviation are taken of
ENOUGH = 0.1  # of the prompts, with an answer that ended by itself


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One held-out pair: what the judge said, raw scores and lengths in tokens of both answers.

    `place` is its place among the preferences, counted from 0; `id` is its prompt's.
    """

    id: str
    place: int
    prompt: str
    p: float
    score_chosen: float
    score_rejected: float
    length_chosen: int
    length_rejected: int

    @property
    def difference(self) -> float:
        return self.score_chosen - self.score_rejected

    @property
    def tied(self) -> bool:
        """Whether the judge preferred neither, so that no order is right."""
        return self.p == 0.5

    @property
    def longer(self) -> int:
        """By how many tokens chosen is longer."""
        return self.length_chosen - self.length_rejected


def run(settings: RewardStage, inputs: dict[str, Path], out: Path) -> None:
    """Writes adapter/ (plain PEFT, a head in it if there is one, and reward.json), curves.jsonl,
    held_out.jsonl, metrics.json, counts.json, report.html and verdict.txt.

    Goes on from checkpoints/. Runs the same in one process or as one of several of
    `accelerate launch`; only the first writes.
    """
    name, module = settings.algorithm.name, settings.algorithm.module
    algorithm = named_module("align.algorithms", name, module)
    with keyed("reward", own="algorithm"), keyed("reward_adapter", own="adapter"):
        data = split(inputs["reference"], share=settings.algorithm.held_out, seed=settings.seed)
        model = fresh(settings)
        encoder = beta(settings) is None and is_encoder(model)
        tokenizer = load_tokenizer(settings.model, encoder=encoder)
        policy = Policy(model=model, tokenizer=tokenizer, reference=None)
        algorithm.train(policy, data, settings=settings.algorithm, out=out)
    if os.environ.get("RANK", "0") == "0":
        load_weights(model, out / "adapter")  # the best, which need not be the last
        model.train(False)
        conclude(settings, inputs, policy, data, out)


def fresh(settings: RewardStage) -> Any:
    """The base with what is trained on it: an adapter, and a head unless the score is implicit."""
    adapter: dict[str, Any] = {"settings": settings.adapter, "seed": settings.seed}
    if beta(settings) is not None:
        return add_lora(load_model(settings.model), **adapter)
    return score_adapter(load_classifier(settings.model, seed=settings.seed), **adapter)


def beta(settings: RewardStage) -> float | None:
    """Of an implicit reward; None where a head gives the score."""
    algorithm = settings.algorithm
    return algorithm.beta if isinstance(algorithm, Reward) and algorithm.implicit else None


def conclude(
    settings: RewardStage, inputs: dict[str, Path], policy: Policy, data: PairData, out: Path
) -> None:
    """Measures, calibrates and reports; nothing that was trained changes."""
    most = read_json(inputs["reference"] / COUNTS)["max_length"]
    scale = beta(settings)
    scorer = Scorer(model=policy.model, tokenizer=policy.tokenizer, max_length=most, beta=scale)
    found = judged(scorer, data.held_out)
    write_atomic(
        out / "held_out.jsonl", b"".join(dump_line(asdict(pair)) for pair in found).decode()
    )
    told = calibrated(scorer, inputs, data)
    read_with = {"base": asdict(settings.model), "max_length": most}
    if scale is not None:
        read_with["beta"] = scale
    write_json(out / "adapter" / REWARD, {**told, **read_with})
    metrics = {
        **read_json(out / "metrics.json"),
        **measures(found, seed=settings.seed),
        "reward/mean": told["mean"],
        "reward/std": told["std"],
    }
    write_json(out / "metrics.json", metrics)
    write_json(out / COUNTS, {"pairs": len(data.train), "held_out": len(data.held_out)})
    write_atomic(out / "verdict.txt", sentence(metrics) + "\n")
    write_atomic(out / "report.html", page(out, base=Path(settings.model.name).name))


def read(scorer: Scorer, rows: Sequence[Row], *, title: str) -> list[float]:
    """The raw score of each row, in their order."""
    with progress_bar(title, len(rows), unit="tokens") as advance:
        return scorer.row_scores(rows, advance=advance)


def both_rows(pairs: PairRows, indices: Sequence[int]) -> list[Row]:
    """Chosen and rejected of each pair in turn, with their prompt."""
    found: list[Row] = []
    for i in indices:
        pair = pairs[i]
        found += [
            Row(prompt=pair["prompt_ids"], completion=pair[f"{side}_ids"])
            for side in ("chosen", "rejected")
        ]
    return found


def judged(scorer: Scorer, pairs: PairRows) -> list[Judged]:
    """The held-out pairs with their scores."""
    found = read(scorer, both_rows(pairs, range(len(pairs))), title="held out")
    return [
        Judged(
            id=pairs[i]["id"],
            place=int(pairs.indices[i]),
            prompt=pairs[i]["prompt"],
            p=pairs[i]["p"],
            score_chosen=found[2 * i],
            score_rejected=found[2 * i + 1],
            length_chosen=len(pairs[i]["chosen_ids"]),
            length_rejected=len(pairs[i]["rejected_ids"]),
        )
        for i in range(len(pairs))
    ]


def measures(found: Sequence[Judged], *, seed: int) -> dict[str, float]:
    """Flat, `reward/…`; see `align.ranking` for what each one is."""
    d, p, longer = (
        np.array([getattr(pair, name) for pair in found], dtype=float)
        for name in ("difference", "p", "longer")
    )
    decided = [pair for pair in found if not pair.tied]
    right = accuracy(decided, seed=seed)
    rates = {
        "longer_wins": ranking.longer_wins(ranking.ranked_right(d), longer),
        "longer_wins_judge": ranking.longer_wins(0.5 + 0.5 * np.sign(p - 0.5), longer),
    }
    return {
        "reward/held_out_accuracy": right.mean,
        "reward/held_out_accuracy_low": right.low,
        "reward/held_out_accuracy_high": right.high,
        "reward/held_out_pairs": len(decided),
        "reward/held_out_prompts": right.n,
        "reward/held_out_ties": len(found) - len(decided),
        "reward/calibration_error": ranking.calibration(d, p).error,
        "reward/length_correlation": ranking.length_correlation(d, longer),
        **{f"reward/{key}": rate for key, rate in rates.items() if rate is not None},
    }


def accuracy(decided: Sequence[Judged], *, seed: int) -> Interval:
    """The share of pairs that are ranked as the judge ranks them, over prompts; without a pair that
    has an order, a coin's, which says nothing.
    """
    if not decided:
        return Interval(mean=0.5, low=0.0, high=1.0, n=0)
    right = ranking.ranked_right([pair.difference for pair in decided])
    return ranking.clustered_mean(right, [pair.prompt for pair in decided], seed=seed)


def calibrated(scorer: Scorer, inputs: dict[str, Path], data: PairData) -> dict[str, Any]:
    """Mean, deviation and extremes of the scores over reference responses, for `reward.json`.

    What the policy answers where candidates are there, else the answers of training pairs. Scores
    are only known up to their level and, against a KL penalty, their scale; taken once and frozen,
    so that the strength of that penalty does not drift.
    """
    draw = np.random.default_rng(data.seed)
    if "candidates" in inputs:
        told = "answers of the model before training"
        rows = [
            scorer.encoded(candidate.messages, candidate.responses[k].text)
            for candidate, k in drawn(inputs["candidates"] / "candidates.jsonl", draw)
        ]
    else:
        told = "answers of the training pairs"
        most = min(len(data.train), REFERENCES // 2)
        rows = both_rows(data.train, sorted(draw.choice(len(data.train), most, replace=False)))
    raw = np.array(read(scorer, rows, title="calibrate"))
    # A model that scores all alike has no scale; its scores are then left as they are.
    std = float(raw.std()) if raw.std() > 1e-8 else 1.0
    return {
        "mean": float(raw.mean()),
        "std": std,
        "lowest": float(raw.min()),
        "highest": float(raw.max()),
        "n": len(rows),
        "reference": told,
    }


def drawn(path: Path, draw: np.random.Generator) -> list[tuple[Candidate, int]]:
    """One response, by its index, of each of at most `REFERENCES` prompts.

    Those that were cut off are passed over, unless too few others are left to calibrate by: as
    text they would be scored with an end of turn that they never had.
    """
    candidates = IndexedRecords(path, Candidate.from_json)
    most = min(len(candidates), REFERENCES)
    whole: list[tuple[Candidate, int]] = []
    cut: list[tuple[Candidate, int]] = []
    for i in sorted(draw.choice(len(candidates), most, replace=False)):
        candidate = candidates[int(i)]
        ended = [k for k, one in enumerate(candidate.responses) if one.finish != "length"]
        among = ended or range(len(candidate.responses))
        (whole if ended else cut).append((candidate, among[int(draw.integers(len(among)))]))
    return whole if len(whole) >= ENOUGH * most else whole + cut
