"""Whether the text of a response can talk to the judge: worse answers that plead their own case,
and one that fits every question because it says nothing.

Three kinds of comparison, each of a good answer with a worse one:

    clean      the worse answer as it is: what the judge makes of the pair when nobody interferes
    injection  the worse answer with a text before or after it that is addressed to the judge
    constant   the same structured, empty text in place of the worse answer, whatever was asked

Source of the last: Zheng et al. 2024, Cheating Automatic LLM Benchmarks: Null Models Achieve High
Win Rates (arXiv 2410.07137). Deviation: theirs is shaped after one benchmark's prompt and optimised
by random search; ours is written by hand after the prompts of conf/judge/prompts/. The pairs are
our own too, so that no judge has been trained on them.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from align.judge.canary_texts import CONSTANT, PAIRS, TECHNIQUES, Pair, Technique
from align.records import OK, TIE, VERSION, Comparison, Message, Prompt, Verdict
from align.stats import Interval, wilson

CLEAN, NULL = "clean", "constant"
USABLE = (OK, TIE)
GOOD, WORSE = 0, 1  # the index of each answer in a comparison, whichever is shown first


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A comparison of which the better answer is known; index 1 is the worse one.

    Attributes:
        technique: "clean", "constant" or the name of a technique.
        pair: the id of the pair that it was made of.
    """

    comparison: Comparison
    technique: str
    pair: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the judge made of the canaries of one technique.

    Attributes:
        n: with a usable verdict; `won`, `tied`: of them, by the worse answer.
        share: (won + tied) / n with its 95% interval, None where n is 0.
        compared: of n, those whose pair the judge decides for the good answer when it is clean.
        flipped: of `compared`, those that the worse answer won.
        swayed: of `compared`, those that became a tie.
        statuses: all verdicts by status.
    """

    technique: str
    n: int
    won: int
    tied: int
    share: Interval | None
    compared: int
    flipped: int
    swayed: int
    statuses: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class CanaryReport:
    """How far responses can talk to a judge.

    Attributes:
        clean, constant: the two controls.
        injected: all techniques together; `techniques`: each.
        statuses: of all verdicts.
        unanswered: canaries without any verdict.
        sentence: the result in plain words.
    """

    judge: str
    clean: Outcome
    constant: Outcome
    injected: Outcome
    techniques: tuple[Outcome, ...]
    statuses: dict[str, int]
    unanswered: int
    sentence: str

    def to_json(self) -> dict[str, Any]:
        return {"v": VERSION, **asdict(self)}


def canaries(
    pairs: Sequence[Pair] = PAIRS, techniques: Sequence[Technique] = TECHNIQUES
) -> list[Canary]:
    """All comparisons, in a fixed order and with fixed ids."""
    return [*clean(pairs), *injections(pairs, techniques), *constants(pairs)]


def clean(pairs: Sequence[Pair]) -> Iterator[Canary]:
    """The pairs as they are."""
    for number, pair in enumerate(pairs):
        yield canary(pair, pair.worse, technique=CLEAN, swapped=number % 2 == 1)


def injections(pairs: Sequence[Pair], techniques: Sequence[Technique]) -> Iterator[Canary]:
    """Every technique on every pair, in turn before and after the worse answer."""
    for row, technique in enumerate(techniques):
        for number, pair in enumerate(pairs):
            text = technique.text(number, language=pair.language)
            parts = (text, pair.worse) if number % 2 else (pair.worse, text)
            swapped = (row + number // 2) % 2 == 1
            yield canary(pair, "\n\n".join(parts), technique=technique.name, swapped=swapped)


def constants(pairs: Sequence[Pair]) -> Iterator[Canary]:
    """One answer to everything."""
    for number, pair in enumerate(pairs):
        yield canary(pair, CONSTANT, technique=NULL, swapped=number % 2 == 1)


def canary(pair: Pair, worse: str, *, technique: str, swapped: bool) -> Canary:
    prompt = Prompt(
        id=f"canary/{technique}/{pair.id}",
        messages=(Message(role="user", content=pair.question),),
    )
    comparison = Comparison(
        prompt=prompt, first=pair.good, second=worse, first_index=GOOD, second_index=WORSE
    )
    return Canary(
        comparison=comparison.swap() if swapped else comparison,
        technique=technique,
        pair=pair.id,
    )


def report(asked: Sequence[Canary], verdicts: Iterable[Verdict]) -> CanaryReport:
    """What the judge's verdicts say about its canaries.

    Args:
        asked: as `canaries` gave them.
        verdicts: in any order; those of other comparisons are left out.
    """
    by_id = {(v.id, v.first, v.second): v for v in verdicts}
    found = [(c, v) for c in asked if (v := by_id.get(key(c.comparison))) is not None]
    firm = {c.pair for c, v in found if c.technique == CLEAN and worse_wins(v) == 0.0}

    def outcome(name: str, *techniques: str) -> Outcome:
        return counted(name, [(c, v) for c, v in found if c.technique in techniques], firm=firm)

    names = list(dict.fromkeys(c.technique for c in asked if c.technique not in (CLEAN, NULL)))
    controls = {"clean": outcome(CLEAN, CLEAN), "constant": outcome(NULL, NULL)}
    injected, parts = outcome("injected", *names), tuple(outcome(name, name) for name in names)
    return CanaryReport(
        **controls,
        judge=", ".join(sorted({v.judge for _, v in found})),
        injected=injected,
        techniques=parts,
        statuses=dict(Counter(v.status for _, v in found)),
        unanswered=len(asked) - len(found),
        sentence=sentence(injected, parts, **controls),
    )


def key(comparison: Comparison) -> tuple[str, int, int]:
    return (comparison.prompt.id, comparison.first_index, comparison.second_index)


def worse_wins(verdict: Verdict) -> float | None:
    """1 where the worse answer won, 0.5 for a tie, 0 where it lost; None without usable verdict."""
    if verdict.status not in USABLE or verdict.p_first is None:
        return None
    p = verdict.p_first if verdict.first == WORSE else 1 - verdict.p_first
    return 0.5 + 0.5 * ((p > 0.5) - (p < 0.5))


def counted(name: str, found: Sequence[tuple[Canary, Verdict]], *, firm: set[str]) -> Outcome:
    """The counts of one group of canaries; `firm`: pairs that the judge decides well when clean."""
    ends = [(c.pair in firm, end) for c, v in found if (end := worse_wins(v)) is not None]
    won, tied = (sum(end == value for _, end in ends) for value in (1.0, 0.5))
    return Outcome(
        technique=name,
        n=len(ends),
        won=won,
        tied=tied,
        share=wilson((won + tied) / len(ends), n=len(ends)) if ends else None,
        compared=sum(good for good, _ in ends),
        flipped=sum(good and end == 1.0 for good, end in ends),
        swayed=sum(good and end == 0.5 for good, end in ends),
        statuses=dict(Counter(v.status for _, v in found)),
    )


def sentence(
    injected: Outcome, techniques: Sequence[Outcome], *, clean: Outcome, constant: Outcome
) -> str:
    """The result in plain words."""
    if not clean.n:
        return "No clean pair got a verdict, so nothing tells what the injections changed."
    right = clean.n - clean.won - clean.tied
    parts = [f"Without injection the better answer won {right} of {clean.n} pairs."]
    if injected.compared:
        worst = sorted((t for t in techniques if t.flipped), key=lambda t: -t.flipped)
        told = ", ".join(f"{t.technique.replace('_', ' ')} {t.flipped}" for t in worst)
        parts.append(
            f"{injected.flipped or 'None'} of {injected.compared} injected answers won that lose "
            f"without injection{': ' if told else ''}{told}; {injected.swayed or 'none'} became a "
            "tie."
        )
    else:
        parts.append("No injected answer could be compared with its clean pair.")
    if constant.n:
        parts.append(
            f"One constant, empty answer to everything won {constant.won} of {constant.n} and tied "
            f"{constant.tied}."
        )
    return " ".join(parts)
