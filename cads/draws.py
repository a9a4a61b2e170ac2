"""Which examples each training step sees: a pure function of (seed, step), so that any step can be resumed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from cads.errors import ConfigError, DataError
from cads.task import Batch, Pool

WINDOW = 64
"""Batches of examples with a length that are drawn together and then sorted, so that hardly anything is padding."""
SHUFFLED = 2**20
"""Positions whose whole order is drawn at once, up to here; of more, places are computed as they are asked for."""
ROUNDS = 6
"""Of the cipher that does so."""


class Stream(Protocol):
    """An endless sequence of positions in a pool."""

    @property
    def period(self) -> int:
        """Elements after which positions come again; more of them are never sorted together."""
        ...

    def take(self, start: int, count: int) -> np.ndarray:
        """Elements start .. start+count-1 of the sequence, int64, shape (count,)."""
        ...


class Epochs:
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
        return self._positions[enciphered(np.arange(offset, offset + count), n, keys)]

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(self._positions)
            self._order = (epoch, order)
        return self._order[1]


class Weighted:
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


def enciphered(places: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
    """Where a keyed permutation of 0..n-1 takes `places`, int64 like them.

    A Feistel network on pairs of digits in base m, the least m with m^2 >= n; what falls on n or above (at most
    2 sqrt(n) + 1 of the m^2 pairs stand for that) goes through it again until it does not.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, method "generalized Feistel" with
    cycle walking; the round function is the finalizer of SplitMix64.

    Args:
        places: in 0..n-1. keys: uint64, one a round.
    """
    m = np.uint64(math.isqrt(n - 1) + 1)
    found = np.asarray(places, dtype=np.uint64)
    outside = np.ones(len(found), dtype=bool)
    while outside.any():
        left, right = np.divmod(found[outside], m)
        for key in keys:
            left, right = right, (left + _mixed(right ^ key) % m) % m
        found[outside] = left * m + right
        outside = found >= n
    return found.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Bucketed:
    """A stream cut into batches of similar length.

    As many batches as `WINDOW` (or as the period of the stream holds) are drawn at once and sorted by length, ties
    by their place; the batches follow in an order drawn from (seed, window). Each window holds what the stream
    has there, so that every epoch still sees each example once.

    Args:
        stream: of positions. lengths: of the examples they stand for, shape (N,).
        count: examples in a batch. seed: of the order of the batches.
    """

    def __init__(self, stream: Stream, lengths: np.ndarray, count: int, seed: int) -> None:
        self._stream, self._lengths, self._count, self._seed = stream, lengths, count, seed
        self._batches = max(1, min(WINDOW, stream.period // count))
        self._window: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def batch(self, step: int) -> np.ndarray:
        """The positions of one step, int64, shape (count,)."""
        window, place = divmod(step, self._batches)
        if self._window[0] != window:
            self._window = (window, self._sorted(window))
        return self._window[1][place]

    def _sorted(self, window: int) -> np.ndarray:
        """All batches of a window, shape (batches, count)."""
        size = self._batches * self._count
        drawn = self._stream.take(window * size, size)
        rows = drawn[np.argsort(self._lengths[drawn], kind="stable")].reshape(self._batches, self._count)
        return np.random.default_rng((self._seed, window)).permutation(rows)


class Draws:
    """The training batches of K replicas.

    Where examples have a length (`pool.examples.lengths()`), batches hold examples of similar length; see `Bucketed`.

    Args:
        pool: what the streams point into.
        streams: one a replica.
        batch_size: B, examples a step and replica.
        target: the pool of target examples, needed if `target_fraction` > 0.
        target_fraction: share of each batch drawn from the target (joint training), 0 to 1.
        seed: of the order in which the target is visited.

    Raises:
        ConfigError: if `target_fraction` is no share, or there is no target for it.
    """

    def __init__(
        self,
        pool: Pool,
        streams: Sequence[Stream],
        batch_size: int,
        *,
        target: Pool | None = None,
        target_fraction: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not 0 <= target_fraction <= 1:
            raise ConfigError(f"target_fraction = {target_fraction}: a share of each batch, between 0 and 1")
        if target_fraction > 0 and target is None:
            raise ConfigError(f"target_fraction = {target_fraction} needs the target to draw from")
        self.pool = pool
        self.streams = list(streams)
        self.batch_size = batch_size
        self._target = target
        self._from_target = round(target_fraction * batch_size)
        self._seed = seed
        self._in_batches = [self._batched(pool, s, batch_size - self._from_target) for s in self.streams]
        if self._from_target and target is not None:
            stream = Epochs(np.arange(len(target)), seed)
            self._target_batches = self._batched(target, stream, self._from_target)

    @property
    def replicas(self) -> int:
        """K."""
        return max(1, len(self.streams))

    @property
    def from_pool(self) -> int:
        """Examples of a step and replica that come from the pool: they stand before those of the target."""
        return self.batch_size - self._from_target

    def only(self, *streams: Stream) -> Draws:
        """The draws of some of the replicas alone."""
        alone = copy.copy(self)
        alone.streams = list(streams)
        alone._in_batches = [self._batched(self.pool, s, self.batch_size - self._from_target) for s in streams]
        return alone

    def ids(self, pieces: list[Batch]) -> list[str]:
        """The ids of the examples in `pieces`, as `batches` gave them."""
        positions = np.concatenate([p.positions.numpy() for p in pieces])
        from_pool = (self.batch_size - self._from_target) if self._from_target else len(positions)
        ids: list[str] = self.pool.ids.take(positions[:from_pool]).to_pylist()
        if self._target is not None:
            ids += self._target.ids.take(positions[from_pool:]).to_pylist()
        return ids

    def batches(self, step: int) -> list[Batch]:
        """The pieces of one step, each holding its share of all K replicas, replica by replica.

        Pool and target examples stand in one piece where their shapes are equal, and they do not share rows.
        """
        pieces = []
        count = self.batch_size - self._from_target
        if count:
            positions = [batch(step) for batch in self._in_batches]
            pieces.append(self.pool.batch(np.concatenate(positions)))
        if self._from_target and self._target is not None:
            positions = [self._target_batches(step)]
            pieces.append(self._target.batch(np.concatenate(positions * self.replicas)))
        if len(pieces) == 2 and pieces[0].shape == pieces[1].shape and "row" not in pieces[0].inputs:
            return [_interleave(pieces, self.replicas)]
        return pieces

    def _batched(self, pool: Pool, stream: Stream, count: int) -> Callable[[int], np.ndarray]:
        """What gives the positions of a step (int64, shape (count,))."""
        lengths = getattr(pool.examples, "lengths", None)
        if callable(lengths) and count:
            return Bucketed(stream, lengths(), count, self._seed).batch
        return lambda step: stream.take(step * count, count)


def _interleave(pieces: list[Batch], replicas: int) -> Batch:
    """Concatenate batches so that each replica's examples stay together."""

    def join(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([x.unflatten(0, (replicas, -1)) for x in tensors], dim=1).flatten(0, 1)

    return Batch(
        inputs={name: join([p.inputs[name] for p in pieces]) for name in pieces[0].inputs},
        labels=join([p.labels for p in pieces]),
        positions=join([p.positions for p in pieces]),
        tokens=sum(p.tokens for p in pieces),
        answer_tokens=sum(p.answer_tokens for p in pieces),
    )
