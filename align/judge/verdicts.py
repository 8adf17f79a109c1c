"""From comparisons to the questions that a judge is asked, and from its answers to verdicts.

Pure: nothing here knows how an answer is come by, so that an LLM behind an endpoint and a model in
this process are asked and read alike.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import fsum
from statistics import fmean

from align.errors import JudgeError
from align.judge import forms
from align.judge.answers import OK as READ
from align.judge.answers import Reading, score
from align.judge.forms import FIRST_WINS, LETTERS, MARGINS, Form
from align.judge.orders import leaning, over_both_orders
from align.judge.prompts import Material
from align.judge.settings import Asking
from align.records import OK, TIE, Comparison, Verdict

# What one look that failed makes of the whole, the gravest first.
GRAVEST = ("failed", "overflow", "refusal", "malformed")
LEVELS = ((1.5, ">>", "<<"), (0.5, ">", "<"))


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked once. `sample` tells repetitions of the same question apart."""

    material: Material
    form: Form
    sample: int = 0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a question: a reading, or a status that tells why there is none.

    Attributes:
        cost: in nano-dollars, of the answer that counts.
    """

    reading: Reading
    tokens: int = 0
    cost: int = 0

    @property
    def status(self) -> str:
        return self.reading.status


@dataclass(frozen=True, kw_only=True)
class Group:
    """Comparisons that are settled by the same answers: one pair, or all pairs of a prompt (of a
    ranking, and of marks, which each response is given once).
    """

    comparisons: tuple[Comparison, ...]

    @property
    def texts(self) -> dict[int, str]:
        """The compared responses by index, in the order in which they first come."""
        found: dict[int, str] = {}
        for c in self.comparisons:
            found.setdefault(c.first_index, c.first)
            found.setdefault(c.second_index, c.second)
        return found


def groups(comparisons: Iterable[Comparison], *, settings: Asking) -> Iterator[Group]:
    """Pairs one by one; for rankings and marks all neighbours that share a prompt and its
    responses.
    """
    if settings.kind == forms.PAIRWISE:
        for comparison in comparisons:
            yield Group(comparisons=(comparison,))
        return
    gathered: list[Comparison] = []
    texts: dict[int, str] = {}
    for comparison in comparisons:
        sides = {
            comparison.first_index: comparison.first,
            comparison.second_index: comparison.second,
        }
        other = gathered and comparison.prompt != gathered[0].prompt
        if other or any(texts.get(index, text) != text for index, text in sides.items()):
            yield Group(comparisons=tuple(gathered))
            gathered, texts = [], {}
        gathered.append(comparison)
        texts |= sides
    if gathered:
        yield Group(comparisons=tuple(gathered))


def windows(comparisons: Iterable[Comparison], *, least: int) -> Iterator[list[Comparison]]:
    """Neighbours by whole prompts, at least so many comparisons together."""
    gathered: list[Comparison] = []
    for _, prompt in groupby(comparisons, key=lambda comparison: comparison.prompt.id):
        gathered += prompt
        if len(gathered) >= least:
            yield gathered
            gathered = []
    if gathered:
        yield gathered


def fitting(group: Group, *, settings: Asking) -> Group:
    """The group without the comparisons that are given up because they are too long; a ranking is
    of all responses or none.
    """
    if settings.on_overflow != "drop":
        return group
    most = settings.max_chars
    kept = [c for c in group.comparisons if max(len(c.first), len(c.second)) <= most]
    whole = len(kept) == len(group.comparisons)
    return Group(comparisons=tuple(kept) if whole or settings.kind != forms.LISTWISE else ())


def with_dropped(
    group: Group, kept: Group, found: Sequence[Verdict], *, judge: str
) -> list[Verdict]:
    """The verdicts on a whole group, of which `found` are those on the comparisons that `fitting`
    kept.
    """
    waiting = list(zip(kept.comparisons, found, strict=True))[::-1]
    return [
        waiting.pop()[1]
        if waiting and waiting[-1][0] is comparison
        else without(comparison, status="overflow", judge=judge)
        for comparison in group.comparisons
    ]


def questions(group: Group, *, settings: Asking, samples: int = 1) -> list[Question]:
    """What has to be asked: each kind's looks in order, repeated for each sample.

    Raises:
        JudgeError: more responses than letters.
    """
    form, order = form_of(group, settings=settings), list(group.texts.values())
    shown = [[text] for text in order] if form.kind == forms.SCALAR else [order, order[::-1]]
    prompt = group.comparisons[0].prompt
    reference = prompt.meta.get(settings.reference)
    return [
        Question(
            material=Material(
                messages=prompt.messages,
                responses=texts,
                reference=reference if isinstance(reference, str) else None,
            ),
            form=form,
            sample=sample,
        )
        for sample in range(samples)
        for texts in shown
    ]


def form_of(group: Group, *, settings: Asking) -> Form:
    """The form of all questions of a group.

    Raises:
        JudgeError: more responses than letters.
    """
    criteria, reason = tuple(settings.criteria), settings.reason
    if settings.kind == forms.SCALAR:
        lowest, highest = settings.lowest, settings.highest
        return forms.scalar(lowest=lowest, highest=highest, criteria=criteria, reason=reason)
    if settings.kind == forms.PAIRWISE:
        return forms.pairwise(scale=settings.scale, criteria=criteria, reason=reason)
    count, most = len(group.texts), len(LETTERS)
    if count > most:
        raise JudgeError(
            f"judge.kind=listwise: prompt {group.comparisons[0].prompt.id} has {count} responses "
            f"and a ranking takes {most}; type sampler.n={most} or judge.kind=pairwise"
        )
    return forms.listwise(count, reason=reason)


def verdicts(
    group: Group, answers: Sequence[Answer], *, settings: Asking, judge: str
) -> list[Verdict]:
    """One verdict a comparison, from the answers to `questions(group)` in their order."""
    looks = len(group.texts) if settings.kind == forms.SCALAR else 2
    assert answers and len(answers) % looks == 0
    rounds = [answers[i : i + looks] for i in range(0, len(answers), looks)]
    tokens, cost = sum(a.tokens for a in answers), sum(a.cost for a in answers) / 1e9
    found = []
    for number, comparison in enumerate(group.comparisons):
        verdict = single(group, comparison, rounds, settings=settings, judge=judge)
        # What settles several pairs is paid for once: the first verdict carries the price.
        found.append(replace(verdict, tokens=tokens, cost=cost) if number == 0 else verdict)
    return found


def single(
    group: Group,
    comparison: Comparison,
    rounds: Sequence[Sequence[Answer]],
    *,
    settings: Asking,
    judge: str,
) -> Verdict:
    places = list(range(len(rounds[0])))
    if settings.kind == forms.SCALAR:  # the others' marks have nothing to do with it
        indices = list(group.texts)
        places = [indices.index(i) for i in (comparison.first_index, comparison.second_index)]
    bad = {answers[place].status for answers in rounds for place in places} - {READ}
    if bad:
        status = next((status for status in GRAVEST if status in bad), "failed")
        return without(comparison, status=status, judge=judge)
    if settings.kind == forms.SCALAR:
        return from_scores(comparison, rounds, list(group.texts), settings=settings, judge=judge)
    if settings.kind == forms.LISTWISE:
        verdict = from_rankings(comparison, rounds, list(group.texts), judge=judge)
    else:
        verdict = from_looks(comparison, rounds, settings=settings, judge=judge)
    return settled(verdict, on_disagreement=settings.on_disagreement)


def without(comparison: Comparison, *, status: str, judge: str) -> Verdict:
    """A verdict that prefers nothing, and says why."""
    return Verdict(
        id=comparison.prompt.id, first=comparison.first_index, second=comparison.second_index,
        status=status, p_first=None, consistent=False, judge=judge,
    )  # fmt: skip


def settled(verdict: Verdict, *, on_disagreement: str) -> Verdict:
    """What becomes of a verdict whose two orders disagree; "escalate" is the asker's business."""
    if verdict.consistent or on_disagreement in ("soft", "escalate"):
        return verdict
    if on_disagreement == "drop":
        return replace(verdict, status="disagreement", p_first=None, margin=None, level=None)
    level = None if verdict.level is None else "="
    return replace(verdict, status=TIE, p_first=0.5, margin=None, level=level)


