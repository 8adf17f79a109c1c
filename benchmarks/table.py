"""The table that benchmarks print: what was measured, on what, and whether the mark is met."""

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

HEADER = ("what", "measured", "mark", "met")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; `met` is None where there is no mark."""

    what: str
    measured: str
    mark: str = ""
    met: bool | None = None

    @property
    def cells(self) -> tuple[str, ...]:
        met = {None: "", True: "yes", False: "NO"}[self.met]
        return (self.what, self.measured, self.mark, met)


def machine(versions: str | None = None) -> str:
    """Date, hardware and versions in one line; by default those that matter to the judge."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor()
    if versions is None:
        import openai

        versions = f"openai {openai.__version__}, server on the same cores"
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} × {model}, Python "
        f"{platform.python_version()}, {versions}"
    )


def markdown(rows: list[Row], heading: str) -> str:
    lines = [HEADER, ("---",) * len(HEADER), *(row.cells for row in rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{heading}\n\n{table}\n"
