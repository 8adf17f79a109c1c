"""The report's figures: numbers in, one SVG text each, coloured by the page's style sheet.

matplotlib draws with placeholder colours; `finish` maps them onto CSS variables, so that one
drawing serves light and dark, and leaves text as text in the page's own font. The same numbers give
the same bytes.
"""

import io
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter
from matplotlib.transforms import blended_transform_factory

from align.stats import Floats, Interval

INK, MUTED, GRID, AFTER, BEFORE, WORSE = (f"#0000{i:02x}" for i in range(1, 7))
VARIABLES = {
    INK: "ink",
    MUTED: "muted",
    GRID: "grid",
    AFTER: "after",
    BEFORE: "before",
    WORSE: "worse",
}
POINTS = 72.0  # units of an SVG per inch of matplotlib
SETTINGS: dict[Any, Any] = {"svg.hashsalt": "align", "svg.fonttype": "none"}
SVG = "{http://www.w3.org/2000/svg}"
LINK = "{http://www.w3.org/1999/xlink}href"
MOST_POINTS = 400  # of one curve; more cannot be told apart on paper


@dataclass(frozen=True, kw_only=True)
class Rate:
    """One row of the win rates; `measured` is False where no interval is known."""

    label: str
    interval: Interval
    measured: bool = True
    criterion: bool = False


@dataclass(frozen=True, kw_only=True)
class Change:
    """A criterion's mean mark before and after, 0 to 1."""

    label: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve: a colour placeholder, and its points as a thin line or as a line with dots."""

    color: str
    steps: Sequence[float]
    values: Sequence[float]
    dots: bool = False


def canvas(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width / POINTS, height / POINTS), dpi=POINTS, facecolor="none")
    FigureCanvasSVG(figure)
    return figure


def axes(figure: Figure, *, left: float, right: float, top: float, bottom: float) -> Axes:
    """Axes with margins in SVG units: the page's font is unknown, so nothing is fitted to text."""
    width, height = (float(side) * POINTS for side in figure.get_size_inches())
    box = (
        left / width,
        bottom / height,
        (width - left - right) / width,
        (height - top - bottom) / height,
    )
    ax = figure.add_axes(box, facecolor="none")
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color(MUTED)
    ax.spines["bottom"].set_linewidth(0.8)
    ax.tick_params(colors=MUTED, labelcolor=MUTED, length=0, pad=5, labelsize=11.5)
    ax.set_axisbelow(True)
    return ax


def win_rates(rows: Sequence[Rate]) -> str:
    """A row each: a bar from even (50%) to the rate, its interval, and the number at the right."""
    row_height, head, foot = 29.0, 6.0, 26.0
    figure = canvas(400, row_height * len(rows) + head + foot)
    ax = axes(figure, left=136, right=62, top=head, bottom=foot)
    span = (len(rows) - 0.5, -0.5)
    for x in (0, 0.25, 0.75, 1):
        ax.plot([x, x], span, color=GRID, linewidth=0.8)
    ax.plot([0.5, 0.5], span, color=MUTED, linewidth=1.2)
    for y, row in enumerate(rows):
        _rate(figure, ax, y, row)
    ax.set(xlim=(-0.02, 1.02), ylim=span, xticks=[0, 0.25, 0.5, 0.75, 1], yticks=[])
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.spines["bottom"].set_visible(False)
    told = "; ".join(f"{row.label} {row.interval.mean:.1%}" for row in rows)
    return finish(figure, name="rates", label=f"Win rates of the tuned model, 50% is even: {told}")


def _rate(figure: Figure, ax: Axes, y: int, row: Rate) -> None:
    rate = row.interval
    sure = row.measured and not rate.low <= 0.5 <= rate.high
    color = MUTED if not sure else AFTER if rate.mean > 0.5 else WORSE
    ax.barh(y, rate.mean - 0.5, left=0.5, height=0.46, color=color, alpha=0.22, linewidth=0)
    if row.measured:
        ax.plot([rate.low, rate.high], [y, y], color=color, linewidth=2.2, solid_capstyle="butt")
    ax.plot([rate.mean], [y], marker="o", markersize=6.5, color=color, markeredgewidth=0)
    beside(figure, ax, y, left=row.label, right=f"{rate.mean:.1%}")


