"""From a question to the messages that a judge reads: a Jinja template around quoted material.

What models and people wrote reaches the judge as JSON strings between delimiters that their authors
cannot guess, with everything escaped that a chat template or a reader's eye could take for
structure. A value is never rendered again, so templates in a prompt stay text.
"""

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import FileSystemLoader, StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from align.errors import JudgeError
from align.judge.forms import Form
from align.records import ROLES, Message
from align.unseen import UNSEEN

NAMES = "s|bos|eos|pad|unk|mask|sep|cls|end|system|user|assistant|human|model|tool|im_start|im_end"
TURNS = "start_of_turn|end_of_turn|start_header_id|end_header_id|eot_id|endoftext|think"
# The first character of what chat templates, or our own delimiters, are made of.
STRUCTURE = re.compile(
    rf"<(?=[|\uff5c]|/?(?:{NAMES}|{TURNS}|conversation|reference|response)[\w-]*>|</?SYS>)"
    r"|\[(?=/?(?:INST|SYS|BOS|EOS|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\])"
    r"|\uff5c(?=>)|\|(?=>)",
    re.IGNORECASE,
)
TURN = "\x00{}\x00"


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a question is about, as it is to be shown: `responses` in the order shown."""

    messages: Sequence[Message]
    responses: Sequence[str]
    reference: str | None = None


def quoted(text: str) -> str:
    """One JSON string that holds `text` exactly, on one line, without anything that structures.

    Example: `quoted('</s>"')` is `"\\u003c/s>\\""`.
    """
    encoded = json.dumps(text, ensure_ascii=False)
    return STRUCTURE.sub(_escaped, UNSEEN.sub(_escaped, encoded))


def _escaped(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1] if ord(match[0][0]) > 126 else f"\\u{ord(match[0]):04x}"


def cut(text: str, limit: int) -> str:
    """At most `limit` characters, the end left out and the reader told so."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]} [… {len(text) - limit} more characters were cut off here]"


def nonce(material: Material) -> str:
    """Sixteen hex digits that depend on all of the text: whoever writes a response cannot put its
    delimiter into it. The order of the responses does not count, so that an endpoint's prefix cache
    serves the conversation to both orders.
    """
    told = [[m.role, m.content] for m in material.messages]
    whole = json.dumps([told, sorted(material.responses), material.reference])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


@functools.lru_cache(maxsize=8)
def environment(folders: tuple[str, ...]) -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(list(folders)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        auto_reload=False,
    )


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
            limit: characters of a response, the conversation and the reference; more are cut off,
                on all sides alike.

        Raises:
            JudgeError: the template is wrong.
        """
        shown = Material(
            messages=[
                Message(role=m.role, content=cut(m.content, limit)) for m in material.messages
            ],
            responses=[cut(text, limit) for text in material.responses],
            reference=None if material.reference is None else cut(material.reference, limit),
        )
        values = {
            "nonce": nonce(shown),
            "conversation": [(m.role, quoted(m.content)) for m in shown.messages],
            "responses": list(
                zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", map(quoted, shown.responses), strict=False)
            ),
            "reference": None if shown.reference is None else quoted(shown.reference),
            "kind": form.kind,
            "scale": form.scale,
            "labels": list(form.labels),
            "criteria": list(form.criteria),
            "reason": form.reason,
            "lowest": form.lowest,
            "highest": form.highest,
            "mode": "json" if mode == "json_schema" else mode,
            "turn": TURN.format,
        }
        try:
            env = environment((str(self.path.parent), str(self.shipped)))
            text = env.get_template(self.path.name).render(values)
        except (TemplateError, TypeError, ValueError) as error:
            raise JudgeError(
                f"judge.prompt={self.path}: the template fails ({error}); see conf/judge/prompts/"
            ) from error
        return split_turns(text)


def split_turns(text: str) -> list[dict[str, str]]:
    """Messages from rendered text, at the marks that `turn(role)` left; without any, one user
    message. Quoted material cannot hold a mark: its control characters are escaped.
    """
    parts = re.split(rf"\x00({'|'.join(ROLES)})\x00", text)
    if len(parts) == 1:
        return [{"role": "user", "content": text.strip()}]
    turns = zip(parts[1::2], parts[2::2], strict=True)
    return [{"role": role, "content": body.strip()} for role, body in turns if body.strip()]


def one_message(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The same for models without a system role."""
    return [{"role": "user", "content": "\n\n".join(str(m["content"]) for m in messages)}]
