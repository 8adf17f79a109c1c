"""Reads pairs that people compared, from a table whose columns the user names, and joins a judge's
labels to them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from align.errors import ConfigError, DataError
from align.notice import notice
from align.records import OK, TIE, Message, Verdict, read_messages
from align.sources.tables import Row, table_rows

FIRST, SECOND = "first", "second"
LABELS = {
    **dict.fromkeys(("1", "1.0", "a", "first", "model_a", "chosen_first"), FIRST),
    **dict.fromkeys(("2", "2.0", "b", "second", "model_b"), SECOND),
    **dict.fromkeys(("0", "0.0", "tie", "equal", "both", "tie (bothbad)"), TIE),
    **dict.fromkeys(("", "nan"), None),
}
P_FIRST = {FIRST: 1.0, TIE: 0.5, SECOND: 0.0}
MOST_TOLD = 10  # bad rows, each with a line of its own


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which column holds what; a missing `id` stands for the number of the row, from 1.

    Attributes:
        prompt: one name or several, whose texts are joined by a blank line (instruction, input).
        human: the columns of labels, one for each person or group of people.
    """

    prompt: str | tuple[str, ...]
    first: str
    second: str
    human: tuple[str, ...]
    id: str | None = None

    def __post_init__(self) -> None:
        if not self.human or not self.prompts:
            key = "prompt" if self.human else "human"
            raise ConfigError(f"columns.{key}=[]: no column; type columns.{key}=[NAME]")
        if len(set(self.human)) < len(self.human):
            raise ConfigError(f"columns.human={list(self.human)}: names a column twice")

    @property
    def prompts(self) -> tuple[str, ...]:
        return (self.prompt,) if isinstance(self.prompt, str) else tuple(self.prompt)

    @property
    def settings(self) -> list[tuple[str, str]]:
        """(setting, column) of all that are named."""
        named = [("prompt", name) for name in self.prompts]
        named += [("first", self.first), ("second", self.second)]
        named += [("human", name) for name in self.human]
        return named + ([("id", self.id)] if self.id is not None else [])


@dataclass(frozen=True, kw_only=True)
class JudgedPair:
    """Two answers to one prompt, what people said of them, and what a judge says.

    Attributes:
        prompt: plain text, or the turns of a conversation.
        human: by column "first", "second", "tie", or None where nothing readable is there.
        unreadable: the columns with a value that is no label.
        meta: all columns that nobody named; a judge's reference answer may be among them.
        verdict: the judge's, None as long as it was not asked.
    """

    id: str
    prompt: str | tuple[Message, ...]
    first: str
    second: str
    human: Mapping[str, str | None]
    verdict: Verdict | None = None
    unreadable: tuple[str, ...] = field(default=())
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The prompt as turns."""
        if isinstance(self.prompt, str):
            return (Message(role="user", content=self.prompt),)
        return self.prompt


def decode_label(value: Any) -> str | None:
    """ "first", "second" or "tie", whatever the case and whether text or number; None for nothing.

    Raises:
        ValueError: no label.
    """
    if value is None:
        return None
    text = isinstance(value, str | int | float) and not isinstance(value, bool)
    word = str(value).strip().casefold() if text else None
    if word not in LABELS:
        raise ValueError(f"{value!r} is no label; labels are {', '.join(filter(None, LABELS))}")
    return LABELS[word]


def read_pairs(path: Path, columns: Columns) -> Iterator[JudgedPair]:
    """The readable rows of a .jsonl, .json, .csv or .parquet file; the others are told on stderr.

    Raises:
        DataError: another kind of file, no readable row, or a column of labels that no row has.
    """
    bad: list[tuple[str, str]] = []
    found: dict[str, None] = {}
    good = 0
    for place, number, row in table_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            found |= dict.fromkeys(row)
            pair = read_pair(row, columns, number=number)
        except DataError as error:
            bad.append((place, str(error).removeprefix(f"{place}: ")))
            continue
        good += 1
        yield pair
    if not good or not set(columns.human) <= found.keys():
        raise DataError(_unfit(path, columns, found=list(found), bad=bad, good=good))
    tell_bad(bad)


def tell_bad(bad: Sequence[tuple[str, str]]) -> None:
    """A line on stderr for each bad row, (place, why); beyond the first ten only their number."""
    for place, why in bad[:MOST_TOLD]:
        notice(f"{place}: left out: {why}")
    if len(bad) > MOST_TOLD:
        notice(f"… and {len(bad) - MOST_TOLD:,} more rows left out")


def _unfit(
    path: Path, columns: Columns, *, found: list[str], bad: list[tuple[str, str]], good: int
) -> str:
    """Why a file gives nothing, in one line: what is missing, what is there, what to type."""
    if not found:
        return f"{path}: {bad[0][1] if bad else 'no rows'}; it needs rows with columns of names"
    missing = [(key, name) for key, name in columns.settings if name not in found]
    if not missing:
        place, why = bad[0]
        return f"{path}: none of {len(bad):,} rows can be read; the first, {place}: {why}"
    names = ", ".join(repr(name) for _, name in missing)
    keys = dict.fromkeys(key for key, _ in missing)
    listed = {
        key for key in keys if key == "human" or (key == "prompt" and len(columns.prompts) > 1)
    }
    typed = " ".join(f"columns.{key}={'[NAME]' if key in listed else 'NAME'}" for key in keys)
    rows = "no row" if good else f"none of {len(bad):,} rows"
    return (
        f"{path}: {rows} has the column{'s' if len(missing) > 1 else ''} {names}; found are "
        f"{', '.join(repr(name) for name in found)}; type {typed}"
    )


def read_pair(row: Row, columns: Columns, *, number: int) -> JudgedPair:
    """One row; `number` becomes the id where no column holds it.

    Raises:
        DataError: a column is missing, or holds no text.
    """
    human: dict[str, str | None] = {}
    unreadable = []
    for name in columns.human:
        try:
            human[name] = decode_label(row.get(name))
        except ValueError:
            human[name] = None
            unreadable.append(name)
    return JudgedPair(
        id=str(number) if columns.id is None else identifier(cell(row, columns.id)),
        prompt=_prompt(row, columns.prompts),
        first=_text(row, columns.first),
        second=_text(row, columns.second),
        human=human,
        unreadable=tuple(unreadable),
        meta=_meta(row, {name for _, name in columns.settings}),
    )


def _meta(row: Row, named: Set[str]) -> dict[str, Any]:
    """What a prompt's `meta` holds: columns that nobody named, and a column of that name."""
    given = row.get("meta")
    others = {key: value for key, value in row.items() if key not in named and key != "meta"}
    return {**others, **(given if isinstance(given, Mapping) else {})}


