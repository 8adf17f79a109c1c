"""A name on the command line is the module of that name in its room; code from outside is named by
`module:`.
"""

import importlib
from types import ModuleType

from align.errors import ConfigError


def named_module(room: str, name: str, module: str | None = None) -> ModuleType:
    """The module that does the work of `name`. Example: `named_module("align.judge", "rubric")`.

    Raises:
        ConfigError: the user's module cannot be imported.
    """
    try:
        return importlib.import_module(module or f"{room}.{name}")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"module={module or name}: cannot be imported ({error}); put its folder on PYTHONPATH"
        ) from error
