"""Characters that a reader, or a judge, must see rather than be led by.

Control and format characters, line and paragraph separators, bidirectional marks, zero-width
spaces, lone surrogates and the invisible tag block. Tab, newline and the joiners that scripts and
emoji need are left alone.
"""

import re

UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)
