"""Checkpoints of a PPO run: all that a resumed run needs to go on bit for bit. One file, written
whole or not at all, read without executing anything.
"""

import io
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy
import torch

from align.errors import StageError, first_line
from align.models.roles import Roles

STATE = "checkpoint.pt"


def save_state(
    path: Path,
    *,
    roles: Roles,
    optimizer: torch.optim.Optimizer,
    random_states: Sequence[torch.Tensor],
    progress: Mapping[str, Any],
) -> None:
    """Weights of every trained role, optimizer, each process's random state, and `progress`: plain
    values.
    """
    state = {
        "trained": {name: [p.detach() for p in parts] for name, parts in trained(roles).items()},
        "optimizer": optimizer.state_dict(),
        "random": list(random_states),
        "progress": dict(progress),
    }
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_state(
    path: Path, *, roles: Roles, optimizer: torch.optim.Optimizer, rank: int
) -> dict[str, Any] | None:
    """Puts everything back and returns `progress`; None where there is no checkpoint.

    Args:
        rank: whose random state is taken; with more processes than before, the new ones keep
            theirs.

    Raises:
        StageError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for name, parts in trained(roles).items():
                for parameter, value in zip(parts, state["trained"][name], strict=True):
                    parameter.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
        if rank < len(state["random"]):
            restore_random(state["random"][rank])
    except (RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise StageError(
            f"{path}: a damaged checkpoint ({first_line(error)}); remove it, and the same command "
            "begins this stage anew"
        ) from error
    progress: dict[str, Any] = state["progress"]
    return progress


def trained(roles: Roles) -> dict[str, list[torch.nn.Parameter]]:
    found = {name: roles.parameters(name) for name in roles.bound}
    return {name: parts for name, parts in found.items() if parts}


def random_state() -> torch.Tensor:
    """Of this process's generators, as bytes, [n]: the library draws from its own, a user's
    function may not.
    """
    version, numbers, gauss = random.getstate()
    drawn: Any = numpy.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = drawn
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": cuda,
    }
    written = io.BytesIO()
    torch.save(state, written)
    return torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8)


def restore_random(saved: torch.Tensor) -> None:
    state = torch.load(io.BytesIO(saved.numpy().tobytes()), weights_only=True)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
