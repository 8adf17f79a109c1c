"""align: aligns language models to preferences."""

import os

# transformers' and trl's trainers report each start to a server unless this is set before they are
# imported.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