def beside(figure: Figure, ax: Axes, y: int, *, left: str, right: str) -> None:
    """A row's name and number, flush with the figure's edges."""
    place = blended_transform_factory(figure.transFigure, ax.transData)
    style: dict[str, Any] = {
        "transform": place,
        "va": "center_baseline",
        "parse_math": False,
        "fontsize": 12.5,
    }
    ax.text(0, y, clip(left), ha="left", color=INK, **style)
    ax.text(1, y, right, ha="right", color=INK, **style)


def marks(rows: Sequence[Change]) -> str:
    """A row a criterion: from the mean mark before (hollow) to the one after (solid)."""
    row_height, head, foot = 29.0, 6.0, 26.0
    figure = canvas(400, row_height * len(rows) + head + foot)
    ax = axes(figure, left=136, right=104, top=head, bottom=foot)
    span = (len(rows) - 0.5, -0.5)
    for x in (0, 0.25, 0.5, 0.75, 1):
        ax.plot([x, x], span, color=GRID, linewidth=0.8)
    for y, row in enumerate(rows):
        color = WORSE if row.after < row.before else AFTER
        ax.plot([row.before, row.after], [y, y], color=color, linewidth=2.2, alpha=0.45)
        ax.plot([row.before], [y], marker="o", markersize=6.5, color=BEFORE, markeredgewidth=0)
        ax.plot([row.after], [y], marker="o", markersize=7.5, color=color, markeredgewidth=0)
        beside(figure, ax, y, left=row.label, right=f"{row.before:.0%} → {row.after:.0%}")
    ax.set(xlim=(-0.03, 1.03), ylim=span, xticks=[0, 0.5, 1], yticks=[])
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.spines["bottom"].set_visible(False)
    told = "; ".join(f"{row.label} from {row.before:.0%} to {row.after:.0%}" for row in rows)
    return finish(figure, name="marks", label=f"Mean marks before and after: {told}")


def curves(
    lines: Sequence[Line],
    *,
    name: str,
    label: str,
    percent: bool,
    kept: float | None,
    limits: Sequence[float] = (),
) -> str:
    """One small panel over training steps; `kept` marks the step whose adapter was kept, `limits`
    are lines that it should not cross, drawn where a curve comes near.
    """
    figure = canvas(300, 180)
    ax = axes(figure, left=44, right=12, top=20, bottom=28)
    for line in lines:
        stride = max(1, -(-len(line.steps) // MOST_POINTS))
        steps, values = line.steps[::stride], line.values[::stride]
        if line.dots or len(steps) == 1:
            ax.plot(
                steps,
                values,
                color=line.color,
                linewidth=1.6,
                marker="o",
                markersize=4,
                markeredgewidth=0,
            )
        else:
            ax.plot(steps, values, color=line.color, linewidth=1.1, alpha=0.6)
    low, high = ax.get_ylim()
    for limit in (end for end in limits if 0 < end < high + (high - low) / 2):
        ax.axhline(limit, color=MUTED, linewidth=0.9, dashes=(2, 2))
        low, high = min(low, limit), max(high, limit)
    if percent:
        high = max(high, low + 0.01)  # what moves less, hardly moves
        decimals = 0 if high - low > 0.1 else 1
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=decimals))
        low, high = max(low, -0.02), min(high, 1.02)
    ax.set_ylim(low, high)
    if kept is not None:
        ax.axvline(kept, color=MUTED, linewidth=0.9, dashes=(2, 2))
        place, side = (ax.get_xaxis_transform(), ax.get_xlim())
        late = kept > (side[0] + side[1]) / 2
        ax.text(
            kept,
            1.03,
            "kept",
            transform=place,
            ha="right" if late else "left",
            color=MUTED,
            fontsize=10.5,
        )
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    return finish(figure, name=name, label=label)


