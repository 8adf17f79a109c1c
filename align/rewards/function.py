"""Rewards from a Python function of the user's, sync or async."""

import asyncio
import importlib
import inspect
import math
import traceback
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from align.errors import ConfigError, StageError, first_line
from align.rewards.source import Sample


class FunctionReward:
    """`path.to:function`, called as function(prompts, responses) with two lists of equal length:
    `Prompt` records (`.messages`, `.meta`) and texts. It returns a number for each, or None.
    """

    def __init__(self, path: str) -> None:
        self.name = path
        self.function = found(path)

    def scores(self, samples: Sequence[Sample]) -> list[float | None]:
        """
        Raises:
            StageError: the function failed, or gave something else than a number for each.
        """
        given = self.called([s.prompt for s in samples], [s.text for s in samples])
        if not isinstance(given, Sequence | set) and hasattr(given, "tolist"):
            given = given.tolist()  # a tensor or an array
        if not isinstance(given, Sequence) or len(given) != len(samples):
            count = len(given) if isinstance(given, Sequence) else type(given).__name__
            raise self.refused(
                f"gave {count} for {len(samples)} responses", "return one number for each, in order"
            )
        return [self.checked(value, sample) for value, sample in zip(given, samples, strict=True)]

    def called(self, prompts: list[Any], responses: list[str]) -> Any:
        try:
            given = self.function(prompts, responses)
            if inspect.isawaitable(given):
                return asyncio.run(awaited(given))
            return given
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raise self.refused(
                f"failed at {last.filename}:{last.lineno} ({type(error).__name__}: {error})",
                "mend it",
            ) from error

    def checked(self, value: Any, sample: Sample) -> float | None:
        if value is None:
            return None
        if not isinstance(value, Real) or not math.isfinite(float(value)):
            raise self.refused(
                f"gave {value!r} for a response to prompt {sample.prompt.id}",
                "return finite numbers, or None where there is none",
            )
        return float(value)

    def refused(self, what: str, remedy: str) -> StageError:
        told = " ".join(what.split())
        return StageError(
            f"algorithm.reward={self.name}: {told}; {remedy}. The same command goes on from the "
            "last checkpoint; with another text of the function's module it is another training, "
            "and begins anew"
        )


async def awaited(given: Any) -> Any:
    return await given


def found(path: str) -> Callable[[list[Any], list[str]], Any]:
    """The function of a path.

    Raises:
        ConfigError: there is none.
    """
    module, _, name = path.partition(":")
    try:
        imported = importlib.import_module(module)
    except Exception as error:  # whatever stands in a user's file
        reason = f"{type(error).__name__}: {first_line(error)}"
        remedy = "put its folder on PYTHONPATH" if isinstance(error, ImportError) else "mend it"
        raise ConfigError(
            f"algorithm.reward={path}: {module} cannot be imported ({reason}); {remedy}"
        ) from error
    function = getattr(imported, name, None)
    if function is None:
        raise ConfigError(f"algorithm.reward={path}: {module} has no {name}; check it")
    if not callable(function):
        raise ConfigError(f"algorithm.reward={path}: {name} is no function; name one")
    return function  # type: ignore[no-any-return]
