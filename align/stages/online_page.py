"""The report's sections on a policy that learnt from its own answers: what the reward made of them
and what the judge did, what was said, and what each phase took.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from align.algorithms.ppo.health import SURE, error_between, overoptimised
from align.rewards.settings import JUDGE, ROLE
from align.stages import plots
from align.stages.evidence import Evidence, Sampled
from align.stages.plots import AFTER, BEFORE, GRID, MUTED, WORSE
from align.stages.reward_page import sentence
from align.stages.verdict import number, percent

Line = Mapping[str, float]  # of curves.jsonl

MEASURED = "reward/held_out_accuracy_low"  # by the reward stage, with its kin
MOST_ITERATIONS = 4  # whose answers are shown
# By the name that timing.jsonl has: what it is called, and which tokens go through it.
PHASES = {
    "generate_s": ("Sampling answers", "answer_tokens"),
    "reward_s": ("Asking for rewards", "answer_tokens"),
    "score_s": ("Log-probabilities and values", "tokens"),
    "learn_s": ("Learning", "tokens"),
    "watch_s": ("Watching held-out prompts", None),
}


@dataclass(frozen=True, kw_only=True)
class Watched:
    """Held-out prompts as training went on: the finding in plain words, what to try where it is a
    bad one, and the curves.
    """

    sentence: str
    remedy: str
    svg: Markup
    reward: bool
    judge: bool


@dataclass(frozen=True, kw_only=True)
class Said:
    """The worst and the best answer of an iteration; one alone where only one was kept."""

    step: int
    answers: Sequence[tuple[str, Sampled]]


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Seconds over all iterations, their share, and tokens a second where that means something."""

    name: str
    seconds: float
    share: float
    speed: float | None


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """All that these sections show; `trust` is how far the run's own reward model ranks as the
    judge does, "" where there is none. `memory` in gigabytes.
    """

    source: str
    trust: str
    watched: Watched | None
    said: Sequence[Said]
    phases: Sequence[Phase]
    memory: float | None


def learnt(evidence: Evidence) -> Learnt:
    return Learnt(
        source=source(evidence),
        trust=sentence(evidence.metrics) if MEASURED in evidence.metrics else "",
        watched=watched(evidence),
        said=said(evidence),
        phases=phases(evidence),
        memory=memory(evidence),
    )


def source(evidence: Evidence) -> str:
    """Where rewards came from, in words."""
    asked = str(evidence.setting("algorithm.reward") or "")
    if asked == ROLE:
        return "the reward model of this run"
    if asked == JUDGE:
        return f"the judge {evidence.reward}"
    if ":" in asked:
        return f"the function {asked}"
    return f"the reward model {evidence.reward or asked}" if asked else evidence.reward


# Reward and judge.


def watched(evidence: Evidence) -> Watched | None:
    """None where no held-out prompt was watched, by neither."""
    lines = [line for line in evidence.curves if "step" in line]
    rewards = [line for line in lines if "eval_reward" in line]
    rates = [line for line in lines if {"eval_win_rate", "eval_judged"} <= line.keys()]
    if not rewards and not rates:
        return None
    best = overoptimised(lines)
    told, remedy = finding(rewards, rates, best=best)
    return Watched(
        sentence=told,
        remedy=remedy,
        svg=Markup(watched_figure(rewards, rates, best=best)),
        reward=bool(rewards),
        judge=bool(rates),
    )


def finding(rewards: Sequence[Line], rates: Sequence[Line], *, best: int | None) -> tuple[str, str]:
    """The sentence, and what to try or "".

    Args:
        rewards, rates: lines with eval_reward, and with eval_win_rate.
        best: the iteration of the best win rate, where the policy was over-optimised since.
    """
    reward = course([line["eval_reward"] for line in rewards], number)
    if not rates:
        return (
            f"The reward {reward}. No judge watched, so nothing tells whether the answers got "
            "better or only their reward.",
            "To have one watch: judge@evaluate.judge=NAME.",
        )
    rate = course([line["eval_win_rate"] for line in rates], percent)
    if best is not None:
        top = next(line["eval_win_rate"] for line in rates if line["step"] == best)
        return (
            f"The reward went on rising while the judge's win rate fell since iteration {best}, "
            f"from {percent(top)} to {percent(rates[-1]['eval_win_rate'])}: the answers came to "
            "please the reward more than the judge (over-optimisation).",
            f"To try: end there (algorithm.iterations={best}), a larger algorithm.beta, or a "
            "reward model that is also trained on answers of the new policy.",
        )
    moved = rates[-1]["eval_win_rate"] - rates[0]["eval_win_rate"]
    sure = abs(moved) > SURE * error_between(rates[0], rates[-1])
    chance = "" if sure or moved == 0 else ", which chance alone can do"
    if not rewards:
        return f"The judge's win rate {rate}{chance}.", ""
    if reward.startswith("rose") and rate.startswith("rose") and sure:
        return f"Both rose: the reward {reward[5:]}, the judge's win rate {rate[5:]}.", ""
    return f"The reward {reward}; the judge's win rate {rate}{chance}.", ""


