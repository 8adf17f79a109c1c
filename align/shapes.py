"""What of a step's settings shapes its output, as plain values for a fingerprint."""

import importlib.util
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from align.artifacts import HashCache, files_below
from align.models.settings import Model
from align.rewards.settings import FUNCTION, MODEL, kind_of


def shape(value: Any, hashes: HashCache) -> Any:
    """What of a step's settings shapes its output, as plain values: paths become the hashes of what
    they hold.
    """
    if isinstance(value, Model):
        known = {f.name: shape(getattr(value, f.name), hashes) for f in fields(value)}
        if Path(value.name).is_dir():
            known |= {"name": hashes.content(Path(value.name)), "revision": None}
        if value.chat_template is not None:
            known["chat_template"] = hashes.content(Path(value.chat_template))
        return known
    if is_dataclass(value) and not isinstance(value, type):
        shaping = {}
        for f in fields(value):
            part, mark = getattr(value, f.name), f.metadata.get("fingerprint")
            if mark == "content" and part is not None:
                shaping[f.name] = contents(part, hashes)
            elif mark == "template":
                shipped = Path(getattr(value, f.metadata["shipped"]))
                shaping[f.name] = template(Path(part), shipped, hashes)
            elif mark == "reward":
                shaping[f.name] = reward(part, hashes)
            elif f.name == "module" and part is not None:
                shaping[f.name] = source(part, hashes)
            elif mark != "ignore":
                shaping[f.name] = shape(part, hashes)
        return shaping
    if isinstance(value, Mapping):
        return {key: shape(part, hashes) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [shape(part, hashes) for part in value]
    return value


def contents(paths: str | Mapping[str, str], hashes: HashCache) -> Any:
    """Hash of what a path holds, or of each of several paths by name."""
    if isinstance(paths, Mapping):
        return {name: hashes.content(Path(path)) for name, path in paths.items()}
    return hashes.content(Path(paths))


def template(path: Path, shipped: Path, hashes: HashCache) -> dict[str, str | None]:
    """Hash of each file that a prompt's template is made of, by name. A folder counts without the
    workspace, which changes with every run.
    """
    from align.judge.template_files import template_files  # jinja2 is slow to load

    workspace = hashes.path.parent.parent.resolve()
    shaping: dict[str, str | None] = {}
    for name, file in sorted(template_files(path, shipped).items()):
        if name == path.name:
            name = ""  # what the file is called shapes nothing
        if file is None or file.is_file():
            shaping[name] = None if file is None else hashes.content(file)
            continue
        for part in files_below(file):
            if file.resolve() not in workspace.parents or workspace not in part.resolve().parents:
                shaping[f"{name}/{part.relative_to(file).as_posix()}"] = hashes.content(part)
    return shaping


def source(module: str, hashes: HashCache) -> str:
    """Hash of a user's module: its file, or all files of its package. What it imports from
    elsewhere does not count.
    """
    try:
        spec = importlib.util.find_spec(module)  # of a.b it imports a
    except Exception:  # whatever stands in a user's file; who loads the module says it in a line
        return module
    if spec is None or spec.origin is None:
        return module
    file = Path(spec.origin)
    return hashes.content(file.parent if spec.submodule_search_locations else file)


def reward(name: str, hashes: HashCache) -> Any:
    """A function counts with the source of its module, a model's folder by its content; the rest by
    name.
    """
    kind = kind_of(name)
    if kind == FUNCTION:
        return {"function": name, "source": source(name.partition(":")[0], hashes)}
    if kind == MODEL and Path(name).is_dir():
        return {"model": hashes.content(Path(name))}
    return name
