"""What a judge is asked for: the forms of a question and of its answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PAIRWISE, LISTWISE, SCALAR = "pairwise", "listwise", "scalar"
KINDS = (PAIRWISE, LISTWISE, SCALAR)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # what responses are called, in the order shown
# From the strictest to the loosest way of having an answer given.
MODES = ("json_schema", "choice", "json", "line")
SCALES: Mapping[str, tuple[str, ...]] = {
    "two": ("A", "B"),
    "three": ("A", "B", "tie"),
    # 1: A is much better … 5: B is much better, 0: both are bad; the keys of the page for humans
    "five": ("1", "2", "3", "4", "5", "0"),
}
# How much each label prefers the answer shown first: its probability, and its margin in levels.
FIRST_WINS: Mapping[str, float] = {
    "A": 1.0, "B": 0.0, "tie": 0.5, "1": 1.0, "2": 1.0, "3": 0.5, "4": 0.0, "5": 0.0, "0": 0.5,
}  # fmt: skip
MARGINS: Mapping[str, float] = {"1": 2.0, "2": 1.0, "3": 0.0, "4": -1.0, "5": -2.0, "0": 0.0}
BOTH_BAD = "0"


@dataclass(frozen=True, kw_only=True)
class Form:
    """One form of question.

    Attributes:
        kind: pairwise (two responses), listwise (all of a prompt's) or scalar (one).
        scale: of a pairwise answer, a key of `SCALES`.
        labels: what may be answered: verdicts, letters to be ranked, or numbers.
        criteria: names that are each answered too, in the same labels.
        reason: whether a sentence of reasoning comes before the answer.
        lowest, highest: of a scalar answer.
    """

    kind: str
    scale: str
    labels: tuple[str, ...]
    criteria: tuple[str, ...] = ()
    reason: bool = False
    lowest: int = 1
    highest: int = 10

    @property
    def key(self) -> str:
        """The name that carries the answer."""
        return {PAIRWISE: "verdict", LISTWISE: "ranking", SCALAR: "score"}[self.kind]

    def modes(self) -> tuple[str, ...]:
        """Those that can carry this answer; a bare choice has room for one label only."""
        single = not self.criteria and not self.reason and self.kind != LISTWISE
        return tuple(mode for mode in MODES if single or mode != "choice")

    def schema(self) -> dict[str, Any]:
        """JSON Schema of the answer, in the strict subset that endpoints support."""
        value: dict[str, Any] = {"type": "string", "enum": list(self.labels)}
        if self.kind == SCALAR:
            value = {"type": "integer", "minimum": self.lowest, "maximum": self.highest}
        properties: dict[str, Any] = {"reason": {"type": "string"}} if self.reason else {}
        properties |= dict.fromkeys(self.criteria, value)
        properties[self.key] = {"type": "array", "items": value} if self.kind == LISTWISE else value
        return {
            "type": "object",
            "properties": properties,
            "required": list(properties),
            "additionalProperties": False,
        }

    def body(self, mode: str) -> dict[str, Any]:
        """What a request carries so that the endpoint holds the model to the form."""
        if mode == "json_schema":
            schema = {"name": self.key, "strict": True, "schema": self.schema()}
            return {"response_format": {"type": "json_schema", "json_schema": schema}}
        if mode == "choice":
            return {"structured_outputs": {"choice": list(self.labels)}}
        return {}


def pairwise(*, scale: str, criteria: tuple[str, ...] = (), reason: bool = False) -> Form:
    return Form(kind=PAIRWISE, scale=scale, labels=SCALES[scale], criteria=criteria, reason=reason)


def listwise(count: int, *, reason: bool = False) -> Form:
    assert 2 <= count <= len(LETTERS)
    return Form(kind=LISTWISE, scale="", labels=tuple(LETTERS[:count]), reason=reason)


def scalar(
    *, lowest: int, highest: int, criteria: tuple[str, ...] = (), reason: bool = False
) -> Form:
    labels = tuple(str(number) for number in range(lowest, highest + 1))
    return Form(
        kind=SCALAR, scale="", labels=labels, criteria=criteria, reason=reason,
        lowest=lowest, highest=highest,
    )  # fmt: skip
