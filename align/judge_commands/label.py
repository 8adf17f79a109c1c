"""`python -m align.judge candidates=FILE judge=NAME out=FILE`: the label stage on candidates that
somebody else made.
"""

import shlex
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from align.artifacts import fingerprint
from align.checks import check_file, check_range
from align.command import composed
from align.config import Launch, build, resolved
from align.errors import ConfigError, JudgeError
from align.jsonl import IndexedRecords
from align.judge.jury import voters
from align.judge.prices import usd
from align.judge.settings import Jury, Openai
from align.pipeline import Done, Work, bring_about, shortest
from align.plan import Step
from align.progress import told_time
from align.records import OK, STATUSES, TIE, Candidate
from align.stages.judging import again
from align.stages.label import asked
from align.stages.settings import CollectStage, Label, LabelStage

if TYPE_CHECKING:
    from align.judge.estimate import Estimate

FREE = ("local", "rubric", "scripted")  # judges that send no requests
LEFT_OUT = {"empty": "empty", "duplicates": "that repeat another"}
HERE = Launch(mode="inline", processes=None, threads=None)


@dataclass(frozen=True, kw_only=True)
class Labelling:
    """What the command line says; values and comments are in conf/judge_cli.yaml."""

    candidates: str
    out: str
    workspace: str
    name: str
    seed: int
    verify: bool
    retry: bool
    dry_run: bool
    label: Label
    judge: Any = field(metadata={"room": "align.judge"})

    def __post_init__(self) -> None:
        check_file("candidates", self.candidates)
        check_range("seed", self.seed, low=0, high=2**31 - 1)
        if self.judge is None:
            raise ConfigError("no judge given; type judge=openai judge.model=NAME")
        if Path(self.out).resolve() == Path(self.candidates).resolve():
            raise ConfigError(
                f"out={self.out}: are the candidates, which would be overwritten; name another file"
            )
        folder = Path(self.out).absolute().parent
        if not folder.is_dir() or Path(self.out).is_dir():
            raise ConfigError(
                f"out={self.out}: cannot be written there; name a file in a folder that exists"
            )

    def steps(self) -> list[Step]:
        stage = LabelStage(label=self.label, judge=self.judge, seed=self.seed)
        return [
            Step(name="candidates", stage="collect", settings=CollectStage(path=self.candidates)),
            Step(
                name="preferences",
                stage="label",
                settings=stage,
                inputs={"candidates": "candidates"},
                links={name: name for name in ("preferences.jsonl", "verdicts.jsonl")},
            ),
        ]


def command() -> int:
    """Runs the command line; returns the exit status."""
    composed(job, config="judge_cli")
    return 0


def job(tree: DictConfig) -> None:
    values = resolved(tree)
    if values["candidates"] is None:
        raise ConfigError("no candidates given; type candidates=FILE (.jsonl or .parquet)")
    settings: Labelling = build(Labelling, values, "")
    command = shlex.join(["python", "-m", "align.judge", *HydraConfig.get().overrides.task])
    if settings.dry_run:
        print(dry_run(settings, values, command))
        return
    done = run(settings, settings.steps(), values, command)
    export(done.made["preferences"].path / "preferences.jsonl", Path(settings.out))
    print(closing(settings, done))


def run(settings: Labelling, steps: list[Step], values: dict[str, Any], command: str) -> Done:
    """Brings the steps about."""
    how = Work(verify=settings.verify, retry=settings.retry, launch=HERE)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    given = {"workspace": settings.workspace, "name": settings.name, "text": text}
    return bring_about(steps, **given, command=command, how=how)


def export(source: Path, target: Path) -> None:
    """Copies a file so that its new place holds it whole or not at all."""
    partial = target.with_name(f".{target.name}.{fingerprint(str(target))[:8]}")
    shutil.copyfile(source, partial)
    partial.replace(target)


