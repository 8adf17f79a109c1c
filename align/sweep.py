"""The table at the end of a sweep: one row a run, what it was told and what came of it."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from align.pipeline import Outcome

COLUMNS = {
    "win rate": "evaluate/win_rate",
    "low": "evaluate/win_rate_low",
    "high": "evaluate/win_rate_high",
    "correct": "evaluate/correct_after",
    "held-out accuracy": "evaluate/held_out_accuracy",
    "KL": "evaluate/kl",
    "length": "evaluate/length_after",
}


def comparison_table(outcomes: Sequence[Outcome]) -> str:
    """A text table of the runs in the order in which they ran; columns that no run has are left
    out.
    """
    shown = {
        title: key for title, key in COLUMNS.items() if any(key in o.metrics for o in outcomes)
    }
    table = Table("run", *shown, "folder", title="the runs compared")
    common = set.intersection(*(set(outcome.overrides) for outcome in outcomes))
    for outcome in outcomes:
        own = " ".join(o for o in outcome.overrides if o not in common)
        cells = [
            f"{outcome.metrics[key]:.3f}" if key in outcome.metrics else ""
            for key in shown.values()
        ]
        # Text, not markup: an override or an error may hold brackets.
        table.add_row(Text(own), *cells, Text(outcome.error or str(outcome.folder)))
    console = Console(width=160)
    with console.capture() as text:
        console.print(table)
    return text.get()