def histograms(before: Sequence[float], after: Sequence[float], *, name: str, unit: str) -> str:
    """Both distributions over the same bins; the last one counts all beyond the 99th percentile."""
    figure = canvas(400, 200)
    ax = axes(figure, left=36, right=8, top=10, bottom=44)
    old, new = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    edges = bin_edges(np.concatenate([old, new]))
    for values, color, fill in ((old, BEFORE, 0.5), (new, AFTER, 0.14)):
        heights = np.histogram(np.clip(values, edges[0], edges[-1]), bins=edges)[0]
        ax.stairs(heights, edges, fill=True, color=color, alpha=fill, linewidth=0)
        ax.stairs(heights, edges, color=color, linewidth=1.8)
    ax.grid(axis="y", color=GRID, linewidth=0.8)
    margin = (edges[-1] - edges[0]) / 60
    ax.set_xlim(edges[0] - margin, edges[-1] + margin)
    ax.set_ylim(bottom=0)
    ax.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    beyond = int((np.concatenate([old, new]) > edges[-1]).sum())
    more = f" (the last bar holds {beyond} beyond it)" if beyond else ""
    ax.set_xlabel(unit + more, color=MUTED, fontsize=11.5, labelpad=6)
    told = f"median {np.median(old):.4g} before, {np.median(new):.4g} after"
    return finish(figure, name=name, label=f"Distribution of {unit}: {told}")


def bin_edges(values: Floats) -> Floats:
    """Some thirty bins of a whole width around whole numbers; finer ones for close values."""
    low, high = float(values.min()), float(np.quantile(values, 0.99, method="higher"))
    width = max(1.0, float(np.ceil((high - low) / 30)))
    if high - low < 2 and np.any(values % 1):
        width = max((high - low) / 12, 1e-3)
        return np.arange(low - width / 2, high + width, width)
    start = float(np.floor(low)) - 0.5
    return np.arange(start, high + width + 0.5, width)


def clip(text: str, most: int = 20) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def finish(figure: Figure, *, name: str, label: str) -> str:
    """The figure as inline SVG: CSS variables, the page's font, own ids, an accessible name."""
    raw = io.StringIO()
    with mpl.rc_context(SETTINGS):
        figure.savefig(
            raw,
            format="svg",
            metadata={"Date": None, "Creator": None, "Type": None, "Format": None},
        )
    root = ElementTree.fromstring(raw.getvalue())
    strip(root)
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        element.attrib.update(renamed(element.attrib, name))
        element.attrib.pop(LINK, None)
    width, height = root.attrib.pop("width")[:-2], root.attrib.pop("height")[:-2]
    root.attrib |= {
        "viewBox": f"0 0 {width} {height}",
        "role": "img",
        "aria-label": label,
        "class": f"figure {name}",
    }
    return ElementTree.tostring(root, encoding="unicode")


def strip(root: ElementTree.Element) -> None:
    """Removes metadata and matplotlib's own style element, which would reach the whole page."""
    for child in list(root):
        if child.tag == f"{SVG}metadata" or child.find(f"{SVG}style") is not None:
            root.remove(child)


def renamed(attributes: Mapping[str, str], name: str) -> dict[str, str]:
    """An element's changed attributes: prefixed ids and links, styles without font and colour."""
    changed = {}
    if "id" in attributes:
        changed["id"] = f"{name}-{attributes['id']}"
    if LINK in attributes:
        changed["href"] = f"#{name}-{attributes[LINK].removeprefix('#')}"
    if "clip-path" in attributes:
        changed["clip-path"] = attributes["clip-path"].replace("url(#", f"url(#{name}-")
    if "style" in attributes:
        style = re.sub(r"font-family:[^;]*;? ?", "", attributes["style"])
        style = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", style)
        changed["style"] = re.sub(
            r"#[0-9a-f]{6}", lambda m: f"var(--{VARIABLES.get(m[0], 'ink')})", style
        )
    return changed
