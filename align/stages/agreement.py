"""From rows to a report: the page that says how far a judge agrees with people.

`judged_pairs` reads the rows, `against_people` measures; both are offered here.
"""

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from align.agreement import Agreement
from align.artifacts import write_atomic
from align.stages import plots
from align.stages.against_people import USABLE, AgreementReport, measure
from align.stages.judged_pairs import (
    Columns,
    JudgedPair,
    decode_label,
    join,
    read_pairs,
    verdicts_from_labels,
    with_verdicts,
)
from align.stages.page import environment, style
from align.stages.verdict import bounds, percent
from align.stats import Interval

__all__ = [
    "AgreementReport",
    "Columns",
    "JudgedPair",
    "decode_label",
    "join",
    "measure",
    "read_pairs",
    "verdicts_from_labels",
    "with_verdicts",
    "write_report",
]

HERE = Path(__file__).parent
MOST_DIFFERING = 40  # pairs on the page; the JSON file has all
LONG_TEXT, MOST_TEXT = 700, 20_000  # characters shown at once, and after a click


def write_report(report: AgreementReport, out: Path) -> None:
    """Writes agreement.json, with everything, and agreement.html, one page that stands alone."""
    out.mkdir(parents=True, exist_ok=True)
    # ASCII: a lone surrogate in a text cannot be written as UTF-8.
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=True, allow_nan=False)
    write_atomic(out / "agreement.json", text + "\n")
    write_atomic(out / "agreement.html", page(report))


def page(report: AgreementReport) -> str:
    """The whole page, self-contained."""
    templates = environment()
    templates.filters |= {"kappa": kappa, "kappas": kappas}
    return templates.get_template("agreement.html.j2").render(
        css=style(),
        report=report,
        sentence=sentence(report),
        lost={name: n for name, n in sorted(report.statuses.items()) if name not in USABLE},
        looks=report.position is not None,
        apart=people_apart(report),
        figure=Markup(kappa_figure(report)),
        pairs=report.differing[:MOST_DIFFERING],
        cut=LONG_TEXT,
        most=MOST_TEXT,
    )


def kappa(value: float) -> str:
    """As papers write it: ".59", "−.05", "1.00"."""
    return re.sub(r"\b0\.", ".", f"{value:.2f}".replace("-0.00", "0.00")).replace("-", "−")


def kappas(interval: Interval) -> str:
    return f"{kappa(interval.low)} to {kappa(interval.high)}"


def sentence(report: AgreementReport) -> str:
    """The finding in plain words: against one column in full, against several as a range."""
    known = [row for row in report.against if row.one_order is not None]
    if not known:
        return f"{report.judge} was not measured: no pair has both its verdict and a human label."
    order = " in one order" if report.position else ""
    if len(report.against) > 1:
        found = [row.one_order for row in known if row.one_order is not None]
        told = (
            f"{report.judge} agrees with {len(known)} columns of human labels on "
            f"{_span(found)}{order}"
        )
        people = [row.agreement for row in report.between if row.agreement is not None]
        return f"{told}; people agree with each other on {_span(people)}." if people else f"{told}."
    (row,) = known
    assert row.one_order is not None
    told = (
        f"{report.judge} agrees with the human labels on {percent(row.one_order.agreement.mean)} "
        f"({bounds(row.one_order.agreement)}) of {row.one_order.n:,} pairs{order} "
        f"({_kappa(row.one_order)})"
    )
    if report.position is None:
        return f"{told}."
    told += f". It decides {percent(report.position.consistent.mean)} of pairs alike in both orders"
    if row.both_alike is None:
        return f"{told}."
    return (
        f"{told}, and agrees on {percent(row.both_alike.agreement.mean)} of those "
        f"({_kappa(row.both_alike)})."
    )


def _kappa(found: Agreement) -> str:
    return "κ not defined" if found.kappa is None else f"κ {kappa(found.kappa.mean)}"


