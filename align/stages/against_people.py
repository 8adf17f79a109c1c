"""Measures a judge against people on the same pairs: agreement beyond chance, bias, and where they
differ.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from align.agreement import Agreement, Position, agreement, longer_wins, position
from align.errors import DataError
from align.records import OK, TIE, VERSION, Message, Verdict
from align.stages.judged_pairs import FIRST, P_FIRST, SECOND, JudgedPair
from align.stats import Interval, mean_interval

USABLE = (OK, TIE)
LOOKED = (*USABLE, "disagreement")  # both looks could be read, whatever became of the verdict

Labels = Sequence[str | None]


@dataclass(frozen=True, kw_only=True)
class Bias:
    """What a rater leans to; None where nothing tells.

    Attributes:
        first: share of pairs in which the first answer of the file was preferred, a tie half.
        longer: share of decided pairs of unequal length in which the longer answer won.
    """

    first: Interval | None
    longer: Interval | None


@dataclass(frozen=True, kw_only=True)
class Against:
    """A judge against one column of human labels; None where no pair has both.

    Attributes:
        labels: how often the column says what; `unreadable`: values that are no label.
        one_order: by the judge's first look alone, or by the verdict where it does not look.
        both_alike: over the pairs that it decided alike in both orders.
        final: by its verdicts.
    """

    column: str
    labels: Mapping[str, int]
    unreadable: int
    one_order: Agreement | None
    both_alike: Agreement | None
    final: Agreement | None
    bias: Bias


@dataclass(frozen=True, kw_only=True)
class Between:
    """Two columns of human labels against each other."""

    columns: tuple[str, str]
    agreement: Agreement | None


@dataclass(frozen=True, kw_only=True)
class Differing:
    """A pair of which the judge's verdict and at least one human label say different things.

    Attributes:
        judge: "first", "second" or "tie"; `p_first` and `looks` as in its `Verdict`.
    """

    id: str
    prompt: str | tuple[Message, ...]
    first: str
    second: str
    human: Mapping[str, str | None]
    judge: str
    p_first: float
    looks: tuple[float, ...]

    @property
    def against(self) -> int:
        """How many human labels say another thing."""
        return sum(label not in (None, self.judge) for label in self.human.values())


@dataclass(frozen=True, kw_only=True)
class AgreementReport:
    """All that was measured; written as agreement.json.

    Attributes:
        pairs: read; `statuses`: what became of those that the judge was asked about.
        differing: the surest verdicts first, then those that most people contradict.
    """

    judge: str
    pairs: int
    statuses: Mapping[str, int]
    seed: int
    resamples: int
    against: tuple[Against, ...]
    between: tuple[Between, ...]
    position: Position | None
    bias: Bias
    differing: tuple[Differing, ...]

    @property
    def usable(self) -> int:
        return sum(self.statuses.get(status, 0) for status in USABLE)

    def to_json(self) -> dict[str, Any]:
        return {"v": VERSION, **asdict(self)}


def measure(
    pairs: Iterable[JudgedPair], *, judge_name: str, seed: int, resamples: int
) -> AgreementReport:
    """How far the judge's verdicts agree with people's labels, and people with each other.

    Only verdicts that are "ok" or "tie" are labels; the others are counted by status. Of a
    "disagreement", where each order was decided but not alike, the first look still counts as one
    order. Classes are first and second, and tie where either rater has one.

    Args:
        seed, resamples: of all bootstraps.

    Raises:
        DataError: no pairs.
    """
    rows = list(pairs)
    if not rows:
        raise DataError("no pairs, so there is nothing to measure; give a file that has some")
    columns = list(rows[0].human)
    people = {column: [row.human[column] for row in rows] for column in columns}
    draw = Draw(seed=seed, resamples=resamples)
    final = [verdict_label(row.verdict) for row in rows]
    looked = [row.verdict for row in rows if row.verdict is not None and has_looks(row.verdict)]
    return AgreementReport(
        judge=judge_name,
        pairs=len(rows),
        statuses=dict(Counter(row.verdict.status for row in rows if row.verdict is not None)),
        seed=seed,
        resamples=resamples,
        against=tuple(
            Against(
                column=column,
                labels=dict(Counter(label for label in labels if label is not None)),
                unreadable=sum(column in row.unreadable for row in rows),
                one_order=draw.agreement(labels, [first_look(row.verdict) for row in rows]),
                both_alike=draw.agreement(labels, alike(rows, final)) if looked else None,
                final=draw.agreement(labels, final),
                bias=draw.bias(labels, rows),
            )
            for column, labels in people.items()
        ),
        between=tuple(
            Between(columns=(a, b), agreement=draw.agreement(people[a], people[b]))
            for a, b in itertools.combinations(columns, 2)
        ),
        position=position(looked, seed=seed, resamples=resamples) if looked else None,
        bias=draw.bias(final, rows),
        differing=differing(rows, final),
    )


def side(p: float) -> str:
    """The label of a probability that the first answer is better."""
    return FIRST if p > 0.5 else SECOND if p < 0.5 else TIE


def has_looks(verdict: Verdict) -> bool:
    return verdict.status in LOOKED and len(verdict.looks) == 2


def verdict_label(verdict: Verdict | None) -> str | None:
    """What the verdict says, None where it is not usable."""
    if verdict is None or verdict.status not in USABLE or verdict.p_first is None:
        return None
    return side(verdict.p_first)


def first_look(verdict: Verdict | None) -> str | None:
    """What the judge would have said in the given order alone."""
    if verdict is None or verdict.status not in LOOKED:
        return None
    return side(verdict.looks[0]) if verdict.looks else verdict_label(verdict)


def alike(rows: Sequence[JudgedPair], final: Labels) -> list[str | None]:
    """The final labels of the pairs that were seen in both orders and decided alike."""
    return [
        label if row.verdict is not None and has_looks(row.verdict) and row.verdict.consistent
        else None
        for row, label in zip(rows, final, strict=True)
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The statistics of labels with gaps, with one seed for all."""

    seed: int
    resamples: int

    def agreement(self, a: Labels, b: Labels) -> Agreement | None:
        """Over the items that have both labels; None where there are none."""
        both = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
        if not both:
            return None
        ours, theirs = zip(*both, strict=True)
        classes = [FIRST, SECOND, *([TIE] if TIE in {*ours, *theirs} else [])]
        return agreement(ours, theirs, classes=classes, seed=self.seed, resamples=self.resamples)

    def bias(self, labels: Labels, rows: Sequence[JudgedPair]) -> Bias:
        known = [
            (P_FIRST[label], len(row.first), len(row.second))
            for label, row in zip(labels, rows, strict=True)
            if label is not None
        ]
        if not known:
            return Bias(first=None, longer=None)
        p, first, second = zip(*known, strict=True)
        drawn = {"seed": self.seed, "resamples": self.resamples}
        decided = any(q != 0.5 and a != b for q, a, b in known)
        return Bias(
            first=mean_interval(p, **drawn),
            longer=longer_wins(p, first, second, **drawn) if decided else None,
        )


def differing(rows: Sequence[JudgedPair], final: Labels) -> tuple[Differing, ...]:
    """The pairs on which judge and people differ, in the order of `AgreementReport.differing`."""
    found = []
    for row, label in zip(rows, final, strict=True):
        if label is None or row.verdict is None or row.verdict.p_first is None:
            continue
        pair = Differing(
            id=row.id,
            prompt=row.prompt,
            first=row.first,
            second=row.second,
            human=dict(row.human),
            judge=label,
            p_first=float(row.verdict.p_first),
            looks=tuple(float(look) for look in row.verdict.looks),
        )
        if pair.against:
            found.append(pair)
    return tuple(sorted(found, key=lambda pair: (-abs(pair.p_first - 0.5), -pair.against)))
