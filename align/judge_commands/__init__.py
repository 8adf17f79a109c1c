"""What `python -m align.judge` does, a file a sub-command."""