def _span(found: Sequence[Agreement]) -> str:
    """ "62.0–64.5% of 974 pairs (κ .38–.41)", or a single number where the ends are equal."""
    rates = sorted(row.agreement.mean for row in found)
    counts = sorted({row.n for row in found})
    known = sorted(row.kappa.mean for row in found if row.kappa is not None)
    ends = list(dict.fromkeys(kappa(value) for value in (known[:1] + known[-1:])))
    told = f" (κ {' to '.join(ends)})" if known else ""
    share = "–".join(dict.fromkeys(f"{100 * rate:.1f}" for rate in (rates[0], rates[-1])))
    n = "–".join(dict.fromkeys(f"{count:,}" for count in (counts[0], counts[-1])))
    return f"{share}% of {n} pairs{told}"


def people_apart(report: AgreementReport) -> bool:
    """The intervals of people's kappas with each other all lie above those of the judge's."""
    judge = [row.one_order.kappa for row in report.against if row.one_order]
    people = [pair.agreement.kappa for pair in report.between if pair.agreement]
    tops, bottoms = [k.high for k in judge if k], [k.low for k in people if k]
    return bool(tops and bottoms) and max(tops) < min(bottoms)


def kappa_figure(report: AgreementReport) -> str:
    """A row each: kappa with its interval, of the judge with each column and of people among each
    other; nothing where no kappa is defined.
    """
    rows: list[tuple[str, Interval, str]] = []
    for row in report.against:
        one, both = (", one order", ", both orders") if report.position else ("", "")
        for name, found in ((one, row.one_order), (both, row.both_alike)):
            if found is not None and found.kappa is not None:
                rows.append((f"{_short(row.column, 12)}{name}", found.kappa, plots.AFTER))
    for pair in report.between:
        if pair.agreement is not None and pair.agreement.kappa is not None:
            label = " – ".join(_short(name, 11) for name in pair.columns)
            rows.append((label, pair.agreement.kappa, plots.BEFORE))
    if not rows:
        return ""
    figure = plots.canvas(400, 29.0 * len(rows) + 32)
    ax = plots.axes(figure, left=172, right=44, top=6, bottom=26)
    low = min(0.0, *(interval.low for _, interval, _ in rows))
    span = (len(rows) - 0.5, -0.5)
    for x in (0, 0.25, 0.5, 0.75, 1):
        color = plots.MUTED if x == 0 else plots.GRID
        ax.plot([x, x], span, color=color, linewidth=1.2 if x == 0 else 0.8)
    for y, (label, interval, color) in enumerate(rows):
        ax.plot([interval.low, interval.high], [y, y], color=color, linewidth=2.2)
        ax.plot([interval.mean], [y], marker="o", markersize=7, color=color, markeredgewidth=0)
        style: dict[str, Any] = {"va": "center_baseline", "parse_math": False, "fontsize": 12.5}
        place = ax.get_yaxis_transform()
        ax.text(-172 / 184, y, label, transform=place, color=plots.INK, **style)
        ax.text(1 + 44 / 184, y, kappa(interval.mean), transform=place, color=plots.INK,
                ha="right", **style)  # fmt: skip
    ax.set(xlim=(low - 0.02, 1.02), ylim=span, xticks=[0, 0.5, 1], yticks=[])
    ax.set_xticklabels(["0", ".5", "1"])
    ax.spines["bottom"].set_visible(False)
    told = "; ".join(f"{label} {kappa(interval.mean)}" for label, interval, _ in rows)
    with warnings.catch_warnings():
        # A script that matplotlib's font lacks; the page's own font draws it.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        return plots.finish(figure, name="kappa", label=f"Cohen's kappa with 95% intervals: {told}")


def _short(name: str, most: int) -> str:
    """A column's name for a figure: what XML cannot hold, or would not show, as a dot."""
    return plots.clip("".join(c if c.isprintable() else "·" for c in name), most)
