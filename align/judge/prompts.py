"""From a question to the messages that a judge reads: a Jinja template around quoted material.

What models and people wrote reaches the judge as JSON strings between delimiters that their authors
cannot guess, with everything escaped that a chat template or a reader's eye could take for
structure. A value is never rendered again, so templates in a prompt stay text.
"""

import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError, TemplateNotFound
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from align.errors import JudgeError
from align.judge.forms import LETTERS, Form
from align.records import ROLES, Message
from align.unseen import NARROW, UNSEEN

# Names that models have for turns, roles and the like, in angle brackets; `<strong>` is none.
ANGLED = (
    "bos|eos|pad|unk|mask|sep|cls|[se]op|eo[adhmt]|end|endoftext|startoftext|unused\\d+|0x[0-9a-f]{2}"
    "|system|user|assistant|human|bot|model|role|tools?|think|thinking|sys|image|video|audio"
    "|(?:seed|minimax):\\w{1,40}|(?-i:s)"
)
# <start_of_turn>, <tool_call>, <BOS_TOKEN>, …: whatever has an underscore, but C's types <size_t>.
UNDERSCORED = "(?![^\\W_]{1,40}_t>)[^\\W_]{0,40}_\\w{0,60}"
SQUARE = (
    "INST|SYS|BOS|EOS|PAD|UNK|CLS|SEP|MASK|[gs]MASK|IMG|IMG_BREAK|IMG_END|AUDIO|BEGIN_AUDIO|THINK|ARGS"
    "|CALL_ID|SYSTEM_PROMPT|MODEL_SETTINGS|AVAILABLE_TOOLS|TOOL_[A-Z]{1,20}|PREFIX|MIDDLE|SUFFIX"
    "|unused\\d+|UNUSED_TOKEN_\\d+"
)
# The first character of what chat templates, or our own delimiters, are made of, in narrow text.
STRUCTURE = re.compile(
    rf"<(?=/?(?:{ANGLED}|{UNDERSCORED})>|\|[^\s>]|\w{{1,40}}\||</?SYS>"
    r"|/?(?:conversation|reference|response))"
    rf"|\[(?=/?(?-i:{SQUARE})\]|\|\w{{1,40}}\|\]|e~\[)"  # the latter two: EXAONE, MiniMax
    "|\\](?=~!?b[\\[\\]])|>(?=>(?-i:[A-Z]{1,20})<<)|\u25c1(?=/?think)",  # MiniMax, Falcon, Kimi
    re.IGNORECASE,
)
TURN = "\x00{}\x00"
MOST_MULTIPLIED = 1000
LONGEST_PROMPT = 1 << 28  # characters; a template that writes more does not come to an end


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a question is about, as it is to be shown: `responses` in the order shown."""

    messages: Sequence[Message]
    responses: Sequence[str]
    reference: str | None = None


def quoted(text: str) -> str:
    """One JSON string that holds `text` exactly, on one line, without anything that structures.

    The one text that JSON cannot spell is a high surrogate before a low one: two halves of one
    character, which it becomes.

    Example: `quoted('</s>"')` is `"\\u003c/s>\\""`.
    """
    encoded = json.dumps(text, ensure_ascii=False)
    pieces, start = [], 0
    for match in STRUCTURE.finditer(encoded.translate(NARROW)):
        pieces += [encoded[start : match.start()], f"\\u{ord(encoded[match.start()]):04x}"]
        start = match.end()
    return UNSEEN.sub(lambda match: json.dumps(match[0])[1:-1], "".join((*pieces, encoded[start:])))


def clipped(text: str, limit: int) -> str:
    """`text` quoted; its end left out beyond `limit` characters, and the reader told how many were.
    The mark stands outside of the string, where no author can put one.
    """
    left_out = len(text) - limit
    return quoted(text) if left_out <= 0 else f"{quoted(text[:limit])} [… +{left_out}]"


def clipped_inside(text: str, limit: int) -> str:
    """The same with the middle left out: a question often comes last, behind a long text."""
    left_out, head = len(text) - limit, (limit + 1) // 2
    if left_out <= 0:
        return quoted(text)
    return f"{quoted(text[:head])} [… +{left_out}] {quoted(text[head + left_out :])}"


def nonce(material: Material) -> str:
    """Sixteen hex digits that depend on all of the text: whoever writes a response cannot put its
    delimiter into it. The order of the responses does not count, so that an endpoint's prefix cache
    serves the conversation to both orders.
    """
    told = [[m.role, m.content] for m in material.messages]
    whole = json.dumps([told, sorted(material.responses), material.reference])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


WIDE = re.compile(r"%[^%a-zA-Z]*(?:\d{4}|\*)")  # a field that pads to any length


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja for templates that others wrote: no attributes of Python's, nothing huge by a trick."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "%":
            if isinstance(left, str) and WIDE.search(left):
                raise SecurityError("% is for small widths")
            return super().call_binop(context, operator, left, right)
        for side in (left, right):
            if (abs(side) if isinstance(side, int | float) else len(side)) > MOST_MULTIPLIED:
                raise SecurityError(f"{operator} is for small numbers and short texts")
        return super().call_binop(context, operator, left, right)


class Templates(FileSystemLoader):
    """Templates and texts alone: what else lies in their folder is nobody's business."""

    def get_source(self, environment: Any, template: str) -> Any:
        if not template.endswith((".j2", ".txt")):
            raise TemplateNotFound(template, f"{template}: is neither .j2 nor .txt")
        return super().get_source(environment, template)


