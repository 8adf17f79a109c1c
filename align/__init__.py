"""align: aligns language models to preferences."""

import logging
import os

# transformers' and trl's trainers report each start to a server unless this is set before they are
# imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

# bitsandbytes advises at import to fetch kernels from a hub; real errors still show.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

__version__ = "0.1.0"
