"""`python -m align.judge agreement pairs=FILE …`: a judge against people, as a page and as JSON."""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from align.artifacts import HashCache, fingerprint
from align.checks import check_file, check_range
from align.command import composed
from align.config import build, resolved
from align.errors import ConfigError
from align.judge.settings import called
from align.notice import notice
from align.pipeline import shortest
from align.records import Comparison, Prompt, Verdict
from align.shapes import shape
from align.stages.judged_pairs import (
    Columns,
    JudgedPair,
    join,
    read_pairs,
    verdicts_from_labels,
    with_verdicts,
)
from align.stages.judging import Said, again, judge_missing, read_verdicts


@dataclass(frozen=True, kw_only=True)
class Named:
    """Names of columns; conf/judge_agreement.yaml explains them."""

    prompt: str | list[str]
    first: str
    second: str
    id: str | None
    human: str | list[str]

    def columns(self) -> Columns:
        human = [self.human] if isinstance(self.human, str) else self.human
        prompt = self.prompt if isinstance(self.prompt, str) else tuple(self.prompt)
        return Columns(
            prompt=prompt, first=self.first, second=self.second, human=tuple(human), id=self.id
        )


@dataclass(frozen=True, kw_only=True)
class Labels:
    """A file with a judge's labels."""

    path: str | None
    id: str | None
    column: str | None


@dataclass(frozen=True, kw_only=True)
class Agreeing:
    """What the command line says; values and comments are in conf/judge_agreement.yaml."""

    pairs: str
    columns: Named
    labels: Labels
    out: str
    workspace: str
    seed: int
    resamples: int
    retry: bool
    judge: Any = field(metadata={"room": "align.judge"})

    def __post_init__(self) -> None:
        check_file("pairs", self.pairs)
        check_file("labels.path", self.labels.path)
        check_range("seed", self.seed, low=0, high=2**31 - 1)
        check_range("resamples", self.resamples, low=100)
        if (self.judge is None) == (self.labels.path is None):
            raise ConfigError(
                "a judge is asked, or its labels are read from a file, one of both; type "
                "judge=NAME, "
                "or labels.path=FILE labels.column=NAME"
            )
        if self.labels.path is not None and self.labels.column is None:
            raise ConfigError("labels.path: which column is the label? type labels.column=NAME")


def command() -> int:
    composed(job, config="judge_agreement")
    return 0


def job(tree: DictConfig) -> None:
    values = resolved(tree)
    if values["pairs"] is None:
        raise ConfigError("no pairs given; type pairs=FILE (.jsonl, .json, .csv or .parquet)")
    settings: Agreeing = build(Agreeing, values, "")
    pairs = list(read_pairs(Path(settings.pairs), settings.columns.columns()))
    judged = with_verdicts(pairs, verdicts(settings, pairs))
    # The page draws with matplotlib, which takes a second to import: mistakes come first.
    from align.stages.against_people import measure
    from align.stages.agreement import sentence, write_report

    name = called(settings.judge) or str(settings.labels.column)
    report = measure(judged, judge_name=name, seed=settings.seed, resamples=settings.resamples)
    for row in report.against:
        if row.unreadable:
            notice(
                f"columns.human: {row.unreadable} values of {row.column!r} are no label (1, A or "
                "first; 2, B or second; 0 or tie) and were left out"
            )
    out = Path(settings.out)
    write_report(report, out)
    print(sentence(report))
    print(f"report: {shortest(out.absolute() / 'agreement.html')}")


def verdicts(settings: Agreeing, pairs: list[JudgedPair]) -> list[Verdict | None]:
    """The judge's, asked now or read from its file."""
    labels = settings.labels
    if labels.path is not None:
        assert labels.column is not None
        found = join(
            pairs,
            Path(labels.path),
            id_column=labels.id or settings.columns.id,
            label_column=labels.column,
        )
        return verdicts_from_labels(pairs, found, judge=labels.column)
    return asked(settings, pairs)


def asked(settings: Agreeing, pairs: list[JudgedPair]) -> list[Verdict | None]:
    """The verdicts on all pairs; those that an earlier, broken attempt got are kept."""
    out = Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    hashes = HashCache(out / ".hashes.json")
    told = [shape(settings.judge, hashes), hashes.content(Path(settings.pairs))]
    path = out / f"verdicts-{fingerprint([*told, vars(settings.columns)])[:8]}.jsonl"

    def comparisons() -> Iterator[Comparison]:
        return (comparison(pair) for pair in pairs)

    if settings.retry and path.exists():
        counts = Counter(verdict.status for verdict in read_verdicts(path))
        if counts["failed"]:  # nothing is lost where that fails
            path.rename(path.with_suffix(f".retried-{time.time_ns()}"))
    judge_missing(comparisons, judge=settings.judge, path=path, title="judge")
    said = Said(path)
    found = [said.on([comparison(pair)]) for pair in pairs]
    verdicts = [judged[0][1] if judged else None for judged in found]
    counts = Counter(verdict.status for verdict in verdicts if verdict is not None)
    if counts["failed"]:
        notice(f"the judge failed at {counts['failed']} of {len(pairs)} pairs{again(counts)}")
    return verdicts


def comparison(pair: JudgedPair) -> Comparison:
    prompt = Prompt(id=pair.id, messages=pair.messages, meta=pair.meta)
    return Comparison(prompt=prompt, first=pair.first, second=pair.second)