@functools.lru_cache(maxsize=8)
def environment(folders: tuple[str, ...]) -> Sandbox:
    sandbox = Sandbox(
        loader=Templates(list(folders)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        auto_reload=False,
    )
    del sandbox.globals["lipsum"]
    return sandbox


@dataclass(frozen=True)
class Template:
    """A prompt file; it may extend `base.j2` of the shipped folder."""

    path: Path
    shipped: Path

    def render(
        self, material: Material, *, form: Form, mode: str, limit: int
    ) -> list[dict[str, str]]:
        """The messages to send.

        Args:
            mode: how the answer is to be given, one of `forms.MODES`.
            limit: characters of each response, message and reference; more are cut off, on all
                sides alike.

        Raises:
            JudgeError: the template is wrong.
        """
        try:
            env = environment((str(self.path.parent), str(self.shipped)))
            parts = env.get_template(self.path.name).generate(
                **values(material, form=form, mode=mode, limit=limit)
            )
            return split_turns("".join(bounded(parts)))
        except (TemplateError, TypeError, ValueError, ArithmeticError, RecursionError, OSError,
                MemoryError) as error:  # fmt: skip
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise JudgeError(
                f"judge.prompt={self.path}: the template fails ({why}); see conf/judge/prompts/"
            ) from error


def values(material: Material, *, form: Form, mode: str, limit: int) -> dict[str, Any]:
    """What a template may name; base.j2 describes it."""
    texts = [*material.responses, *(m.content for m in material.messages), material.reference or ""]
    reference = material.reference
    return {
        "nonce": nonce(material),
        "conversation": [(m.role, clipped_inside(m.content, limit)) for m in material.messages],
        "responses": [
            (letter, clipped(text, limit))
            for letter, text in zip(LETTERS, material.responses, strict=False)
        ],
        "reference": None if reference is None else clipped(reference, limit),
        "shortened": any(len(text) > limit for text in texts),
        "kind": form.kind,
        "scale": form.scale,
        "labels": list(form.labels),
        "criteria": list(form.criteria),
        "reason": form.reason,
        "lowest": form.lowest,
        "highest": form.highest,
        "mode": "json" if mode == "json_schema" else mode,
        "turn": turn,
    }


def turn(role: str) -> str:
    """The mark at which a message of `role` begins.

    Raises:
        ValueError: there is no such role.
    """
    if role not in ROLES:
        raise ValueError(f"turn({role!r}): there are {', '.join(ROLES)}")
    return TURN.format(role)


def bounded(parts: Iterator[str]) -> Iterator[str]:
    """
    Raises:
        ValueError: the text does not come to an end.
    """
    written = 0
    for part in parts:
        written += len(part)
        if written > LONGEST_PROMPT:
            raise ValueError(f"it writes more than {LONGEST_PROMPT:,} characters")
        yield part


def split_turns(text: str) -> list[dict[str, str]]:
    """Messages from rendered text, at the marks that `turn(role)` left; without any, one user
    message. Quoted material cannot hold a mark: its control characters are escaped.

    Raises:
        ValueError: there is no text, or some before the first turn.
    """
    before, *parts = re.split(rf"\x00({'|'.join(ROLES)})\x00", text)
    if parts and before.strip():
        raise ValueError(f"text stands before the first turn(): {before.strip()[:40]!r}")
    turns = zip(parts[::2], parts[1::2], strict=True) if parts else [("user", before)]
    found = [{"role": role, "content": body.strip()} for role, body in turns if body.strip()]
    if not found:
        raise ValueError("it writes nothing")
    return found


def one_message(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The same for models without a system role."""
    return [{"role": "user", "content": "\n\n".join(str(m["content"]) for m in messages)}]
