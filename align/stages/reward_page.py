"""The page that says how far a reward model can be trusted."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator, PercentFormatter

from align import ranking
from align.artifacts import read_json
from align.jsonl import read_lines
from align.stages import plots
from align.stages.page import environment, style
from align.stages.panels import ACCURACY, LOSS, SIDES, Shown, panel
from align.stages.plots import AFTER, BEFORE, GRID, MUTED, WORSE
from align.stages.verdict import bounds, percent
from align.stats import Interval

PANELS = (
    LOSS,
    ACCURACY,
    Shown(
        name="margin", title="Difference", keys=("reward_margin",),
        told="score of chosen minus rejected",
    ),
    Shown(
        name="scores", title="Scores", keys=("chosen_reward", "rejected_reward"),
        told="raw, of both answers", labels=SIDES,
    ),
)  # fmt: skip
BINS = 24


def page(out: Path, *, base: str) -> str:
    """The whole page, self-contained, from what the stage wrote in `out`.

    Args:
        base: what the base model is called.
    """
    metrics = read_json(out / "metrics.json")
    pairs = [line for _, line in read_lines(out / "held_out.jsonl")]
    curves = [json.loads(line) for line in (out / "curves.jsonl").read_text().splitlines()]
    kept = metrics["reward/best_step"]
    drawn = [panel(shown, curves, kept=kept) for shown in PANELS]
    return (
        environment()
        .get_template("reward.html.j2")
        .render(
            css=style(),
            base=base,
            metrics=metrics,
            accuracy=accuracy(metrics),
            sentence=sentence(metrics),
            reference=read_json(out / "adapter" / "reward.json"),
            calibration=Markup(calibration_figure(pairs)),
            histogram=Markup(score_figure(pairs)),
            lengths=Markup(length_figure(pairs)),
            panels=[one for one in drawn if one is not None],
        )
    )


def accuracy(metrics: Mapping[str, float]) -> Interval:
    value, low, high = (metrics[f"reward/held_out_accuracy{end}"] for end in ("", "_low", "_high"))
    return Interval(mean=value, low=low, high=high, n=int(metrics["reward/held_out_prompts"]))


def sentence(metrics: Mapping[str, float]) -> str:
    """The finding in plain words."""
    found = accuracy(metrics)
    told = f"{percent(found.mean)} ({bounds(found)}) of {metrics['reward/held_out_pairs']:,.0f}"
    if found.high < 0.5:
        return (
            f"The reward model ranks pairs the wrong way round more often than not: {told} "
            "held-out pairs as the judge does. Check whether chosen and rejected are swapped."
        )
    if found.low <= 0.5:
        return (
            f"The reward model cannot be told from chance: it ranks {told} held-out pairs as the "
            "judge does, and that interval includes 50%."
        )
    return f"The reward model ranks {told} held-out pairs as the judge does."


def differences(pairs: Sequence[Mapping[str, Any]]) -> Any:
    return np.array([pair["score_chosen"] - pair["score_rejected"] for pair in pairs])


def calibration_figure(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Each bin's confidence against what the judge says; a dot's area is the bin's share of the
    pairs.
    """
    found = ranking.calibration(differences(pairs), [pair["p"] for pair in pairs])
    figure = plots.canvas(400, 260)
    ax = plots.axes(figure, left=44, right=16, top=10, bottom=44)
    ax.plot([0.5, 1], [0.5, 1], color=MUTED, linewidth=0.9, dashes=(2, 2))
    x, y = [one.predicted for one in found.bins], [one.judged for one in found.bins]
    ax.plot(x, y, color=AFTER, linewidth=1.4, alpha=0.6)
    sizes = [20 + 380 * one.n / len(pairs) for one in found.bins]
    ax.scatter(x, y, s=sizes, color=AFTER, linewidths=0, alpha=0.85)
    ax.set(xlim=(0.48, 1.02), ylim=(min(0.45, *y) - 0.02, 1.04))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.set_major_locator(MaxNLocator(5))
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_xlabel("the model's confidence", color=MUTED, fontsize=11.5, labelpad=6)
    told = "; ".join(
        f"{b.predicted:.0%} sure, {b.judged:.0%} right, {b.n} pairs" for b in found.bins
    )
    return plots.finish(figure, name="calibration", label=f"Calibration: {told}")


def score_figure(pairs: Sequence[Mapping[str, Any]]) -> str:
    """How the raw scores of chosen and rejected answers are spread."""
    chosen, rejected = (
        np.array([pair[f"score_{side}"] for pair in pairs]) for side in ("chosen", "rejected")
    )
    figure = plots.canvas(400, 220)
    ax = plots.axes(figure, left=36, right=8, top=10, bottom=44)
    both = np.concatenate([chosen, rejected])
    low, high = float(both.min()), float(both.max())
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    for values, color, fill in ((rejected, WORSE, 0.2), (chosen, AFTER, 0.2)):
        heights = np.histogram(values, bins=edges)[0]
        ax.stairs(heights, edges, fill=True, color=color, alpha=fill, linewidth=0)
        ax.stairs(heights, edges, color=color, linewidth=1.8)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.set_xlabel("raw score of an answer", color=MUTED, fontsize=11.5, labelpad=6)
    told = (
        f"median {np.median(chosen):.3g} of chosen, {np.median(rejected):.3g} of rejected answers"
    )
    return plots.finish(figure, name="scores", label=f"Distribution of scores: {told}")


def length_figure(pairs: Sequence[Mapping[str, Any]]) -> str:
    """Each pair in both orders: how much longer an answer is, and how much higher it is scored."""
    d = differences(pairs)
    longer = np.array([pair["length_chosen"] - pair["length_rejected"] for pair in pairs])
    figure = plots.canvas(400, 240)
    ax = plots.axes(figure, left=44, right=8, top=10, bottom=44)
    ax.axhline(0, color=MUTED, linewidth=0.9)
    ax.axvline(0, color=MUTED, linewidth=0.9)
    x, y = np.concatenate([longer, -longer]), np.concatenate([d, -d])
    kept = np.random.default_rng(0).permutation(len(x))[: plots.MOST_POINTS]
    ax.scatter(x[kept], y[kept], s=11, color=BEFORE, linewidths=0, alpha=0.6)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel("tokens by which an answer is longer", color=MUTED, fontsize=11.5, labelpad=6)
    told = ranking.length_correlation(d, longer)
    return plots.finish(
        figure, name="lengths", label=f"Score and length: rank correlation {told:.2f}"
    )
