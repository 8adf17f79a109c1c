"""Which prompts are held out of training: a pure function of what the prompt says."""

import hashlib
import json
from collections.abc import Sequence

from align.records import Message


def prompt_key(messages: Sequence[Message]) -> str:
    """32 hex digits that are the same for the same conversation, whatever its records are called.

    Files of pairs often number their lines; going by ids, one pair of a prompt would be trained on
    and another measured.
    """
    told = json.dumps([[message.role, message.content] for message in messages])
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def is_held_out(key: str, share: float) -> bool:
    """True for about `share` of all prompts. All pairs of one prompt fall on the same side, in any
    order, in any run.

    Args:
        key: the prompt's `prompt_key`.
        share: 0 to 1.
    """
    return int(key[:16], 16) / 2**64 < share
