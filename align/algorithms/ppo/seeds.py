"""A seed of its own for each use of one."""

import hashlib


def derived(seed: int, *what: str | int) -> int:
    """31 bits that depend on all of it. Example: `derived(0, "rollout", 17)`."""
    told = "/".join(map(str, (seed, *what))).encode()
    return int.from_bytes(hashlib.sha256(told).digest()[:4]) >> 1
