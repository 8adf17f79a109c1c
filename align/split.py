"""Which prompts are held out of training: a pure function of the prompt's id."""

import hashlib


def is_held_out(prompt_id: str, share: float) -> bool:
    """True for about `share` of all ids. All pairs of one prompt fall on the same side, in any
    order, in any run.

    Args:
        prompt_id: the record's id.
        share: 0 to 1.
    """
    digest = hashlib.sha256(prompt_id.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8]) / 2**64 < share
