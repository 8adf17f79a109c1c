"""What all pages share: their templates' environment, their style, and text that can do no harm."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from align.stages.verdict import bounds, number, percent
from align.unseen import UNSEEN

HERE = Path(__file__).parent


def environment() -> Environment:
    """Escapes everything; an undefined name is an error."""
    templates = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {
        "percent": percent, "number": number, "bounds": bounds, "visible": visible,
    }  # fmt: skip
    return templates


def style() -> Markup:
    """The style sheet, to be put into a page, which then needs nothing else."""
    return Markup((HERE / "report.css").read_text(encoding="utf-8"))


def visible(text: str) -> Markup:
    """Escaped text in which characters that hide or reorder others stand as code points."""
    parts = []
    position = 0
    for match in UNSEEN.finditer(text):
        parts += [escape(text[position : match.start()]), code_point(match[0])]
        position = match.end()
    return Markup().join([*parts, escape(text[position:])])


def code_point(character: str) -> Markup:
    return Markup('<span class="unseen">U+{:04X}</span>').format(ord(character))
