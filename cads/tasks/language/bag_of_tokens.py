"""What texts are about, in numbers that no model computes: the shares of their tokens, in buckets of token ids."""

from __future__ import annotations

import numpy as np

from cads.tasks.language.tokens import Tokens

N_BUCKETS = 4096
"""Token ids that are equal modulo this share a bucket."""


def token_shares(tokens: Tokens, positions: np.ndarray) -> np.ndarray:
    """The share of each bucket in the tokens of some sequences, float32, shape (n, N_BUCKETS); rows have sum 1."""
    starts, sizes = tokens.offsets[positions], tokens.lengths()[positions]
    rows = np.repeat(np.arange(len(positions)), sizes)
    indices = np.arange(len(rows)) + np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
    cells = rows * N_BUCKETS + tokens.ids[indices] % N_BUCKETS
    counts = np.bincount(cells, minlength=len(positions) * N_BUCKETS).reshape(-1, N_BUCKETS)
    return np.asarray(counts / sizes[:, None], dtype=np.float32)


def sharing_flops(tokens: Tokens) -> float:
    """FLOPs of `token_shares` for a mean sequence: one a token, and a division a bucket."""
    return float(tokens.lengths().mean()) + N_BUCKETS
