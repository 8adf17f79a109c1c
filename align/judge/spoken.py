"""What a judge says in plain words: tagged lines, labels that stand alone, rankings, thinking.

Grammars, not searches: a line counts only where all of it is understood, so that "not A" or "A is
worse" is never read as A. Every pattern is tried on short lines only, which keeps reading linear.
"""

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from align.judge.forms import LISTWISE, PAIRWISE, SCALAR, Form

LONGEST_LINE = 400  # characters of a line, or of a ranking, that can be an answer
DRESSING = " \t\r\n\v\f\u00a0\u202f\"'`*_#()[]{}$\\.,:;!«»“”‘’"  # [[A]], **A**, (a), "A".
GAP = r"[\s\"'`*_#()\[\]{}$\\.,:;!«»“”‘’]{0,20}"
# Words that may lead up to a label without changing what it says.
LEADING = (
    r"(?:the|la|le|my|final|overall|better|best|meilleure|winning|response|réponse|answer|output"
    r"|assistant|model|option|candidate|verdict|score|rating|mark|note|choice|winner|boxed|text"
    r"|it['’]s|it|is|est|a(?=\s+tie\b)|an?(?=\s+\d))(?!\w)"
)
BETTER = (
    r"(?:\s+(?:is|est)\s+(?:(?:the|la|clearly|slightly|much|bien)\s+){0,2}"
    r"(?:better|best|meilleure)(?:\s+(?:one|response|answer))?|\s+wins)?"
)
BEFORE_TAG = r"(?:(?:my|the|final|overall)\s+){0,3}"
BETWEEN = re.compile(r"\s*(?:>{1,3}|≻|→|->|=>|,|;|\n)\s*")
NUMBERED = re.compile(r"(\d{1,2})\s*[.)]\s*")
THOUGHTS = "think|thinking|thoughts?|reasoning|analysis|scratchpad|seed:think"
THINKING = re.compile(
    rf"\s*(?:<(?:{THOUGHTS})>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|channel\|>analysis)",
    re.IGNORECASE,
)
THOUGHT = re.compile(
    rf"</(?:{THOUGHTS})>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|channel\|>final<\|message\|>",
    re.IGNORECASE,
)
ENDING = re.compile(r"(?:</s>|<eos>|<end_of_turn>|<\|\w{1,30}\|>)\Z")  # which some servers leave


@dataclass(frozen=True)
class Found:
    """An answer.

    Attributes:
        value: a label, or labels from best to worst.
        place: offset of the label's first character, None where it is not known.
        sure: all that was said is understood; else it counts as a contradiction only.
    """

    value: Any
    place: int | None = None
    sure: bool = True


def after_thinking(content: str) -> int | None:
    """Where the answer begins behind what a reasoning model thought; None where it still thinks.

    Some chat templates open the thinking in the prompt, so only its end shows.
    """
    ends = [match.end() for match in THOUGHT.finditer(content)]
    if not ends:
        return None if THINKING.match(content) else 0
    # A tag that a string of a JSON answer quotes ends nothing.
    return 0 if object_end(content) >= ends[-1] else ends[-1]


def before_the_answer(content: str, key: str, form: Form) -> Iterator[Found]:
    """Answers before an end of thinking that may be a quotation: in passages that nothing shows to
    be thoughts. What stands before the first end counts only where it begins with an answer, for
    some templates open the thinking in the prompt, and thoughts try answers out.
    """
    begin = 0
    for match in THOUGHT.finditer(content):
        passage = content[begin : match.start()]
        found = [] if THINKING.match(passage) else list(tagged(passage, key, form))
        if not begin:
            opening = passage.lstrip().partition("\n")[0]
            found = found if list(tagged(opening, key, form)) else []
        yield from (replace(each, sure=False) for each in found)
        begin = match.end()


def object_end(content: str) -> int:
    """Where the JSON object ends that the content begins with; 0 where it begins with none."""
    begin = len(content) - len(content.lstrip())
    if content[begin : begin + 1] != "{":
        return 0
    try:
        return json.JSONDecoder().raw_decode(content, begin)[1]
    except (ValueError, RecursionError):
        return 0


def lines(text: str) -> Iterator[tuple[str, int]]:
    """The lines without what dresses them, with their offsets; empty where they are too long to be
    an answer.
    """
    for match in re.finditer(r"[^\n]+", text):
        line = match[0]
        if len(line) > LONGEST_LINE:
            yield "", match.start()
        elif core := undressed(line):
            yield core, match.start() + line.index(core)


