"""Checkpoints that can be trusted: a mark is set when one is whole on disk and taken off before one
is removed.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from align.artifacts import read_json, write_json

COMPLETE = "complete"
STATE = "trainer_state.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def checkpoint(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def step_of(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def mark_complete(path: Path) -> None:
    """Writes the mark once everything else is on disk."""
    for file in path.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    (path / COMPLETE).touch()


def discard(path: Path) -> None:
    """Removes a checkpoint, its mark first, so that a half-removed one is never resumed from."""
    (path / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path)


def remove_incomplete(folder: Path) -> None:
    """Removes checkpoints whose writing or removal was cut short."""
    for path in folder.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)


def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps."""
    found = [path for path in folder.glob("checkpoint-*") if (path / COMPLETE).exists()]
    return max(found, key=step_of, default=None)


def history(path: Path) -> list[dict[str, Any]]:
    """What was logged up to a checkpoint."""
    logged: list[dict[str, Any]] = json.loads((path / STATE).read_text(encoding="utf-8"))[
        "log_history"
    ]
    return logged


def best(logged: Sequence[Mapping[str, Any]], *, pairs: int) -> Mapping[str, Any]:
    """The measurement to keep: the newest, unless an earlier one ranked held-out pairs better.

    Better is what noise does not explain: a difference of more than one pair, and of more than the
    standard error of the highest accuracy, sqrt(a (1 - a) / pairs). With 40 pairs held out, one of
    them ranked otherwise must not throw half of a training away. Held-out loss does not decide: it
    rises with the margins while the answers still improve.

    Args:
        logged: lines with `eval_accuracy`; others are passed over.
        pairs: how many were held out.
    """
    newest, top = newest_and_top(logged)
    a = float(top["eval_accuracy"])
    noise = max(math.sqrt(a * (1 - a) / pairs), 1 / pairs) + 1e-9
    return newest if newest["eval_accuracy"] >= a - noise else top


def newest_and_top(
    logged: Sequence[Mapping[str, Any]],
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The last measurement and the most accurate one, the later of equals: what may still be the
    best later on is one of the two.
    """
    measured = [line for line in logged if "eval_accuracy" in line]
    return measured[-1], max(reversed(measured), key=lambda line: float(line["eval_accuracy"]))


def keep_only(folder: Path, steps: set[int]) -> None:
    for path in folder.glob("checkpoint-*"):
        if step_of(path) not in steps:
            discard(path)


def export_adapter(path: Path, out: Path) -> None:
    """Copies a checkpoint's adapter to `out`, whole or not at all: plain PEFT, nothing that runs
    code on load.
    """
    partial = out.with_name(f".{out.name}.partial")
    for old in (partial, out):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir()
    for name in ADAPTER_FILES:
        shutil.copyfile(path / name, partial / name)
    # PEFT writes a set in the order of the process's hash seed; sorted, equal runs leave equal
    # files.
    config = read_json(partial / "adapter_config.json")
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key] = sorted(set(config[key]))
    write_json(partial / "adapter_config.json", config)
    partial.rename(out)
