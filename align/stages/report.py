"""Writes what a run is mailed as: a page that says whether it got better, and the adapter."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from align.artifacts import write_atomic
from align.errors import StageError
from align.records import OK, TIE
from align.stages import plots
from align.stages.card import is_whole, model_card
from align.stages.evidence import Compared, Evidence, gather
from align.stages.online_page import learnt
from align.stages.page import environment, style
from align.stages.panels import panels
from align.stages.plots import Change, Rate
from align.stages.settings import ReportStage
from align.stages.verdict import measured, number, overall, verdict
from align.stats import win_rate
from align.unseen import printable

HERE = Path(__file__).parent
MOST_GAINS, MOST_LOSSES = 4, 12
SEED = 0
LONG_TEXT = 900
USABLE = (OK, TIE, "")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One step's price; `share` of the longest step's time, for the bar. Where the step was
    `resumed`, the time before that is not known.
    """

    name: str
    seconds: float
    resumed: bool
    share: float
    usd: float
    rows: float
    finished: str


def run(settings: ReportStage, inputs: dict[str, Path], out: Path) -> None:
    """Writes report.html, verdict.txt and adapter/ (the trained one, linked, with a model card).

    Raises:
        StageError: there is no trained adapter, no training or no evaluation.
        DataError: an artifact's file is damaged.
    """
    evidence = gather(inputs, config=settings.config, label_judge=settings.label_judge)
    told = verdict(evidence.metrics, judge=evidence.judge)
    files = link_adapter(inputs["train"] / "adapter", out / "adapter")
    card = model_card(evidence, name=settings.name, command=settings.command, files=files)
    write_atomic(out / "adapter" / "README.md", printable(card))
    write_atomic(out / "report.html", page(settings, evidence, whole=is_whole(files)))
    write_atomic(out / "verdict.txt", printable(told.sentence) + "\n")


def link_adapter(source: Path, target: Path) -> list[str]:
    """Hard links (or copies) of all the adapter's files but its README; returns their names.

    Raises:
        StageError: there is none.
    """
    if not source.is_dir():
        raise StageError(f"{source}: no trained adapter there; remove that artifact and run again")
    files = sorted(p for p in source.rglob("*") if p.is_file() and p != source / "README.md")
    for file in files:
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.unlink(missing_ok=True)
        try:
            os.link(file, copy)
        except OSError:
            shutil.copy2(file, copy)
    target.mkdir(exist_ok=True)
    return [file.relative_to(source).as_posix() for file in files]


def page(settings: ReportStage, evidence: Evidence, *, whole: bool = False) -> str:
    """The whole page, self-contained.

    Args:
        whole: a whole model was trained, no adapter.
    """
    templates = environment()
    templates.filters |= {
        "duration": duration, "words": lambda key: key.replace("_", " "), "signed": signed,
    }  # fmt: skip
    judged = [pair for pair in evidence.compared if pair.p_after is not None]
    ranked = sorted(judged, key=lambda pair: (-pair.gain, pair.id))
    losses = [pair for pair in reversed(ranked) if pair.gain < 0]
    gains = [pair for pair in ranked if pair.gain > 0]
    changes = marks(evidence)
    return templates.get_template("report.html.j2").render(
        css=style(),
        name=settings.name,
        config=settings.config,
        command=settings.command,
        evidence=evidence,
        metrics=evidence.metrics,
        verdict=verdict(evidence.metrics, judge=evidence.judge),
        overall=overall(evidence.metrics),
        judged=judged,
        unusable=unusable(evidence),
        ties=sum(pair.p_after == 0.5 for pair in judged),
        rates=rates(evidence, judged),
        marks=changes,
        fell=any(row.after < row.before for row in changes),
        panels=panels(evidence),
        learnt=learnt(evidence) if evidence.online else None,
        whole=whole,
        gains=gains,
        losses=losses,
        most_gains=MOST_GAINS,
        most_losses=MOST_LOSSES,
        cut=LONG_TEXT,
        costs=costs(evidence),
        versions=versions(evidence),
        draw=Drawing(evidence),
    )


def unusable(evidence: Evidence) -> dict[str, int]:
    """How many comparisons of the evaluation gave no verdict, by what became of them."""
    return dict(
        sorted(
            Counter(pair.status for pair in evidence.compared if pair.status not in USABLE).items()
        )
    )