def undressed(text: str) -> str:
    """Without quotes, brackets, emphasis and tokens that end a turn."""
    text = text.strip(DRESSING)
    while (match := ENDING.search(text)) is not None:
        text = text[: match.start()].rstrip(DRESSING)
    return text


@functools.lru_cache(maxsize=64)
def grammar(form: Form) -> re.Pattern[str]:
    """A label with what may stand around it: "The better response is **B**", "7/10", "A wins"."""
    named = "|".join(map(re.escape, sorted(form.labels, key=len, reverse=True)))
    tail = BETTER
    if form.kind == SCALAR:
        most = rf"(?:{GAP}(?:/|(?:out\s+)?of|sur)\s*{form.highest}(?:\.0+)?)?"
        tail = rf"(?:[.,]0+)?{most}(?:\s+points?)?"
    return re.compile(rf"(?:{LEADING}{GAP}){{0,8}}(?P<label>{named}){tail}", re.IGNORECASE)


def value_of(text: str, form: Form) -> Found | None:
    """The label that the text is, whatever its case and dress."""
    if len(text) > LONGEST_LINE:
        return None
    core = undressed(text)
    match = grammar(form).fullmatch(core)
    if match is None:
        return None
    said = match["label"].lower()
    return Found(
        next(label for label in form.labels if label.lower() == said),
        text.index(core) + match.start("label"),
    )


def tagged(text: str, key: str, form: Form) -> Iterator[Found]:
    """From lines like "Verdict: A"; a ranking may stand on the lines below."""
    tag = re.compile(rf"{BEFORE_TAG}{re.escape(key)}{GAP}[:=]", re.IGNORECASE)
    for line, offset in lines(text):
        if (match := tag.match(f"{line}:")) is None:  # a colon at the end was dress
            continue
        rest = line[match.end() :]
        if form.kind == LISTWISE:
            below = rest if rest.strip(DRESSING) else text[offset + len(line) :]
            if (order := ranked(below, form.labels)) is not None:
                yield Found(order)
        elif (found := value_of(rest, form)) is not None:
            yield Found(found.value, offset + match.end() + (found.place or 0))
        elif (word := re.match(r"\w+", undressed(rest))) and (found := value_of(word[0], form)):
            yield Found(found.value, sure=False)  # "Verdict: A, or rather"


def second_thoughts(text: str, key: str, form: Form) -> Iterator[Found]:
    """From within a line, "No, I was wrong. Verdict: B", of a pair: enough to contradict."""
    if form.kind != PAIRWISE:
        return
    named = "|".join(map(re.escape, form.labels))
    tag = re.compile(
        rf"(?<=[.!?;,])\s+(?i:(?:no|wait|my|the|final),?\s+){{0,3}}(?i:{re.escape(key)}){GAP}[:=]"
        rf"{GAP}({named})(?=\s*(?:[.,;!?]|\Z))"
    )
    for line, _ in lines(text):
        for match in tag.finditer(line):
            yield Found(match[1], sure=False)


def lone(text: str, form: Form, *, alone: bool) -> Iterator[Found]:
    """A label that is the last line.

    Args:
        alone: nothing else answers. Then all lines that are labels are given, for where they differ
            they may be headings.
    """
    read = [(value_of(line, form), line, offset) for line, offset in lines(text)]
    if not read or read[-1][0] is None:
        return
    _, line, offset = read[-1]
    if ":" in text[offset + len(line) :]:  # "Response A:", and nothing below it
        return
    found = [Found(each.value, offset + (each.place or 0)) for each, _, offset in read if each]
    yield from found if alone else found[-1:]


def ranked(text: str, labels: Sequence[str]) -> tuple[str, ...] | None:
    """The labels in the order of "B > A", "B, A" or a numbered list; None unless all of the text is
    such an order and each label stands in it once.
    """
    if len(text) > 4 * LONGEST_LINE:
        return None
    form = Form(kind=LISTWISE, scale="", labels=tuple(labels))
    order = []
    for number, part in enumerate(BETWEEN.split(re.sub(r"\s*\n\s*", "\n", undressed(text)))):
        numbering = NUMBERED.match(part.lstrip(DRESSING))
        if numbering and int(numbering[1]) != number + 1:
            return None
        rest = part.lstrip(DRESSING)[numbering.end() :] if numbering else part
        found = value_of(re.sub(r"^(?:and|then|et|puis)\s+", "", rest.strip()), form)
        if found is None:
            return None
        order.append(found.value)
    return tuple(order) if sorted(order) == sorted(labels) else None
