"""Seeds for named purposes, so that no draw depends on what was drawn before it or on global state."""

from __future__ import annotations

import hashlib

import numpy as np

from cads.errors import ConfigError


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that depends on `seed` and on what it is for.

    Raises:
        ConfigError: if the seed is negative.
    """
    if seed < 0:
        raise ConfigError(f"seed = {seed}: it must be >= 0")
    words = [int.from_bytes(hashlib.sha256(str(p).encode()).digest()[:8], "little") for p in purpose]
    state = np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
