"""Seeds for named purposes, so that no draw depends on what was drawn before it or on global state."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

from cads.errors import ConfigError

BLOCK = 2**16
"""Names whose seeds are derived at once."""
WORD = 2**32
INIT_A, MULT_A, INIT_B, MULT_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
MIX_LEFT, MIX_RIGHT = 0xCA01F9DD, 0x4973F715
"""Constants of `numpy.random.SeedSequence`, which NumPy keeps as they are so that seeds stay what they are."""
POOL = 4
"""Words of 32 bits into which it mixes."""


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that depends on `seed` and on what it is for.

    Raises:
        ConfigError: if the seed is negative.
    """
    if seed < 0:
        raise ConfigError(f"seed = {seed}: it must be >= 0")
    words = [int.from_bytes(_hashed(str(p).encode()), "little") for p in purpose]
    state = np.random.SeedSequence([seed, *words]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def derive_each(seed: int, names: pa.Array) -> np.ndarray:
    """`derive(seed, name)` of each of many names (strings), int64, shape (n,).

    Raises:
        ConfigError: if the seed is negative, or has more than 64 bits.
    """
    if not 0 <= seed < WORD**2:
        raise ConfigError(f"seed = {seed}: it must be >= 0 and below 2^64")
    own = [seed % WORD, seed // WORD] if seed >= WORD else [seed]
    found = np.empty(len(names), dtype=np.int64)
    for start in range(0, len(names), BLOCK):
        block = names.slice(start, BLOCK).cast(pa.binary()).to_pylist()
        hashed = np.frombuffer(b"".join(map(_hashed, block)), "<u4").reshape(-1, 2)
        found[start : start + BLOCK] = _mixed(own, hashed.astype(np.uint32))
    return found


def _hashed(name: bytes) -> bytes:
    """The entropy that a name gives: 64 bits."""
    return hashlib.sha256(name).digest()[:8]


def _mixed(own: list[int], hashed: np.ndarray) -> np.ndarray:
    """`SeedSequence([*own, *row]).generate_state(1, np.uint64)[0] >> 1` for each row of `hashed` (uint32, (n, 2)).

    Words that are missing count as zeros there, so that it makes no difference that a small number has one word.
    """
    words = [np.full(len(hashed), w, dtype=np.uint32) for w in own] + [hashed[:, 0], hashed[:, 1]]
    words += [np.zeros(len(hashed), dtype=np.uint32)] * (POOL - len(words))
    constant = INIT_A

    def stirred(value: np.ndarray) -> np.ndarray:
        nonlocal constant
        before, constant = constant, constant * MULT_A % WORD
        return _folded((value ^ np.uint32(before)) * np.uint32(constant))

    pool = [stirred(word) for word in words]
    for source in range(POOL):
        for to in range(POOL):
            if to != source:
                other = stirred(pool[source])
                pool[to] = _folded(pool[to] * np.uint32(MIX_LEFT) - other * np.uint32(MIX_RIGHT))
    low, high = (
        _folded((pool[i] ^ np.uint32(INIT_B * MULT_B**i % WORD)) * np.uint32(INIT_B * MULT_B ** (i + 1) % WORD))
        for i in range(2)
    )
    return ((high.astype(np.uint64) << np.uint64(32) | low) >> np.uint64(1)).astype(np.int64)


def _folded(x: np.ndarray) -> np.ndarray:
    return x ^ (x >> np.uint32(16))
