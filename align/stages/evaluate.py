"""Measures the policy against the model it started from: both answered the same prompts, judged
blind in both orders.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from align.artifacts import read_json, write_json
from align.jsonl import dump_line, read_records
from align.judge.settings import called
from align.named import named_module
from align.records import OK, STATUSES, TIE, Candidate, Comparison, Prompt, Response, Verdict
from align.stages.judging import VERDICTS, Said, again, judge_missing
from align.stages.settings import EvaluateStage
from align.stats import Interval, length_controlled, mean_interval, win_rate

Metrics = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What the model said to one prompt before and after; `swapped`: the judge is shown the new
    answer first.
    """

    prompt: Prompt
    before: Response
    after: Response
    swapped: bool

    def comparison(self) -> Comparison:
        """Index 0 is before, 1 is after; the texts carry no sign of it."""
        shown = Comparison(prompt=self.prompt, first=self.before.text, second=self.after.text)
        return shown.swap() if self.swapped else shown


def run(settings: EvaluateStage, inputs: dict[str, Path], out: Path) -> None:
    """Writes verdicts.jsonl, comparisons.jsonl, judge.json and metrics.json (flat, fractions 0 to
    1, nats, no durations).
    """
    pairs = list(read_pairs(inputs, settings.seed))
    metrics: Metrics = {"evaluate/n": len(pairs)}
    metrics["evaluate/length_before"] = float(numpy.mean([p.before.length for p in pairs]))
    metrics["evaluate/length_after"] = float(numpy.mean([p.after.length for p in pairs]))
    trained = read_json(inputs["train"] / "metrics.json")
    if "train/held_out_accuracy" in trained:
        metrics["evaluate/held_out_accuracy"] = trained["train/held_out_accuracy"]
    verdicts: list[Verdict] | list[None] = [None] * len(pairs)
    if settings.judge is not None:
        verdicts = found = judge_all(settings, pairs, out / VERDICTS)
        counts = Counter(verdict.status for verdict in found)
        write_json(out / "counts.json", {**counts, "cost_usd": sum(v.cost for v in found)})
        if counts["failed"]:
            print(f"the judge failed at {counts['failed']} of {len(pairs)} pairs{again(counts)}")
        metrics |= verdict_metrics(pairs, found, settings)
    with (out / "comparisons.jsonl").open("wb") as file:
        file.writelines(dump_line(row(p, v)) for p, v in zip(pairs, verdicts, strict=True))
    write_json(out / "judge.json", {"judge": called(settings.judge)})
    from align.stages.divergence import divergence

    metrics |= divergence(settings, pairs, inputs["train"] / "adapter")
    write_json(out / "metrics.json", dict(sorted(metrics.items())))


def read_pairs(inputs: dict[str, Path], seed: int) -> Iterator[Pair]:
    before = read_records(inputs["before"] / "candidates.jsonl", Candidate.from_json)
    after = read_records(inputs["after"] / "candidates.jsonl", Candidate.from_json)
    for old, new in zip(before, after, strict=True):
        assert old.id == new.id, "both were sampled from the same prompts"
        coin = (
            hashlib.sha256(f"{seed}/evaluate/{old.id}".encode("utf-8", "surrogatepass")).digest()[0]
            % 2
        )
        yield Pair(
            prompt=Prompt(id=old.id, messages=old.messages, meta=old.meta),
            before=old.responses[0],
            after=new.responses[0],
            swapped=bool(coin),
        )


def judge_all(settings: EvaluateStage, pairs: Sequence[Pair], path: Path) -> list[Verdict]:
    """One verdict a pair, in the pairs' order."""
    judge_missing(
        lambda: (pair.comparison() for pair in pairs),
        judge=settings.judge,
        path=path,
        title="judge",
    )
    said = Said(path)
    found = [said.on([pair.comparison()]) for pair in pairs]
    return [
        verdicts[0][1] if verdicts else unanswered(pair)
        for pair, verdicts in zip(pairs, found, strict=True)
    ]


def unanswered(pair: Pair) -> Verdict:
    """Where the judge passed a comparison over: counted, and no verdict."""
    return Verdict(
        id=pair.prompt.id,
        first=0,
        second=1,
        status="failed",
        p_first=None,
        consistent=False,
        judge="",
    )


def p_after(verdict: Verdict) -> float | None:
    """Probability that the new answer is better, None where the judge gave no verdict."""
    if verdict.p_first is None:
        return None
    return verdict.p_first if verdict.first == 1 else 1 - verdict.p_first


def scores(verdict: Verdict, side: int) -> dict[str, float]:
    """The judge's marks for before (0) or after (1)."""
    if not verdict.scores:
        return {}
    return dict(verdict.scores[0 if verdict.first == side else 1])


