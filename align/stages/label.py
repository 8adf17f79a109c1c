"""Has candidates compared by a judge and writes what it says as preferences."""

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from align.artifacts import write_json
from align.errors import StageError
from align.jsonl import IndexedRecords, dump_line
from align.records import OK, STATUSES, TIE, Candidate, Comparison, Preference, Prompt, Verdict
from align.stages.judging import VERDICTS, Said, again, judge_missing
from align.stages.manner import Manner
from align.stages.settings import Label, LabelStage


def run(settings: LabelStage, inputs: dict[str, Path], out: Path) -> None:
    """Writes verdicts.jsonl (all of them), preferences.jsonl (what became data), metrics.json (the
    judge's habits) and counts.json.

    Raises:
        StageError: no verdict became a preference.
    """
    candidates = IndexedRecords(inputs["candidates"] / "candidates.jsonl", Candidate.from_json)

    total = judge_missing(
        lambda: asked(settings, candidates),
        judge=settings.judge,
        path=out / VERDICTS,
        title="label",
    )
    counts = write_preferences(settings, candidates, out)
    write_json(out / "counts.json", counts)
    if counts["preferences"] == 0:
        why = why_none(counts, total=total, judge=settings.judge.name, path=out / VERDICTS)
        if not decided(counts) and counts["failed"]:
            (out / VERDICTS).unlink()  # so that the same command asks again
        raise StageError(why)
    line = f"labelled {counts['comparisons']} comparisons: {told(counts)}{again(counts)}"
    print(line, flush=True)


def decided(counts: Mapping[str, Any]) -> bool:
    return bool(counts[OK] or counts[TIE] or counts["disagreement"])


def why_none(counts: Mapping[str, Any], *, total: int, judge: str, path: Path) -> str:
    """Why nothing became a preference, and what may mend it.

    Args:
        total: comparisons that the judge was asked about.
        path: of its verdicts.
    """
    said = f"{counts['comparisons']} comparisons"
    if total and not counts["comparisons"]:
        return (
            f"judge={judge}: passed all {total} comparisons over; its compare() must yield a "
            "verdict on each that it can judge"
        )
    if counts["comparisons"] and not decided(counts):
        again = ", then type the same command" if counts["failed"] else ""
        return (
            f"the judge gave no verdict on any of {said} ({told(counts)}); check the judge's "
            f"model, prompt and settings{again}"
        )
    ties = ", or type label.ties=keep" if counts[TIE] else ""
    what = f"have answers compared that differ more{ties}"
    if counts["inconsistent"] > counts["comparisons"] / 2:
        what = f"the order decides, not the answer: choose another judge or judge.prompt{ties}"
    return (
        f"none of {said} became a preference ({told(counts)}); {what}. What the judge said: {path}"
    )


def asked(settings: LabelStage, candidates: Iterable[Candidate]) -> Iterator[Comparison]:
    """All comparisons, in the candidates' order."""
    for candidate in candidates:
        yield from comparisons(candidate, label=settings.label, seed=settings.seed)


def told(counts: Mapping[str, Any]) -> str:
    return (
        ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status]) or "none"
    )


def distinct(candidate: Candidate) -> list[int]:
    """Indices of the answers worth comparing: not empty, and the first of each text."""
    first: dict[str, int] = {}
    for i, response in enumerate(candidate.responses):
        if response.text.strip():
            first.setdefault(response.text.strip(), i)
    return list(first.values())


def comparisons(candidate: Candidate, *, label: Label, seed: int) -> list[Comparison]:
    """The pairs to be judged. Who comes first is drawn too, so that no judge can lean on the order
    of sampling.
    """
    digest = hashlib.sha256(
        f"{seed}/label/{candidate.id}".encode("utf-8", "surrogatepass")
    ).digest()
    rng = random.Random(int.from_bytes(digest[:8]))
    pairs = list(combinations(distinct(candidate), 2))
    if label.pairs == "random":
        pairs = sorted(rng.sample(pairs, min(label.k, len(pairs))))
    prompt = Prompt(id=candidate.id, messages=candidate.messages, meta=candidate.meta)
    made = []
    for first, second in pairs:
        if rng.random() < 0.5:
            first, second = second, first
        made.append(
            Comparison(
                prompt=prompt,
                first=candidate.responses[first].text,
                second=candidate.responses[second].text,
                first_index=first,
                second_index=second,
            )
        )
    return made


