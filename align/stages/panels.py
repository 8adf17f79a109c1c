"""The report's small training curves: which ones an algorithm has, and how they are drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from align.stages import plots
from align.stages.evidence import Evidence
from align.stages.plots import AFTER, BEFORE, WORSE, Line

Curves = Sequence[Mapping[str, float]]  # what was logged, by step


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What a panel shows: keys of curves.jsonl, each with its held-out `eval_` twin.

    Attributes:
        labels: of the lines, where there are two of them.
        moving: left out where it stands still throughout.
        band: the dotted setting that says between what it should stay.
    """

    name: str
    title: str
    keys: Sequence[str]
    told: str
    labels: Sequence[str] = ()
    percent: bool = False
    moving: bool = False
    band: str = ""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One training curve, drawn; `legend` are class and label of each line where there are
    several, `pair` says that they are of chosen and rejected.
    """

    title: str
    told: str
    svg: Markup
    legend: Sequence[tuple[str, str]] = field(default_factory=list)
    pair: bool = False


SIDES = ("chosen", "rejected")
LOSS = Shown(name="loss", title="Loss", keys=("loss",), told="what is minimised")
ACCURACY = Shown(
    name="accuracy", title="Accuracy", keys=("accuracy",), percent=True,
    told="pairs ranked as the judge ranks them; a tie counts half",
)  # fmt: skip
PAIRS = (
    LOSS,
    Shown(
        name="margin", title="Reward margin", keys=("reward_margin",),
        told="implicit reward of chosen minus rejected",
    ),
    ACCURACY,
    Shown(name="kl", title="KL", keys=("kl",), told="from the model it started from, nats"),
    Shown(
        name="logps", title="Log-probabilities", keys=("chosen_logps", "rejected_logps"),
        told="of whole answers, nats", labels=SIDES,
    ),
)  # fmt: skip
ONLINE = (
    Shown(name="reward", title="Reward", keys=("reward",), told="mean of an iteration's answers"),
    Shown(
        name="kl", title="KL", keys=("kl", "kl_k3"), labels=("k1", "k3"), band="algorithm.kl_band",
        told="from the reference, nats an answer, by two estimates",
    ),
    Shown(name="entropy", title="Entropy", keys=("entropy",), told="nats a token; 0: no choice"),
    Shown(
        name="clip", title="Clipped", keys=("clip_fraction",), percent=True,
        told="share whose probability moved beyond the clip range",
    ),
    Shown(
        name="explained", title="Explained variance", keys=("explained_variance",), moving=True,
        told="of the returns, by the value function; 1 is all",
    ),
    Shown(name="length", title="Length", keys=("length",), told="tokens an answer"),
    Shown(
        name="ended", title="Ended by themselves", keys=("eos_rate",), percent=True,
        told="share of the answers that were not cut off",
    ),
    Shown(
        name="taught", title="Rewarded", keys=("taught",), percent=True, moving=True,
        told="share of the answers that have a reward",
    ),
    Shown(
        name="alike", title="Nothing to compare", keys=("same_rewards",), percent=True, moving=True,
        told="share of the prompts whose answers all got one reward",
    ),
    Shown(
        name="beta", title="Beta", keys=("beta",), moving=True, told="penalty a nat of KL, steered"
    ),
)  # fmt: skip


def panels(evidence: Evidence) -> list[Panel]:
    """Small multiples of what was logged; a panel without a single value is left out."""
    by = "iteration" if evidence.online else "training step"
    kept = evidence.metrics.get("train/best_step")
    drawn = [
        panel(shown, evidence.curves, kept=kept, by=by, band=known_band(evidence, shown.band))
        for shown in (ONLINE if evidence.online else PAIRS)
    ]
    return [one for one in drawn if one is not None]


def panel(
    shown: Shown,
    curves: Curves,
    *,
    kept: float | None,
    by: str = "training step",
    band: tuple[float, ...] = (),
) -> Panel | None:
    """What it shows, drawn; None without a value. `by`: what a step is; `band`: where to stay."""
    several = len(shown.keys) > 1
    lines = []
    for i, key in enumerate(shown.keys):
        color = (AFTER if i == 0 else WORSE) if shown.labels == SIDES else (BEFORE, AFTER)[i]
        held_out = color if several else AFTER
        lines += line(curves, key, color=color)
        lines += line(curves, f"eval_{key}", color=held_out, dots=True)
    if not lines or (shown.moving and len({v for one in lines for v in one.values}) == 1):
        return None
    ends = "; ".join(f"from {one.values[0]:.3g} to {one.values[-1]:.3g}" for one in lines)
    svg = plots.curves(
        lines, name=f"curve-{shown.name}", label=f"{shown.title} by {by}: {ends}",
        percent=shown.percent, kept=kept, limits=band,
    )  # fmt: skip
    classes = ("after", "worse") if shown.labels == SIDES else ("before", "after")
    within = f"; asked to stay between {band[0]:g} and {band[1]:g}" if len(band) == 2 else ""
    return Panel(
        title=shown.title,
        told=shown.told + within,
        svg=Markup(svg),
        legend=list(zip(classes, shown.labels, strict=False)),
        pair=shown.labels == SIDES,
    )


def known_band(evidence: Evidence, setting: str) -> tuple[float, ...]:
    found = evidence.setting(setting) if setting else None
    if not isinstance(found, list) or len(found) != 2:
        return ()
    return tuple(float(end) for end in found if isinstance(end, int | float))


def line(curves: Curves, key: str, *, color: str, dots: bool = False) -> list[Line]:
    points = [(row["step"], row[key]) for row in curves if "step" in row and key in row]
    if not points:
        return []
    steps, values = zip(*points, strict=True)
    return [Line(color=color, steps=steps, values=values, dots=dots)]
