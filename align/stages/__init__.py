"""The verbs: one file per stage, each with one public `run`."""