def preferred(reading: Reading) -> float:
    """Probability that the response shown first is the better one."""
    return expected(distribution(reading), FIRST_WINS)


def distribution(reading: Reading) -> Mapping[str, float]:
    """The probability of each label; of the written one alone where the endpoint gave none."""
    return reading.probabilities or {str(reading.label): 1.0}


def expected(probabilities: Mapping[str, float], values: Mapping[str, float]) -> float:
    return fsum(values[label] * p for label, p in probabilities.items())


def from_looks(
    comparison: Comparison, rounds: Sequence[Sequence[Answer]], *, settings: Asking, judge: str
) -> Verdict:
    """A pair, looked at in both orders."""
    given, swapped = ([answers[i].reading for answers in rounds] for i in (0, 1))
    p, p_swapped = fmean(map(preferred, given)), fmean(map(preferred, swapped))
    marks = {
        name: (
            fmean(FIRST_WINS[r.criteria[name]] for r in given)
            + fmean(1 - FIRST_WINS[r.criteria[name]] for r in swapped)
        ) / 2
        for name in settings.criteria
    }  # fmt: skip
    scores = (marks, {name: 1 - mark for name, mark in marks.items()}) if marks else ()
    verdict = over_both_orders(
        comparison, p_first=p, p_first_swapped=p_swapped, judge=judge, scores=scores
    )
    if settings.scale != "five":
        return verdict
    margin = (margins(given) - margins(swapped)) / 2
    assert verdict.p_first is not None
    sign = leaning(verdict.p_first)
    bad = fmean(distribution(r).get(forms.BOTH_BAD, 0.0) for r in (*given, *swapped)) > 0.5
    level = "both bad" if bad else level_of(margin * abs(sign))
    return replace(verdict, margin=max(0.0, margin * sign), level=level)


