"""Endless sequences of positions in a pool. Each element is a pure function of the seed and its index."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cads.data.permutation import ROUNDS, feistel_permutation
from cads.errors import DataError

SHUFFLED = 2**20
"""Maximum number of positions whose order is drawn at once. A longer order is computed by index, on demand."""


class Stream(Protocol):
    """An endless sequence of positions in a pool."""

    @property
    def period(self) -> int:
        """Number of elements after which positions repeat. It limits what `LengthBuckets` sorts together."""
        ...

    def take(self, start: int, count: int) -> np.ndarray:
        """Elements start .. start+count-1 of the sequence, int64, shape (count,)."""
        ...


class ShuffledStream:
    """All `positions` once an epoch, in an order drawn for each epoch from (seed, epoch).

    Up to `SHUFFLED` positions are shuffled as a whole. For more, a cipher computes the element at each index, so that
    the time and memory of a trial over a large pool grow with what the trial reads, not with the pool.

    Raises:
        DataError: if `positions` is empty.
    """

    def __init__(self, positions: np.ndarray, seed: int) -> None:
        if len(positions) == 0:
            raise DataError("nothing to train on: no example is selected; lower the threshold or raise the budget")
        self._positions = np.asarray(positions, dtype=np.int64)
        self._seed = seed
        self._order: tuple[int, np.ndarray] = (-1, self._positions)

    @property
    def period(self) -> int:
        """The length of an epoch."""
        return len(self._positions)

    def take(self, start: int, count: int) -> np.ndarray:
        """Elements start .. start+count-1 of the concatenated epochs, int64, shape (count,)."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, len(self._positions))
            part = self._within_epoch(epoch, offset, min(count, len(self._positions) - offset))
            parts.append(part)
            start, count = start + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else np.concatenate([self._positions[:0], *parts])

    def _within_epoch(self, epoch: int, offset: int, count: int) -> np.ndarray:
        """Elements offset .. offset+count-1 of an epoch."""
        n = len(self._positions)
        if n <= SHUFFLED:
            return self._permutation(epoch)[offset : offset + count]
        keys = np.random.SeedSequence((self._seed, epoch)).generate_state(ROUNDS, np.uint64)
        return self._positions[feistel_permutation(np.arange(offset, offset + count), n, keys)]

    def _permutation(self, epoch: int) -> np.ndarray:
        """All positions in the order of an epoch; the last epoch is cached."""
        if self._order[0] != epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(self._positions)
            self._order = (epoch, order)
        return self._order[1]


class WeightedStream:
    """Draws with replacement: position i with probability in proportion to weights[i] (shape (N,), >= 0, not all 0).

    Elements depend on how the sequence is divided into calls of `take`: always take the same number at a time.

    Args:
        weights: shape (N,). seed: of the draws.
        positions: that the weights are of, shape (N,); None for 0..N-1. Equal weights of equal examples in this order
            give equal draws.

    Raises:
        DataError: if the weights are negative, not finite, or all zero.
    """

    def __init__(self, weights: np.ndarray, seed: int, positions: np.ndarray | None = None) -> None:
        if not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
            raise DataError("weights to draw by must be finite, >= 0 and not all zero")
        self._cumulative = np.cumsum(weights, dtype=np.float64)
        self._seed = seed
        self._positions = positions

    @property
    def period(self) -> int:
        """The number of positions that can be drawn."""
        increases = np.count_nonzero(self._cumulative[1:] > self._cumulative[:-1])
        return int(increases) + int(self._cumulative[0] > 0)

    def take(self, start: int, count: int) -> np.ndarray:
        """Elements start .. start+count-1, int64, shape (count,); the generator is seeded by (seed, start)."""
        thresholds = np.random.default_rng((self._seed, start)).random(count) * self._cumulative[-1]
        drawn = np.searchsorted(self._cumulative, thresholds, side="right")
        drawn = np.minimum(drawn, len(self._cumulative) - 1).astype(np.int64)
        return drawn if self._positions is None else self._positions[drawn]
