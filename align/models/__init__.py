"""Base models, adapters and token log-probabilities."""
