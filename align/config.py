"""The door: turns the composed configuration into checked dataclasses. Besides run.py the only
place that knows OmegaConf.

A node with a `name` is read by the dataclass of that name (`dpo` → `Dpo`) in its room's
settings.py, or by `Settings` of the user's own `module`. Values come from YAML alone, so a default
lives once.
"""

import contextlib
import dataclasses
import difflib
import importlib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError

from align.algorithms.settings import PairTraining
from align.checks import check_choice, check_range
from align.errors import ConfigError, keyed
from align.models.settings import Full, Lora, Model
from align.samplers.settings import Hf
from align.sources.settings import Source
from align.stages.settings import Evaluate, Label

PACKAGE = Path(__file__).parent
STAGES = ("generate", "label", "reward", "train", "evaluate")
MODES = ("auto", "inline", "accelerate")


def shipped(folder: str, clone_folder: str) -> Path:
    """Where a folder of data stands: inside the installed package, or beside it in a clone."""
    inside = PACKAGE / folder
    return inside if inside.is_dir() else PACKAGE.parent / clone_folder


CONF = shipped("conf", "conf")
STARTER = shipped("starter", "data/starter")


def register_resolvers() -> None:
    """`${starter:FILE}` is the path of a file of the starter kit, `${conf:FILE}` of the shipped
    configuration, wherever the package is installed.
    """
    OmegaConf.register_new_resolver("conf", lambda file: str(CONF / file), replace=True)
    OmegaConf.register_new_resolver("starter", lambda file: str(STARTER / file), replace=True)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How the training is started; cannot change what comes out, so it is in no fingerprint."""

    mode: str
    processes: int | None
    threads: int | None

    def __post_init__(self) -> None:
        check_choice("launch.mode", self.mode, MODES)
        for key in ("processes", "threads"):
            value = getattr(self, key)
            if value is not None:
                check_range(f"launch.{key}", value, low=1)


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run, checked."""

    recipe_name: str
    stages: list[str]
    name: str
    workspace: str
    seed: int
    verify: bool
    retry: bool
    model: Model
    adapter: Lora | Full
    data: Source
    sampler: Hf
    judge: Any
    label: Label
    algorithm: Any
    reward: PairTraining | None
    reward_adapter: Lora | Full
    evaluate: Evaluate
    launch: Launch

    def __post_init__(self) -> None:
        if not self.stages:
            raise ConfigError(f"stages=[]: nothing to do; choose among {', '.join(STAGES)}")
        for stage in self.stages:
            check_choice("stages", stage, STAGES)
        if self.name in (".", "..", "artifacts") or "/" in self.name or not self.name.strip():
            raise ConfigError(
                f"name={self.name}: must be a folder name of its own; type name=my-run"
            )
        check_range("seed", self.seed, low=0, high=2**31 - 1)


ROOMS = {
    "model": "align.models",
    "adapter": "align.models",
    "reward_adapter": "align.models",
    "data": "align.sources",
    "sampler": "align.samplers",
    "judge": "align.judge",
    "evaluate.judge": "align.judge",
    "algorithm": "align.algorithms",
    "reward": "align.algorithms",
}
# Nodes that stand in another place than their group's: reward is typed algorithm@reward=NAME.
GROUPS = {"reward": "algorithm", "reward_adapter": "adapter"}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def plain(composed: DictConfig) -> dict[str, Any]:
    """Resolved and free of OmegaConf."""
    if composed.get("recipe_name") is None:
        raise ConfigError(f"no recipe given; type recipe=NAME ({', '.join(options('recipe'))})")
    return resolved(composed)


def resolved(composed: DictConfig) -> dict[str, Any]:
    """Plain values, Hydra's own node left out.

    Raises:
        ConfigError: a value that is missing, or that refers to one that is.
    """
    try:
        tree = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or "a setting"
        raise ConfigError(f"{key} has no value; type {key}=VALUE") from error
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    return typing.cast(dict[str, Any], tree)


def read_config(tree: Mapping[str, Any]) -> Config:
    """The checked configuration, from composed values or from those of a frozen config.yaml.

    Raises:
        ConfigError: an unknown, missing or unfit setting, in one line that names its key.
    """
    return typing.cast(Config, build(Config, tree, ""))