def write_preferences(
    settings: LabelStage, candidates: IndexedRecords[Candidate], out: Path
) -> dict[str, Any]:
    """preferences.jsonl in the candidates' order; returns the counts, those that became no data
    included.
    """
    counts: Counter[str] = Counter()
    cost, said, manner = 0.0, Said(out / VERDICTS), Manner()
    with (out / "preferences.jsonl").open("wb") as file:
        for candidate in candidates:
            verdicts = []
            made = comparisons(candidate, label=settings.label, seed=settings.seed)
            for comparison, verdict in said.on(made):
                verdicts.append(verdict)
                manner.add(comparison, verdict)
                counts[verdict.status] += 1
                judged = verdict.status in (OK, TIE, "disagreement")
                counts["inconsistent"] += judged and not verdict.consistent
                cost += verdict.cost
            ordered = sorted(
                verdicts, key=lambda v: (min(v.first, v.second), max(v.first, v.second))
            )
            for preference in preferences(candidate, ordered, label=settings.label):
                file.write(dump_line(preference.to_json()))
                counts["preferences"] += 1
            texts = [response.text.strip() for response in candidate.responses]
            counts["empty"] += sum(not text for text in texts)
            counts["duplicates"] += len(texts) - len(set(texts))
    write_json(out / "metrics.json", manner.metrics())
    if habits := manner.sentence():
        print(habits, flush=True)
    names = (*STATUSES, "inconsistent", "preferences", "empty", "duplicates")
    return {
        "comparisons": sum(counts[s] for s in STATUSES),
        **{name: counts[name] for name in names},
        "cost_usd": cost,
    }


def preferences(
    candidate: Candidate, verdicts: Iterable[Verdict], *, label: Label
) -> Iterator[Preference]:
    """What the verdicts of one prompt teach. Only "ok" and "tie" can; a failure is never data."""
    usable = [v for v in verdicts if v.status == OK or (v.status == TIE and label.ties == "keep")]
    if label.pairs == "best_vs_worst":
        usable = extremes([v for v in verdicts if v.status in (OK, TIE)], usable)
    for verdict in usable:
        assert verdict.p_first is not None
        first_wins = verdict.p_first >= 0.5
        chosen, rejected = (
            (verdict.first, verdict.second) if first_wins else (verdict.second, verdict.first)
        )
        yield Preference(
            id=candidate.id,
            messages=candidate.messages,
            chosen=candidate.responses[chosen].text,
            rejected=candidate.responses[rejected].text,
            p=max(verdict.p_first, 1 - verdict.p_first),
            margin=verdict.margin,
            judge=verdict.judge,
            meta={
                **candidate.meta,
                "chosen_index": chosen,
                "rejected_index": rejected,
                "consistent": verdict.consistent,
            },
        )


def extremes(judged: list[Verdict], usable: list[Verdict]) -> list[Verdict]:
    """The verdict between the answer that won most and the one that won least, if it is usable."""
    won: dict[int, list[float]] = {}
    for verdict in judged:
        assert verdict.p_first is not None
        won.setdefault(verdict.first, []).append(verdict.p_first)
        won.setdefault(verdict.second, []).append(1 - verdict.p_first)
    if not won:
        return []
    rate = {i: sum(p) / len(p) for i, p in sorted(won.items())}
    best, worst = max(rate, key=lambda i: rate[i]), min(rate, key=lambda i: rate[i])
    return [v for v in usable if {v.first, v.second} == {best, worst}]