def rates(evidence: Evidence, judged: Sequence[Compared]) -> list[Rate]:
    """The win rates in order: overall, at equal length and manners, then by criterion."""
    metrics = evidence.metrics
    judged_n, alike = len(judged), metrics.get("evaluate/n_equal_manners", 0)
    known = (
        ("Overall", overall(metrics)),
        ("At equal length", measured(metrics, "win_rate_length_controlled", n=judged_n)),
        ("At equal manners", measured(metrics, "win_rate_equal_manners", n=alike)),
    )
    rows = [Rate(label=label, interval=found) for label, found in known if found is not None]
    for name in criteria(judged):
        both = [
            (pair.before.scores[name], pair.after.scores[name])
            for pair in judged
            if has(pair, name)
        ]
        p = np.array([0.5 + 0.5 * ((new > old) - (new < old)) for old, new in both])
        rows.append(Rate(label=printable(name), interval=win_rate(p, seed=SEED), criterion=True))
    return rows


def has(pair: Compared, criterion: str) -> bool:
    return criterion in pair.before.scores and criterion in pair.after.scores


def criteria(judged: Sequence[Compared]) -> list[str]:
    """The judge's criteria in its own order."""
    names: dict[str, None] = {}
    for pair in judged:
        names |= dict.fromkeys(name for name in pair.after.scores if has(pair, name))
    return list(names)


def marks(evidence: Evidence) -> list[Change]:
    """Mean marks before and after; marks beyond 0 to 1 have no common axis and are left out."""
    found = []
    for key in evidence.metrics:
        if match := re.fullmatch(r"evaluate/criterion/(.+)/before", key):
            old, new = (
                evidence.metrics[key],
                evidence.metrics.get(f"evaluate/criterion/{match[1]}/after", -1),
            )
            if 0 <= old <= 1 and 0 <= new <= 1:
                found.append(Change(label=printable(match[1]), before=old, after=new))
    order = criteria(evidence.compared)
    return sorted(
        found, key=lambda row: order.index(row.label) if row.label in order else len(order)
    )


class Drawing:
    """The figures that the template places, each empty where there is nothing to draw."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence

    def rates(self, rows: Sequence[Rate]) -> Markup:
        return Markup(plots.win_rates(rows))

    def marks(self, rows: Sequence[Change]) -> Markup:
        return Markup(plots.marks(rows))

    def lengths(self) -> Markup:
        return self.both(lambda answer: answer.length, name="lengths", unit="tokens an answer")

    def totals(self) -> Markup:
        return self.both(lambda answer: answer.total, name="totals", unit="score of an answer")

    def both(self, value: Callable[[Any], float | None], *, name: str, unit: str) -> Markup:
        pairs = [(value(pair.before), value(pair.after)) for pair in self.evidence.compared]
        known = [(old, new) for old, new in pairs if old is not None and new is not None]
        if not known:
            return Markup()
        before, after = zip(*known, strict=True)
        return Markup(plots.histograms(before, after, name=name, unit=unit))


def costs(evidence: Evidence) -> list[Cost]:
    """What each step took, as its manifest has it."""
    timed = {name: m for name, m in evidence.manifests.items() if "duration_s" in m}
    longest = max((float(m["duration_s"]) for m in timed.values()), default=0.0) or 1.0
    return [
        Cost(
            name=name,
            seconds=float(m["duration_s"]),
            resumed=bool(m.get("resumed")),
            share=float(m["duration_s"]) / longest,
            usd=float(m.get("cost_usd") or 0.0),
            rows=max((m.get("rows") or {}).values(), default=0),
            finished=str(m.get("finished") or ""),
        )
        for name, m in timed.items()
    ]


def versions(evidence: Evidence) -> dict[str, list[str]]:
    """Package versions over all steps; several of one where steps were made at different times."""
    found: dict[str, list[str]] = {}
    for manifest in evidence.manifests.values():
        known: Mapping[str, str] = manifest.get("versions") or {}
        for package, version in known.items():
            if version not in found.setdefault(package, []):
                found[package].append(version)
    return found


def duration(seconds: float) -> str:
    """0.4 s, 42 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"
    )


def signed(value: float) -> str:
    """As one reads it, to two decimals, with a minus sign of a number's width."""
    return number(round(value, 2)).replace("-", "−")
