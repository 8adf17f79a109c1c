"""Characters that a reader, or a judge, must see rather than be led by.

Control and format characters, line and paragraph separators, bidirectional marks, zero-width
spaces, fillers, lone surrogates, the invisible tag block and the selectors that can carry hidden
text: Unicode's control characters and its Default_Ignorable_Code_Point. Tab, newline and the
joiners and selectors that scripts and emoji need are left alone.
"""

import re

UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb\ud800-\udfff"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# Full-width and small forms as the ASCII that compatibility normalisation makes of them, one
# character for one.
NARROW = {
    **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},
    0x3000: 0x20, 0xFE64: 0x3C, 0xFE65: 0x3E,
}  # fmt: skip


def printable(text: str) -> str:
    """Plain text with such characters written out, for files, figures and terminals."""
    return UNSEEN.sub(lambda match: f"[U+{ord(match[0]):04X}]", text)