def _prompt(row: Row, names: Sequence[str]) -> str | tuple[Message, ...]:
    if len(names) == 1 and isinstance(cell(row, names[0]), list):
        return read_messages({"messages": row[names[0]]})
    # An empty second part is usual: not every instruction has an input.
    parts = [_text(row, name) for name in names if row.get(name, "") is not None]
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise DataError("the prompt is empty")
    return text


def _text(row: Row, name: str) -> str:
    """A cell as text: an answer "12" or "true" may have lost its quotes on its way here."""
    value = cell(row, name)
    if isinstance(value, bool | int | float) and value == value:
        return json.dumps(value)
    if not isinstance(value, str):
        kind = f"a {type(value).__name__}" if isinstance(value, list | dict) else "nothing"
        raise DataError(f"column {name!r} holds {kind}, not text")
    return value


def cell(row: Row, name: str) -> Any:
    if name not in row:
        raise DataError(f"no column {name!r}")
    return row[name]


def identifier(value: Any) -> str:
    """An id as text; 7, 7.0 (a column with gaps) and "7" are the same one."""
    if value is None or value == "":
        raise DataError("the id is empty")
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


# A judge's labels


def join(
    pairs: Sequence[JudgedPair], path: Path, *, id_column: str | None, label_column: str
) -> list[Any]:
    """For each pair the value of `label_column` in the row of another file with the same id, None
    where there is none; rows and pairs without a partner are counted on stderr.

    Args:
        id_column: None for the number of the row, from 1.

    Raises:
        DataError: no partner for any pair, no such column, or an id that names two things.
    """
    asked = {pair.id for pair in pairs}
    if len(asked) < len(pairs):
        raise DataError(
            "two pairs have the same id; type columns.id=NAME of a column without twins"
        )
    labels: dict[str, Any] = {}
    bad: list[tuple[str, str]] = []
    found: dict[str, None] = {}
    for place, number, row in table_rows(path):
        try:
            if isinstance(row, DataError):
                raise row
            found |= dict.fromkeys(row)
            key = str(number) if id_column is None else identifier(cell(row, id_column))
            label = cell(row, label_column)
        except DataError as error:
            bad.append((place, str(error).removeprefix(f"{place}: ")))
            continue
        if key in labels and labels[key] != label:
            raise DataError(f"{place}: id {key!r} stands twice, with different labels; remove one")
        labels[key] = label
    if not asked & labels.keys():
        raise DataError(
            f"{path}: no row has the id of a pair and a label ({id_column!r}, {label_column!r}); "
            f"columns found: {', '.join(repr(name) for name in found) or 'none'}; name others"
        )
    tell_bad(bad)
    for count, what in (
        (len(asked - labels.keys()), "pairs without a row there"),
        (len(labels.keys() - asked), "rows there without a pair"),
    ):
        if count:
            notice(f"{path}: {count:,} {what}")
    return [labels.get(pair.id) for pair in pairs]


def verdicts_from_labels(
    pairs: Sequence[JudgedPair], labels: Sequence[Any], *, judge: str
) -> list[Verdict | None]:
    """A verdict for each pair from a label that a judge once gave; None where there is none.

    A value that is no label makes the verdict malformed. Nothing is known of a second order, so
    `looks` is empty and `consistent` False.

    Args:
        labels: [N], one a pair, as a file has them.
    """
    verdicts: list[Verdict | None] = []
    for pair, value in zip(pairs, labels, strict=True):
        try:
            label = decode_label(value)
        except ValueError:
            status, p_first = "malformed", None
        else:
            if label is None:
                verdicts.append(None)
                continue
            status, p_first = (TIE if label == TIE else OK), P_FIRST[label]
        verdicts.append(
            Verdict(
                id=pair.id,
                first=0,
                second=1,
                status=status,
                p_first=p_first,
                consistent=False,
                judge=judge,
            )
        )
    return verdicts


def with_verdicts(
    pairs: Sequence[JudgedPair], verdicts: Sequence[Verdict | None]
) -> list[JudgedPair]:
    """The pairs, each with its verdict."""
    return [replace(pair, verdict=verdict) for pair, verdict in zip(pairs, verdicts, strict=True)]