def margins(readings: Sequence[Reading]) -> float:
    """By how many levels the response shown first is better."""
    return fmean(expected(distribution(r), MARGINS) for r in readings)


def level_of(margin: float) -> str:
    """The nearest of >>, >, =, < and <<; from the middle between two, the farther one."""
    for least, first, second in LEVELS:
        if abs(margin) >= least:
            return first if margin > 0 else second
    return "="


def from_rankings(
    comparison: Comparison,
    rounds: Sequence[Sequence[Answer]],
    indices: Sequence[int],
    *,
    judge: str,
) -> Verdict:
    """A pair out of rankings of all: once in the given order, once from the back."""
    first, second = (indices.index(i) for i in (comparison.first_index, comparison.second_index))

    def wins(look: int) -> float:
        """Share of the samples in which `first` stands before `second`."""
        last = len(indices) - 1
        a, b = (place if look == 0 else last - place for place in (first, second))
        orders = [answers[look].reading.ranking for answers in rounds]
        return fmean(float(o.index(LETTERS[a]) < o.index(LETTERS[b])) for o in orders)

    # In one of the listings the comparison's first stands first.
    ahead, behind = (0, 1) if first < second else (1, 0)
    return over_both_orders(
        comparison, p_first=wins(ahead), p_first_swapped=1 - wins(behind), judge=judge
    )


def from_scores(
    comparison: Comparison,
    rounds: Sequence[Sequence[Answer]],
    indices: Sequence[int],
    *,
    settings: Asking,
    judge: str,
) -> Verdict:
    """A pair of marks that were given apart, so there is no order to disagree about. The margin is
    in marks; the scores are shares of the scale, 0 to 1.

    With probabilities of each mark, p = P(mark of first > mark of second) + P(equal) / 2, taken as
    independent; without, the higher mark wins.
    """
    lowest, highest = settings.lowest, settings.highest
    places = [indices.index(i) for i in (comparison.first_index, comparison.second_index)]
    readings = [[answers[place].reading for answers in rounds] for place in places]
    marks = [fmean(map(score, side)) for side in readings]
    p = fmean(beats(a, b) for a, b in zip(*readings, strict=True))
    sides = []
    for side, mark in zip(readings, marks, strict=True):
        named = {name: fmean(float(r.criteria[name]) for r in side) for name in side[0].criteria}
        shares = {**named, "score": mark}.items()
        sides.append({name: (value - lowest) / (highest - lowest) for name, value in shares})
    return Verdict(
        id=comparison.prompt.id,
        first=comparison.first_index,
        second=comparison.second_index,
        status=OK if leaning(p) else TIE,
        p_first=p if leaning(p) else 0.5,
        consistent=True,
        judge=judge,
        margin=max(0.0, (marks[0] - marks[1]) * leaning(p)),
        scores=tuple(sides),
    )


def beats(a: Reading, b: Reading) -> float:
    """P(a > b) + P(a = b) / 2 of two marks, which is 1/2 + sum_xy P(x) P(y) sign(x - y) / 2."""
    return 0.5 + 0.5 * fsum(
        p * q * ((int(x) > int(y)) - (int(x) < int(y)))
        for x, p in distribution(a).items()
        for y, q in distribution(b).items()
    )
