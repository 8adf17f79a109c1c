"""How candidates are made."""