def course(values: Sequence[float], told: Callable[[float], str]) -> str:
    """Example: `rose from 0.1 to 0.3`; "" of nothing."""
    if not values:
        return ""
    first, last = told(values[0]), told(values[-1])
    if first == last:
        return f"stayed at {last}"
    return f"{'rose' if values[-1] > values[0] else 'fell'} from {first} to {last}"


def watched_figure(rewards: Sequence[Line], rates: Sequence[Line], *, best: int | None) -> str:
    """The reward above, the judge's win rate below, over the same iterations."""
    shown = [lines for lines in (rewards, rates) if lines]
    figure = plots.canvas(400, 40 + 130 * len(shown))
    steps = [line["step"] for lines in shown for line in lines]
    margin = max(0.5, (max(steps) - min(steps)) / 40)
    for place, lines in enumerate(shown):
        under = len(shown) - 1 - place
        ax = plots.axes(figure, left=48, right=14, top=16 + 130 * place, bottom=38 + 130 * under)
        curve(ax, lines, best=best, rate=lines is rates)
        ax.set_xlim(min(steps) - margin, max(steps) + margin)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
        if under:
            ax.tick_params(labelbottom=False)
        else:
            ax.set_xlabel("iteration", color=MUTED, fontsize=11.5, labelpad=4)
    told, _ = finding(rewards, rates, best=best)
    return plots.finish(figure, name="watched", label=f"Held-out prompts by iteration: {told}")


def curve(ax: Axes, lines: Sequence[Line], *, best: int | None, rate: bool) -> None:
    """Of one of the two; the win rate with its standard errors, and what it lost in red."""
    x = [line["step"] for line in lines]
    y = [line["eval_win_rate" if rate else "eval_reward"] for line in lines]
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.yaxis.set_major_locator(MaxNLocator(4))
    if best is not None:
        ax.axvline(best, color=MUTED, linewidth=0.9, dashes=(2, 2))
    if rate:
        ax.axhline(0.5, color=MUTED, linewidth=0.9)
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        error = [error_between(line, line) / 2**0.5 for line in lines]  # of one rate alone
        low = [value - one for value, one in zip(y, error, strict=True)]
        high = [value + one for value, one in zip(y, error, strict=True)]
        ax.fill_between(x, low, high, color=AFTER, alpha=0.14, linewidth=0)
    style: dict[str, Any] = {"linewidth": 1.6, "marker": "o", "markersize": 4, "zorder": 3}
    ax.plot(x, y, color=AFTER if rate else BEFORE, markeredgewidth=0, **style)
    if rate and best is not None:
        lost = x.index(best)
        ax.plot(x[lost:], y[lost:], color=WORSE, markeredgewidth=0, **style)


# What was said.


def said(evidence: Evidence) -> list[Said]:
    """The first iteration, the last, and some between, as far apart as they go."""
    by_step = [(step, list(few)) for step, few in groupby(evidence.sampled, lambda one: one.step)]
    most = min(MOST_ITERATIONS, len(by_step))
    places = [round(i * (len(by_step) - 1) / max(1, most - 1)) for i in range(most)]
    return [Said(step=by_step[i][0], answers=ends(by_step[i][1])) for i in places]


def ends(few: Sequence[Sampled]) -> list[tuple[str, Sampled]]:
    """The lowest and the highest reward; answers without one come last into question."""
    known = [one for one in few if one.reward is not None] or list(few)
    ranked = sorted(known, key=lambda one: one.reward or 0.0)
    if len(ranked) == 1:
        return [("Kept", ranked[0])]
    return [("Lowest reward kept", ranked[0]), ("Highest", ranked[-1])]


# What it took.


def phases(evidence: Evidence) -> list[Phase]:
    """In the order of the work; [] where no clock was kept."""
    total: dict[str, float] = {}
    for line in evidence.timing:
        for key, value in line.items():
            total[key] = total.get(key, 0.0) + value
    known = sum(total.get(key, 0.0) for key in PHASES)
    if "iteration_s" in total and "learn_s" not in total:  # all else of an iteration is learning
        total["learn_s"] = max(0.0, total["iteration_s"] - known)
        known += total["learn_s"]
    return [
        Phase(
            name=name,
            seconds=total[key],
            share=total[key] / known,
            speed=total[tokens] / total[key] if tokens in total else None,
        )
        for key, (name, tokens) in PHASES.items()
        if total.get(key)
    ]


def memory(evidence: Evidence) -> float | None:
    """The most that was held at a time, in gigabytes."""
    held = [line["memory_mb"] for line in evidence.timing if "memory_mb" in line]
    return max(held) * 2**20 / 1e9 if held else None
