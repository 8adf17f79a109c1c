"""QA-Feedback: human comparisons of four model answers to a question over Wikipedia passages.

Wu et al. 2023, Fine-Grained Human Feedback (arXiv:2306.01693); files {train,dev}_feedback.json of
allenai/FineGrainedRLHF. `preference` holds six comparisons in the order 1v2, 1v3, 1v4, 2v3, 2v4,
3v4: 0 equal, 1 first better, 2 second better.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from align.errors import DataError
from align.records import Message, Preference
from align.sources.settings import Source

PROVIDES = Preference
PAIRS = tuple(combinations((1, 2, 3, 4), 2))


def read(path: Path, *, settings: Source) -> Iterator[Preference]:
    """The strict preferences of each question; equal ones and pairs of equal text are left out.

    Raises:
        DataError: not the release's JSON list, or an entry without its fields.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: not JSON ({error}); give {{train,dev}}_feedback.json of the release"
        ) from error
    if not isinstance(entries, list):
        raise DataError(f"{path}: not a list; give {{train,dev}}_feedback.json of the release")
    for number, entry in enumerate(entries, start=1):
        try:
            yield from preferences(entry, number)
        except (KeyError, TypeError, IndexError, ValueError) as error:
            raise DataError(f"{path}, entry {number}: not as in the release ({error!r})") from error


def preferences(entry: Mapping[str, Any], number: int) -> Iterator[Preference]:
    messages = (Message(role="user", content=prompt_text(entry["passages"], entry["question"])),)
    for (first, second), vote in zip(PAIRS, entry["preference"], strict=True):
        better, worse = (first, second) if vote == 1 else (second, first)
        chosen, rejected = (entry[f"prediction {i}"].strip() for i in (better, worse))
        if vote == 0 or chosen == rejected or not chosen or not rejected:
            continue
        yield Preference(
            id=f"qa-{number:04}",
            messages=messages,
            chosen=chosen,
            rejected=rejected,
            judge="human:qa_feedback",
            meta={"pair": f"{better}>{worse}"},
        )


def prompt_text(passages: Sequence[Sequence[str]], question: str) -> str:
    """Passages first and the question last, so that a cut from the left keeps the question.

    A passage is a list [title, sentence, …]; the release puts the title at the head of the first
    sentence too.
    """
    texts = [" ".join(" ".join(sentences).split()) for _, *sentences in passages]
    return "\n\n".join([*texts, f"Question: {question}"])