def options(group: str) -> list[str]:
    """The names that a group of the shipped configuration offers."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def build(cls: type[Any], node: Mapping[str, Any], prefix: str, *, group: str | None = None) -> Any:
    """`cls` from a mapping: no key unknown, none missing, each value of its type.

    Args:
        group: by whose name it speaks of its settings, where it may stand in several places.
    """
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]
    for key in node:
        if key not in known:
            full = [f"{prefix}{name}" for name in known]
            raise ConfigError(
                f"{prefix}{key}: no such setting{did_you_mean(f'{prefix}{key}', full)}"
            )
    missing = [key for key in known if key not in node]
    if missing:
        raise ConfigError(f"{prefix}{missing[0]} has no value; type {prefix}{missing[0]}=VALUE")
    rooms = {f.name: f.metadata["room"] for f in dataclasses.fields(cls) if "room" in f.metadata}
    values = {
        key: nested(f"{prefix}{key}", rooms[key], node[key])
        if key in rooms
        else convert(f"{prefix}{key}", hints[key], node[key])
        for key in known
    }
    with keyed(prefix.rstrip("."), own=group) if group else contextlib.nullcontext():
        return cls(**values)


def nested(key: str, room: str, node: Any) -> Any:
    """A node of another room inside of this one (a judge's judge), or several by name."""
    if node is None:
        return None
    if isinstance(node, Mapping) and "name" not in node:
        return {name: nested(f"{key}.{name}", room, part) for name, part in node.items()}
    return build_named(key, room, Any, node)


def convert(key: str, hint: Any, value: Any) -> Any:
    hint = optional(hint) if value is not None else hint
    if key in ROOMS:
        return build_named(key, ROOMS[key], hint, value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"{key}={value}: is a group of settings, not a value; type {key}.SETTING=VALUE"
            )
        group = {Model: "model", Lora: "adapter"}.get(typing.cast(Any, hint))
        return build(typing.cast(type[Any], hint), value, f"{key}.", group=group)
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(hint, config=ConfigDict(coerce_numbers_to_str=True))
        return adapter.validate_python(value)
    except ValidationError as error:
        wanted = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise ConfigError(f"{key}={value}: must be {wanted}") from error


def optional(hint: Any) -> Any:
    """The dataclass of `X | None`; other hints as they are."""
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    return parts[0] if len(parts) == 1 and dataclasses.is_dataclass(parts[0]) else hint


def build_named(key: str, room: str, hint: Any, node: Any) -> Any:
    """The dataclass that reads one group's node; None for a judge or an algorithm called none."""
    if not isinstance(node, Mapping):
        folder = "judge" if "." in key else GROUPS.get(key, key)
        typed = key if folder == key else f"{folder}@{key}"
        raise ConfigError(
            f"{key}={node}: is a group, not a value; type {typed}=NAME with a file of "
            f"conf/{folder}/"
        )
    if GROUPS.get(key, key) == "adapter":
        chosen = Full if node.get("name") == "full" else Lora
        return build(chosen, node, f"{key}.", group="adapter")
    if key == "model":
        return build(hint, node, f"{key}.")
    name, module = node.get("name"), node.get("module")
    if name == "none":
        return None
    group = {ROOMS["judge"]: "judge", ROOMS["algorithm"]: "algorithm"}.get(room)
    made = build(settings_class(room, str(name), module, key), node, f"{key}.", group=group)
    if group:
        with contextlib.suppress(AttributeError):  # of a class of the user's that has slots
            object.__setattr__(made, "_stands_at", key)
    return made


def settings_class(room: str, name: str, module: str | None, key: str) -> type[Any]:
    """The dataclass of a name: `Settings` of the user's module, else `<Name>` in the room's
    settings.
    """
    if module is not None:
        try:
            return typing.cast(type[Any], importlib.import_module(module).Settings)
        except ImportError as error:
            raise ConfigError(
                f"{key}.module={module}: cannot be imported ({error}); put its folder on PYTHONPATH"
            ) from error
        except AttributeError as error:
            raise ConfigError(
                f"{key}.module={module}: has no dataclass called Settings; add one"
            ) from error
    settings = importlib.import_module(f"{room}.settings")
    found = getattr(settings, name.title().replace("_", ""), None)
    if found is None:
        raise ConfigError(
            f"{key}.name={name}: nothing of that name in {room}; set {key}.module for your own"
        )
    return typing.cast(type[Any], found)
