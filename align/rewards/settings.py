"""Which source a reward setting names; torch-free, because a plan is checked before torch is
imported.
"""

import re
from pathlib import Path

from align.errors import ConfigError

ROLE, JUDGE, FUNCTION, MODEL = "role", "judge", "function", "model"
DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def kind_of(reward: str) -> str:
    """`role`, `judge`, a `path.to:function`, or a `model`: a folder or a hub id.

    Raises:
        ConfigError: none of these.
    """
    if reward in (ROLE, JUDGE):
        return reward
    if DOTTED.fullmatch(reward):
        return FUNCTION
    if Path(reward).is_dir() or HUB_ID.fullmatch(reward):
        return MODEL
    raise ConfigError(
        f"algorithm.reward={reward}: neither a source of rewards nor an existing folder; type role "
        "(the reward model that the run trains), judge, path.to:function, or a reward model's "
        "folder or hub id"
    )
