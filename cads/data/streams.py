"""Endless sequences of positions in a pool, each element a pure function of (seed, place)."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from cads.data.permutation import ROUNDS, feistel_permutation
from cads.errors import DataError

SHUFFLED = 2**20
"""Positions whose whole order is drawn at once, up to here; of more, places are computed as they are asked for."""


class Stream(Protocol):
    """An endless sequence of positions in a pool."""

    @property
    def period(self) -> int:
        """Elements after which positions come again; more of them are never sorted together."""
        ...

    def take(self, start: int, count: int) -> np.ndarray:
        """Elements start .. start+count-1 of the sequence, int64, shape (count,)."""
        ...


class ShuffledStream:
    """All `positions` once an epoch, in an order drawn anew for each epoch from (seed, epoch).

    Up to `SHUFFLED` of them are shuffled. Of more, a cipher says what stands at a place, so that a short run over a
    large pool takes time and memory by what it sees, not by what there is.

    Raises:
        DataError: if there is no position.
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
        """Elements start .. start+count-1 of the concatenated epochs."""
        pieces = []
        while count > 0:
            epoch, offset = divmod(start, len(self._positions))
            piece = self._part(epoch, offset, min(count, len(self._positions) - offset))
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate([self._positions[:0], *pieces])

    def _part(self, epoch: int, offset: int, count: int) -> np.ndarray:
        """What stands at `count` places of an epoch, from `offset` on."""
        n = len(self._positions)
        if n <= SHUFFLED:
            return self._permutation(epoch)[offset : offset + count]
        keys = np.random.SeedSequence((self._seed, epoch)).generate_state(ROUNDS, np.uint64)
        return self._positions[feistel_permutation(np.arange(offset, offset + count), n, keys)]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(self._positions)
            self._order = (epoch, order)
        return self._order[1]


class WeightedStream:
    """Draws with replacement, position i in proportion to weights[i] (shape (N,), >= 0, not all 0).

    What stands at a place depends on how the sequence is cut: take the same number at a time.

    Raises:
        DataError: if the weights are negative, not finite, or all zero.
    """

    def __init__(self, weights: np.ndarray, seed: int) -> None:
        if not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
            raise DataError("weights to draw by must be finite, >= 0 and not all zero")
        self._cumulative = np.cumsum(weights, dtype=np.float64)
        self._seed = seed

    @property
    def period(self) -> int:
        """The number of positions that can be drawn."""
        grown = np.count_nonzero(self._cumulative[1:] > self._cumulative[:-1])
        return int(grown) + int(self._cumulative[0] > 0)

    def take(self, start: int, count: int) -> np.ndarray:
        """Elements start .. start+count-1; the generator is seeded by (seed, start)."""
        u = np.random.default_rng((self._seed, start)).random(count) * self._cumulative[-1]
        drawn = np.searchsorted(self._cumulative, u, side="right")
        return np.minimum(drawn, len(self._cumulative) - 1).astype(np.int64)
