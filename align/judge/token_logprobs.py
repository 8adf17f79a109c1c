"""How probable each label was where a judge wrote its verdict, by an endpoint's log-probabilities.

No probabilities rather than wrong ones: they are given only where the tokens spell the text from
the verdict to its end, and where the token at the verdict is the beginning of what was read.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from align.judge.spoken import DRESSING, ENDING

MOST_UNCLEAR = 0.01  # of the probability, on tokens that may begin several labels


def probabilities(
    logprobs: Any, content: str, place: int, *, labels: Sequence[str], said: str
) -> dict[str, float]:
    """Probability of each label at the token that covers `place`, renormalised over the labels:

        P(label) = sum of exp(logprob) over the tokens that spell or begin it, / the sum of all

    Empty where the endpoint gave none, or none that match the text. So it is too where "1" weighs
    more than 1% and may be the beginning of "10", with tokenizers that spell digit by digit.

    Args:
        place: of the first character of the label in the content.
        said: the label that was read there.
    """
    entry = token_at(logprobs, content, place)
    if entry is None or not isinstance(entry.get("top_logprobs"), list):
        return {}
    if not opens(str(entry["token"]).strip(DRESSING), said, labels):
        return {}
    alternatives: dict[str, float] = {}  # by text: the token itself may be listed once more
    for one in (*entry["top_logprobs"], entry):
        if isinstance(one, Mapping) and isinstance(text := one.get("token"), str):
            alternatives.setdefault(text, share(one.get("logprob")))
    known, unclear = by_label(alternatives, labels)
    total = sum(known.values())
    if not entry["top_logprobs"] or total <= 0 or unclear > MOST_UNCLEAR * (total + unclear):
        return {}
    return {label: value / total for label, value in known.items()}


def by_label(
    alternatives: Mapping[str, float], labels: Sequence[str]
) -> tuple[dict[str, float], float]:
    """The probability of each label, and that of tokens that may begin several."""
    known, unclear = dict.fromkeys(labels, 0.0), 0.0
    cores = {text: text.strip(DRESSING).lower() for text in alternatives}
    for text, core in cores.items():
        meant = begun(core, labels)
        whole = [label for label in meant if label.lower() == core]
        longer = [label for label in meant if label.lower() not in cores.values()]
        if len(whole or meant) == 1 and not (whole and set(longer) - set(whole)):
            known[(whole or meant)[0]] += alternatives[text]
        elif meant:
            unclear += alternatives[text]
    return known, unclear


def share(logprob: Any) -> float:
    """The probability of a log-probability, 0 of what is none."""
    if isinstance(logprob, bool) or not isinstance(logprob, int | float) or logprob != logprob:
        return 0.0
    return math.exp(max(-1e4, min(0.0, logprob)))


def begun(text: str, labels: Sequence[str]) -> list[str]:
    """The labels that a token spells or begins: "A", " a" and '"A' begin A, "t" begins tie."""
    return [label for label in labels if text and label.lower().startswith(text.lower())]


def opens(text: str, said: str, labels: Sequence[str]) -> bool:
    """Whether a token can be the beginning of what was said, and is no other label."""
    meant = begun(text, labels)
    return said in meant and all(label == said for label in meant if label.lower() == text.lower())


def token_at(logprobs: Any, content: str, place: int) -> dict[str, Any] | None:
    """The entry of the token that covers the character at `place`.

    The tokens are laid on the content from its end: what a reasoning model thought may stand before
    it in the list, tokens that end a turn behind it.
    """
    whole = content.encode("utf-8", "surrogatepass")
    wanted, stop = len(content[:place].encode("utf-8", "surrogatepass")), len(whole)
    last = True
    for entry in listed(logprobs)[::-1]:
        token = spelling(entry)
        if token is None:
            return None
        if last and not whole.endswith(token) and is_ending(token):
            continue
        last = last and not token
        if len(token) > stop > wanted and token.endswith(whole[:stop]):
            return entry  # the content lacks the space that the token begins with
        if not whole.endswith(token, 0, stop):
            return None
        stop -= len(token)
        if stop <= wanted:
            return entry
    return None


def listed(logprobs: Any) -> list[dict[str, Any]]:
    """The entries of the tokens, none where there is no list of them."""
    entries: object = logprobs.get("content") if isinstance(logprobs, Mapping) else None
    if not isinstance(entries, list):
        return []
    found = [entry for entry in entries if isinstance(entry, dict)]
    return found if len(found) == len(entries) else []


def spelling(entry: Mapping[str, Any]) -> bytes | None:
    """A token's bytes; those of a part of a character are not in its text."""
    text, told = entry.get("token"), entry.get("bytes")
    if not isinstance(text, str):
        return None
    if isinstance(told, list) and all(type(byte) is int and 0 <= byte < 256 for byte in told):
        return bytes(told)
    return text.encode("utf-8", "surrogatepass")


def is_ending(token: bytes) -> bool:
    """Whether the token is blank or ends a turn."""
    text = token.decode("utf-8", "replace").strip()
    return not text or ENDING.fullmatch(text) is not None
