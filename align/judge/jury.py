"""Several judges of the same comparisons, weighted by how well they agree with people.

A judge that is right with probability a, independently of the others, deserves the weight

    w = ln(a / (1 - a))

for then the weighted majority is right most often (Nitzan and Paroush 1982, Optimal Decision Rules
in Uncertain Dichotomous Choice Situations, theorem 1). Deviations: a is the agreement with human
labels, which may hold ties too, held to [0.5, 0.99], so that no judge counts against what it says
and none decides alone; judges that share their training are not independent, so the weights are
bolder than they should be; and the votes are probabilities, which are pooled rather than counted.
"""

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import tee
from pathlib import Path
from typing import Any, TypeVar

from align.checks import check_file, check_range
from align.errors import ConfigError, JudgeError
from align.judge.ask import verdicts_of
from align.judge.settings import Jury
from align.judge.verdicts import Group, without
from align.records import OK, TIE, Comparison, Verdict

USABLE = (OK, TIE)
AGREEMENT = (0.5, 0.99)  # what an agreement rate is held to before it becomes a weight
PROBABILITY = (0.01, 0.99)  # the same for a probability before its log-odds are pooled
NEARLY = 1e-9  # a mean so close to one half is a tie that rounding has moved

T = TypeVar("T")


async def compare(comparisons: Iterable[Comparison], *, settings: Jury) -> AsyncIterator[Verdict]:
    """One verdict a comparison, in order; the members work side by side, each at its own pace.

    Raises:
        JudgeError: a member cannot go on, which ends the others too.
    """
    weights = voters(settings)
    asked = copies(comparisons, len(weights) + 1)
    async with contextlib.AsyncExitStack() as stack:
        members = []
        for (name, _), shown in zip(weights.items(), asked[1:], strict=True):
            stream = verdicts_of(shown, settings=settings.members[name])
            members.append(
                Member(name, await stack.enter_async_context(contextlib.aclosing(stream)))
            )
        for comparison in asked[0]:
            found = await side_by_side([member.on(comparison) for member in members])
            votes = dict(zip(weights, found, strict=True))
            yield combined(comparison, votes, weights=weights, settings=settings)
        await side_by_side([member.end() for member in members])


@contextlib.asynccontextmanager
async def opened(settings: Jury) -> AsyncIterator["Bench"]:
    """The jury ready to settle comparisons one at a time, as another judge's `escalate`."""
    from align.judge.openai import another

    weights = voters(settings)
    async with contextlib.AsyncExitStack() as stack:
        seats = [await stack.enter_async_context(another(settings.members[n])) for n in weights]
        yield Bench(settings=settings, weights=weights, seats=seats)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where comparisons are settled one group at a time; `seats` in the order of `weights`."""

    settings: Jury
    weights: Mapping[str, float]
    seats: Sequence[Any]

    def halt(self, error: JudgeError) -> None:
        """Begins nothing new at any seat."""
        for seat in self.seats:
            if hasattr(seat, "halt"):
                seat.halt(error)

    async def settle(self, group: Group) -> list[Verdict]:
        """One verdict a comparison. Each seat is waited for, even when another one failed: what is
        under way is paid for.
        """
        found: list[list[Verdict]] = []
        settled = (seat.settle(group) for seat in self.seats)
        for verdicts in await asyncio.gather(*settled, return_exceptions=True):
            if isinstance(verdicts, BaseException):
                raise verdicts
            found.append(verdicts)
        return [
            combined(
                comparison,
                dict(zip(self.weights, votes, strict=True)),
                weights=self.weights,
                settings=self.settings,
            )
            for comparison, *votes in zip(group.comparisons, *found, strict=True)
        ]


@dataclass
class Member:
    """One member's verdicts, in step with the comparisons; it may pass some over."""

    name: str
    stream: AsyncIterator[Verdict]
    pending: Verdict | None = None

    async def on(self, comparison: Comparison) -> Verdict | None:
        """What it says of the next comparison, None where it passes it over."""
        if self.pending is None:
            self.pending = await anext(self.stream, None)
        if self.pending is None or not is_of(self.pending, comparison):
            return None
        verdict, self.pending = self.pending, None
        return verdict

    async def end(self) -> None:
        """Lets it finish its work.

        Raises:
            JudgeError: it has a verdict left that belongs to no comparison.
        """
        left = self.pending or await anext(self.stream, None)
        if left is not None:
            raise JudgeError(
                f"judge.members.{self.name}: gave a verdict on prompt {left.id} that was not asked "
                "for, or came after a later one; compare() must yield verdicts in the order asked"
            )


def is_of(verdict: Verdict, comparison: Comparison) -> bool:
    said = (verdict.id, verdict.first, verdict.second)
    return said == (comparison.prompt.id, comparison.first_index, comparison.second_index)


def copies(comparisons: Iterable[Comparison], count: int) -> Sequence[Iterable[Comparison]]:
    """The comparisons, to be gone through `count` times; what can be read only once is kept as far
    as the fastest reader is ahead.
    """
    if iter(comparisons) is comparisons:
        return tee(comparisons, count)
    return [comparisons] * count