def verdict_metrics(
    pairs: Sequence[Pair], verdicts: Sequence[Verdict], settings: EvaluateStage
) -> Metrics:
    """Win rate (ties count half), length-controlled win rate, and each criterion before and
    after.
    """
    judged = [
        (pair, v, p)
        for pair, v in zip(pairs, verdicts, strict=True)
        if (p := p_after(v)) is not None
    ]
    chances = numpy.array([p for _, _, p in judged])
    metrics: Metrics = {
        f"evaluate/{status}": float(sum(v.status == status for v in verdicts))
        for status in STATUSES
        if status not in (OK, TIE)
    }
    metrics["evaluate/n_judged"] = len(judged)
    if not judged:
        return metrics
    metrics["evaluate/ties"] = float(numpy.mean(chances == 0.5))
    metrics["evaluate/inconsistent"] = float(numpy.mean([not v.consistent for _, v, _ in judged]))
    rate = win_rate(chances, seed=settings.seed, resamples=settings.resamples)
    controlled = length_controlled(
        chances,
        length_after=numpy.array([pair.after.length for pair, _, _ in judged]),
        length_before=numpy.array([pair.before.length for pair, _, _ in judged]),
    )
    metrics |= named("win_rate", rate) | named("win_rate_length_controlled", controlled)
    return metrics | criteria_metrics([v for _, v, _ in judged], chances, settings)


def named(key: str, interval: Interval) -> Metrics:
    """A mean and the ends of its interval under their names in metrics.json."""
    return {
        f"evaluate/{key}": interval.mean,
        f"evaluate/{key}_low": interval.low,
        f"evaluate/{key}_high": interval.high,
    }


def criteria_metrics(verdicts: Sequence[Verdict], p: Any, settings: EvaluateStage) -> Metrics:
    """What a judge with marks tells beyond who won; empty for one without. Each criterion is told
    over the verdicts that carry it, for a judge's escalation may mark by other ones.
    """
    marks = [(scores(v, 0), scores(v, 1)) for v in verdicts]
    metrics: Metrics = {}
    for name in dict.fromkeys(name for before, _ in marks for name in before):
        carried = [(b[name], a[name]) for b, a in marks if name in b and name in a]
        if carried:
            metrics |= criterion_metrics(name, numpy.array(carried), settings)
    manners = getattr(
        named_module("align.judge", settings.judge.name, settings.judge.module), "MANNERS", ()
    )
    if manners:
        equal = numpy.array(
            [all(m in b and m in a and b[m] == a[m] for m in manners) for b, a in marks]
        )
        metrics["evaluate/n_equal_manners"] = float(equal.sum())
        if equal.any():
            rate = win_rate(p[equal], seed=settings.seed, resamples=settings.resamples)
            metrics |= named("win_rate_equal_manners", rate)
    return metrics


def criterion_metrics(name: str, marks: Any, settings: EvaluateStage) -> Metrics:
    """One criterion: its means, and how often it was won.

    Args:
        marks: [P, 2], before and after.
    """
    old, new = marks[:, 0], marks[:, 1]
    metrics: Metrics = {
        f"evaluate/criterion/{name}/n": float(len(marks)),
        f"evaluate/criterion/{name}/before": float(old.mean()),
        f"evaluate/criterion/{name}/after": float(new.mean()),
        f"evaluate/criterion/{name}/won": float(numpy.mean(new > old)),
        f"evaluate/criterion/{name}/lost": float(numpy.mean(new < old)),
        f"evaluate/criterion/{name}/tied": float(numpy.mean(new == old)),
    }
    if name == "correct":
        for side, found in (("before", old), ("after", new)):
            interval = mean_interval(found, seed=settings.seed, resamples=settings.resamples)
            metrics |= named(f"correct_{side}", interval)
    return metrics


def row(pair: Pair, verdict: Verdict | None) -> dict[str, Any]:
    """One line of comparisons.jsonl."""

    def side(response: Response, index: int) -> dict[str, Any]:
        marks = scores(verdict, index) if verdict else {}
        return {
            "text": response.text,
            "length": response.length,
            "finish": response.finish,
            "scores": marks,
        }

    return {
        "v": 1,
        "id": pair.prompt.id,
        "messages": [message.to_json() for message in pair.prompt.messages],
        "before": side(pair.before, 0),
        "after": side(pair.after, 1),
        "p_after": p_after(verdict) if verdict else None,
        "status": verdict.status if verdict else None,
        "margin": verdict.margin if verdict else None,
        "consistent": verdict.consistent if verdict else None,
    }
