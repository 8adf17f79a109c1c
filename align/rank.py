"""What each process of `accelerate launch` runs: one step of a run whose configuration is frozen.
No Hydra here.
"""

import hashlib
import logging
import sys
from pathlib import Path

from omegaconf import OmegaConf

from align.artifacts import read_json
from align.config import read_config
from align.errors import AlignError
from align.launch import SAID, die_with_parent
from align.named import named_module
from align.notice import notice
from align.plan import plan


def main(request_file: str) -> None:
    """Exit status 1 and one line for an error of the user's, whichever process meets it."""
    die_with_parent()
    request = read_json(Path(request_file))
    config = read_config(OmegaConf.to_container(OmegaConf.load(request["config"])))  # type: ignore[arg-type]
    step = next(s for s in plan(config, yaml="", command="") if s.name == request["step"])
    inputs = {name: Path(path) for name, path in request["inputs"].items()}
    # A rank that stops early is reported by its own line, not by the agent's traceback.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        named_module("align.stages", step.stage).run(step.settings, inputs, Path(request["out"]))
    except AlignError as error:
        if first_to_say(str(error), Path(request_file).parent):
            notice(f"error: {error}")
        sys.exit(1)


def first_to_say(message: str, folder: Path) -> bool:
    """Of several processes that meet the same error one speaks."""
    name = f"{SAID}{hashlib.sha256(message.encode()).hexdigest()[:16]}"
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1])