async def side_by_side(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, in order; when one fails, the others are cancelled and waited for. A
    member that is paid for each answer finishes what is under way when it is cancelled.
    """
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def combined(
    comparison: Comparison,
    votes: Mapping[str, Verdict | None],
    *,
    weights: Mapping[str, float],
    settings: Jury,
) -> Verdict:
    """The jury's verdict. Members without a usable one are left out; too few left, and there is
    none, for the reason that all of them share, or else because it "failed".
    """
    given = [verdict for verdict in votes.values() if verdict is not None]
    usable = {n: v for n, v in votes.items() if v is not None and v.status in USABLE}
    cost, tokens = sum(v.cost for v in given), sum(v.tokens for v in given)
    quorum = settings.quorum or len(weights) // 2 + 1
    if len(usable) < quorum:
        reasons = {v.status if v is not None else "failed" for v in votes.values()}
        status = reasons.pop() if len(reasons) == 1 and not usable else "failed"
        none = without(comparison, status=status, judge=settings.judge)
        return replace(none, cost=cost, tokens=tokens)
    shares = normal({name: weights[name] for name in usable})
    p = pooled({n: float(v.p_first or 0.0) for n, v in usable.items()}, shares, vote=settings.vote)
    return Verdict(
        id=comparison.prompt.id,
        first=comparison.first_index,
        second=comparison.second_index,
        status=TIE if p == 0.5 else OK,
        p_first=p,
        consistent=sum(shares[n] for n, v in usable.items() if v.consistent) > 0.5,
        judge=settings.judge,
        cost=cost,
        tokens=tokens,
    )


def pooled(p: Mapping[str, float], shares: Mapping[str, float], *, vote: str) -> float:
    """One probability from several.

        mean:     p = sum_i s_i p_i
        logodds:  ln(p / (1 - p)) = sum_i s_i ln(p_i / (1 - p_i))

    Source: the linear and the logarithmic opinion pool, Genest and Zidek 1986, Combining
    Probability Distributions, section 3. The second lets a sure member outweigh unsure ones.

    Args:
        p: by member; for the log-odds held to [0.01, 0.99].
        shares: by member, adding up to 1.
    """
    if vote == "mean":
        found = sum(shares[name] * value for name, value in p.items())
    else:
        odds = sum(shares[name] * log_odds(value, PROBABILITY) for name, value in p.items())
        found = 0.5 * (1 + math.tanh(odds / 2))
    return 0.5 if abs(found - 0.5) < NEARLY else min(max(found, 0.0), 1.0)


def log_odds(p: float, held: tuple[float, float]) -> float:
    p = min(max(p, held[0]), held[1])
    return math.log(p) - math.log1p(-p)


def normal(weights: Mapping[str, float]) -> dict[str, float]:
    """Weights that add up to 1."""
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def voters(settings: Jury) -> dict[str, float]:
    """The members that have a say, with their weights; one without weight is never asked.

    Raises:
        ConfigError: weights that do not fit the members, or leave nobody a say.
    """
    names = sorted(settings.members)
    if settings.weights and settings.agreement:
        raise ConfigError(
            "judge.weights and judge.agreement: each says what a member counts; give one of them"
        )
    weights = dict.fromkeys(names, 1.0)
    if settings.weights:
        weights = declared(settings.weights, names)
    elif settings.agreement:
        same_names("agreement", settings.agreement, names)
        rates = {name: agreement_rate(name, Path(settings.agreement[name])) for name in names}
        weights = {name: log_odds(rate, AGREEMENT) for name, rate in rates.items()}
    if sum(weights.values()) <= 0:
        key = "weights" if settings.weights else "agreement"
        told = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
        raise ConfigError(
            f"judge.{key}: no member has a weight above 0 ({told}), so nobody decides; give at "
            "least one of them more, with judge.weights={NAME: 1, …}"
        )
    return {name: weight for name, weight in weights.items() if weight > 0}


def declared(weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """The weights as they were set, checked."""
    same_names("weights", weights, names)
    for name in names:
        check_range(f"judge.weights.{name}", weights[name], low=0, high=1e6)
    return {name: float(weights[name]) for name in names}


def same_names(key: str, given: Mapping[str, Any], names: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: not one value for each member.
    """
    for name in given:
        if name not in names:
            raise ConfigError(
                f"judge.{key}.{name}: no member is called so; members are {', '.join(names)}"
            )
    for name in names:
        if name not in given:
            raise ConfigError(f"judge.{key}: has none for {name}; type +judge.{key}.{name}=VALUE")


def agreement_rate(name: str, path: Path) -> float:
    """How often a judge's verdicts equal the human labels, over all columns of an agreement.json
    that `python -m align.judge agreement` wrote.

    Raises:
        ConfigError: there is no such file, or nothing was measured in it.
    """
    key = f"judge.agreement.{name}"
    check_file(key, str(path))
    try:
        columns = [row["final"] for row in json.loads(path.read_text("utf-8"))["against"]]
        found = [(c["n"], c["agreement"]["mean"]) for c in columns if c is not None]
        return float(sum(n * rate for n, rate in found) / sum(n for n, _ in found))
    except ZeroDivisionError:
        why = "no pair in it has both a verdict and a human label"
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = f"no report of an agreement ({type(error).__name__})"
    raise ConfigError(
        f"{key}={path}: {why}; make one with python -m align.judge agreement, or type judge.weights"
    )
