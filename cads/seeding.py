"""Seeds derived from a purpose, so that no draw depends on earlier draws or on global state."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa

from cads.errors import ConfigError

BLOCK = 2**16
"""Names whose seeds are derived at a time."""
WORD = 2**32
"""Number of values of a 32-bit word."""
INIT_A, MULT_A, INIT_B, MULT_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
MIX_LEFT, MIX_RIGHT = 0xCA01F9DD, 0x4973F715
"""Constants of `numpy.random.SeedSequence`. NumPy guarantees that they do not change."""
POOL_SIZE = 4
"""32-bit words in the entropy pool of `numpy.random.SeedSequence`."""


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed that depends on `seed` and `purpose`.

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
    seed_words = [seed % WORD, seed // WORD] if seed >= WORD else [seed]
    seeds = np.empty(len(names), dtype=np.int64)
    for start in range(0, len(names), BLOCK):
        block = names.slice(start, BLOCK).cast(pa.binary()).to_pylist()
        name_words = np.frombuffer(b"".join(map(_hashed, block)), "<u4").reshape(-1, 2)
        seeds[start : start + BLOCK] = _seed_sequence(seed_words, name_words.astype(np.uint32))
    return seeds


def _hashed(name: bytes) -> bytes:
    """The entropy of a name: 64 bits of its SHA-256."""
    return hashlib.sha256(name).digest()[:8]


def _seed_sequence(seed_words: list[int], name_words: np.ndarray) -> np.ndarray:
    """`SeedSequence([*seed_words, *row]).generate_state(1, np.uint64)[0] >> 1` for each row of `name_words`.

    `SeedSequence` fills missing words with zeros, so that a number with one word needs no second one.

    Args:
        seed_words: the seed as one or two 32-bit words, the lowest first.
        name_words: uint32, shape (n, 2).

    Returns:
        the seeds, int64, shape (n,).
    """
    n = len(name_words)
    words = [np.full(n, word, dtype=np.uint32) for word in seed_words] + [name_words[:, 0], name_words[:, 1]]
    words += [np.zeros(n, dtype=np.uint32)] * (POOL_SIZE - len(words))
    constant = INIT_A

    def hashmix(value: np.ndarray) -> np.ndarray:
        nonlocal constant
        previous, constant = constant, constant * MULT_A % WORD
        return _xorshift((value ^ np.uint32(previous)) * np.uint32(constant))

    pool = [hashmix(word) for word in words]
    for source in range(POOL_SIZE):
        for destination in range(POOL_SIZE):
            if destination != source:
                mixed = hashmix(pool[source])
                pool[destination] = _xorshift(pool[destination] * np.uint32(MIX_LEFT) - mixed * np.uint32(MIX_RIGHT))
    low, high = (
        _xorshift((pool[i] ^ np.uint32(INIT_B * MULT_B**i % WORD)) * np.uint32(INIT_B * MULT_B ** (i + 1) % WORD))
        for i in range(2)
    )
    return ((high.astype(np.uint64) << np.uint64(32) | low) >> np.uint64(1)).astype(np.int64)


def _xorshift(x: np.ndarray) -> np.ndarray:
    """The final step of each hash in `numpy.random.SeedSequence`."""
    return x ^ (x >> np.uint32(16))
