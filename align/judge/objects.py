"""The JSON objects that an answer gives, told from those that it only quotes.

Where one brace cannot be read, nothing behind it is sure: a judge that forgets to escape a quote
would otherwise be taken at the word of the very text that it quotes.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from align.judge.forms import LISTWISE, Form
from align.judge.spoken import LONGEST_LINE, Found, ranked, undressed, value_of

MOST_OBJECTS = 100
MOST_KEYS = 100  # what names its verdict more often says nothing
FENCE = "```"
FENCED = re.compile(r"[^\S\n]{0,20}\w{0,20}\s{0,20}(?=\{)")  # between a fence and its object
OPENED = re.compile(r"\{\s{0,20}[\"']")
VALUE = re.compile(
    r'[\s\\]{0,20}(?:"(?P<double>[^"\n]*)"|\'(?P<single>[^\'\n]*)\'|(?P<list>\[[^\]\n]*\])'
    r"|(?P<bare>[^\n,;]*))"
)


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """An object and where it stands in the text."""

    body: Mapping[str, Any]
    start: int
    end: int


def parsed(text: str, *, cut: bool) -> list[Parsed]:
    """The objects up to the first brace that opens none, and the last one where that is surely the
    answer: alone in a fence that ends the text, behind braces that are closed.

    Args:
        cut: the text broke off.
    """
    found: list[Parsed] = []
    start = text.find("{")
    while start >= 0 and len(found) < MOST_OBJECTS:
        each = object_at(text, start)
        if each is None:
            last = None if cut else fenced_last(text)
            return found if last is None or last.start <= start else [*found, last]
        found.append(each)
        start = text.find("{", each.end)
    return found


def object_at(text: str, start: int) -> Parsed | None:
    decoder = json.JSONDecoder(object_pairs_hook=unambiguous)
    try:
        body, end = decoder.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return Parsed(body=body, start=start, end=end)


def unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; one that says a name twice says nothing."""
    body = dict(pairs)
    return body if len(body) == len(pairs) else {}


def fenced_last(text: str) -> Parsed | None:
    """The object that fills the fence at the text's end; None behind a fence or a brace that is
    still open, for then it may be quoted.
    """
    whole = text.rstrip()
    if not whole.endswith(FENCE):
        return None
    opened = whole.rfind(FENCE, 0, -len(FENCE))
    before = whole[: max(opened, 0)]
    line = before[before.rfind("\n") + 1 :]
    if opened < 0 or line.strip() or before.count(FENCE) % 2:
        return None
    if before.count("{") != before.count("}"):
        return None
    lead = FENCED.match(whole, opened + len(FENCE))
    found = object_at(whole, lead.end()) if lead else None
    if found is None or whole[found.end : -len(FENCE)].strip():
        return None
    return found


def unbroken(text: str, objects: Sequence[Parsed]) -> str:
    """The text to the end of the line in which an object begins that does not come to its end; what
    stands on lines below may be quoted in it.
    """
    rest = outside(text, objects)
    opened = OPENED.search(rest)
    if opened is None or rest.count("{") == rest.count("}"):
        return text
    return text[: opened.start()] + text[opened.start() :].partition("\n")[0]


def in_objects(text: str, objects: Sequence[Parsed], key: str, form: Form) -> Iterator[Found]:
    """From the objects that have the key and a value that fits."""
    for each in objects:
        if key in each.body and (found := fitting(each.body[key], form)) is not None:
            inside = text[each.start : each.end]
            place = written(inside, key, each.body[key], found, offset=each.start)
            yield Found(value=found.value, place=place)


def fitting(value: Any, form: Form) -> Found | None:
    """A JSON value as one of the form's labels (or a ranking of all of them)."""
    if form.kind == LISTWISE:
        if isinstance(value, list):
            value = "\n".join(v if isinstance(v, str) else "?" for v in value)
        order = ranked(value, form.labels) if isinstance(value, str) else None
        return None if order is None else Found(value=order)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    return value_of(str(value), form)


def written(text: str, key: str, value: Any, found: Found, *, offset: int) -> int | None:
    """Where the label of an object's key stands, None where that is not sure."""
    places = list(re.finditer(rf'"{re.escape(key)}"\s{{0,20}}:\s{{0,20}}"?', text))
    if len(places) != 1 or found.place is None:
        return None
    at = places[0].end()
    return offset + at + found.place if text.startswith(str(value), at) else None


def beside(text: str, objects: Sequence[Parsed], key: str, form: Form) -> Iterator[Found]:
    """What stands at the key outside of the objects, each unsure: it answers nothing, but an answer
    that differs from it may be a quotation.

    A key without quotes counts only for the verdict, and only where there are braces: plain lines
    are read by their own grammar.
    """
    bare = key == form.key and "{" in text
    quotes = r"[\"'“]" if not bare else r"(?:[\"'“]|(?<![\w-]))"
    named = re.compile(rf"{quotes}{re.escape(key)}[\\\"'*_`”]{{0,4}}\s{{0,20}}[:=]", re.IGNORECASE)
    for number, match in enumerate(named.finditer(outside(text, objects))):
        if number == MOST_KEYS:
            yield Found(f"{key} {MOST_KEYS} times", sure=False)
            return
        value = told(text[match.end() : match.end() + LONGEST_LINE], form)
        if value is not None:
            yield Found(value, sure=False)


def outside(text: str, objects: Sequence[Parsed]) -> str:
    """The text with the objects blanked, so that offsets stay."""
    pieces, at = [], 0
    for each in objects:
        pieces += [text[at : each.start], "\n" * (each.end - each.start)]
        at = each.end
    return "".join((*pieces, text[at:]))


def told(text: str, form: Form) -> Any:
    """The value that a text begins with: a label, a ranking, or words that are none; None where it
    has none on its line.
    """
    match = VALUE.match(text)
    assert match is not None and match.lastgroup is not None  # a bare one may be empty
    value = match[match.lastgroup]
    if match.lastgroup == "bare" and form.kind == LISTWISE:
        value = text.partition("\n")[0]
    core = undressed(value)
    if core.lower() in ("", "json"):
        return None
    if form.kind == LISTWISE:
        return ranked(value, form.labels) or core[:40]
    word = re.match(r"\w+", core)
    found = value_of(value, form) or (value_of(word[0], form) if word else None)
    return core[:40] if found is None else found.value