def closing(settings: Labelling, done: Done) -> str:
    """What came of it, and what to type next."""
    counts = done.made["preferences"].manifest["counts"]
    refused = done.made["candidates"].manifest["counts"]["refused"]
    without = {s: counts[s] for s in STATUSES if s not in (OK, TIE) and counts[s]}
    left_out = {name: counts[name] for name in ("empty", "duplicates") if counts[name]}
    lines = [
        f"{counts['preferences']:,} preferences from {counts['comparisons']:,} comparisons: "
        f"{settings.out}"
    ]
    if refused:
        folder = shortest(done.made["candidates"].path)
        lines.append(f"{refused:,} rows of {settings.candidates} left out: {folder}/refused.jsonl")
    if left_out:
        told = ", ".join(f"{n:,} {LEFT_OUT[name]}" for name, n in left_out.items())
        lines.append(f"answers compared with none: {told}")
    if without:
        told = ", ".join(f"{n:,} {status}" for status, n in without.items())
        lines.append(f"without a verdict, so no preference: {told}{again(counts)}")
    lines.append(f"verdicts: {shortest(done.run.path.with_name('latest'))}/verdicts.jsonl")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Payee:
    """A judge behind an endpoint; `escalated` if it is only asked where another's orders
    disagree.
    """

    judge: Openai
    escalated: bool = False


def payees(judge: Any, called: str) -> list[Payee]:
    """The judges behind endpoints that a judge consists of, in order.

    Args:
        called: what was typed to choose it, for the error.

    Raises:
        ConfigError: nobody can tell what one of them would send.
    """
    if isinstance(judge, Openai) and judge.module is None:
        other = judge.escalate
        others = payees(other, f"judge.escalate={other.name}") if other is not None else []
        return [Payee(judge=judge), *(replace(each, escalated=True) for each in others)]
    if isinstance(judge, Jury) and judge.module is None:
        seats = [(f"judge.members.{name}", judge.members[name]) for name in voters(judge)]
        return [each for key, member in seats for each in payees(member, f"{key}={member.name}")]
    if judge.module is not None or judge.name not in FREE:
        raise ConfigError(
            f"dry_run=true: what {called} takes cannot be estimated, for only judge=openai tells "
            "its requests beforehand; leave dry_run out, or type judge=openai"
        )
    return []


def dry_run(settings: Labelling, values: dict[str, Any], command: str) -> str:
    """What it would take, for each judge that is asked by requests.

    Raises:
        ConfigError: there is none, or one that cannot be estimated.
    """
    module = settings.judge.module
    called = f"judge={settings.judge.name}" if module is None else f"judge.module={module}"
    asked_judges = payees(settings.judge, called)
    if not asked_judges:
        raise ConfigError(f"dry_run=true: {called} sends no requests; it is free")
    from align.judge.estimate import estimate

    # The candidates are read and checked (that is free); nothing is asked.
    done = run(settings, settings.steps()[:1], values, command)
    rows = IndexedRecords(done.made["candidates"].path / "candidates.jsonl", Candidate.from_json)
    stage = LabelStage(label=settings.label, judge=settings.judge, seed=settings.seed)
    found = [(each, estimate(asked(stage, rows), settings=each.judge)) for each in asked_judges]
    if not found[0][1].comparisons:
        raise JudgeError(f"{settings.candidates}: no prompt has two different answers to compare")
    if len(found) == 1:
        return f"{told_estimate(asked_judges[0].judge, found[0][1])}\nnothing was sent"
    return "\n".join((*summed(found), "nothing was sent"))


def summed(found: "list[tuple[Payee, Estimate]]") -> list[str]:
    """The estimates of several judges, and of all together."""
    lines = [
        f"{each.judge.judge}{', if every pair comes to it' * each.escalated}: "
        f"{told_estimate(each.judge, its)}"
        for each, its in found
    ]
    cost = sum(its.cost for each, its in found if not each.escalated)
    worst = sum(its.worst for _, its in found)
    more = " and what is escalated" * any(each.escalated for each, _ in found)
    whole = f"all {len(found)}: about ${usd(cost):,.2f}{more}, at worst ${usd(worst):,.2f}"
    return [*lines, whole]


def told_estimate(judge: Openai, found: "Estimate") -> str:
    """An estimate as people read it."""
    price = found.price
    time = (
        f"about {told_time(found.seconds)}, at {found.latency:.1f} s a request ({found.basis}) "
        f"and {judge.concurrency} at a time"
    )
    if judge.batch:
        time = "within a day a batch"
    budget = judge.budget_usd
    if budget is not None and usd(found.cost) > budget:
        time += f"\nmore than judge.budget_usd={budget:g}, which would stop it before its end"
    return f"""\
{found.comparisons:,} comparisons, {found.requests:,} requests ({found.known:,} answered already)
about {found.tokens_in:,} tokens to read and {found.tokens_out:,} to write
about ${usd(found.cost):,.2f}, at worst ${usd(found.worst):,.2f} \
(${price.read:g} and ${price.written:g} per million tokens)
{time}"""
