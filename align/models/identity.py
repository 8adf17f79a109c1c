"""Which model exactly: the hub's commit or the content of a folder, found without loading
anything.
"""

import contextlib
from dataclasses import replace
from pathlib import Path

from align.errors import ConfigError
from align.models.settings import Model


def pinned(settings: Model) -> Model:
    """The same model with a hub branch or tag resolved to its commit; a local folder stays as it
    is.

    Raises:
        ConfigError: neither a folder nor a model that the hub (or its local cache, when offline)
        knows.
    """
    if Path(settings.name).is_dir():
        if not (Path(settings.name) / "config.json").is_file():
            raise ConfigError(
                f"model.name={settings.name}: a folder without config.json; give a model in "
                "Hugging Face format"
            )
        return settings
    return replace(settings, revision=hub_commit(settings.name, settings.revision))


def hub_commit(name: str, revision: str | None) -> str:
    """The commit of a hub model, asked from the hub, or from the local cache when the hub cannot be
    reached.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    reason = "no such folder, none of that name in the local hub cache, and HF_HUB_OFFLINE is set"
    try:
        if not constants.HF_HUB_OFFLINE:
            sha = HfApi().model_info(name, revision=revision, timeout=20).sha
            if sha:
                return sha
    except HFValidationError:
        reason = "no such folder, and no hub id of the form owner/name"
    except (
        Exception
    ) as error:  # the hub's client raises its HTTP library's errors, which change with it
        reason = f"no such folder, and the hub did not give it ({type(error).__name__})"
    if "hub id" not in reason:
        with contextlib.suppress(HFValidationError):  # offline, nothing has looked at it yet
            cached = try_to_load_from_cache(name, "config.json", revision=revision)
            if isinstance(cached, str):
                return Path(cached).parent.name
    at = f" (revision {revision})" if revision else ""
    raise ConfigError(
        f"model.name={name}{at}: {reason}; check the spelling or give an existing folder"
    )
