"""The batches of each training step: a pure function of (seed, step), so that a run can resume at any step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import numpy as np
import torch

from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.data.streams import ShuffledStream, Stream
from cads.errors import ConfigError

WINDOW = 64
"""Batches that are drawn together and then sorted by length, so that there is little padding."""


def by_length(positions: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Positions sorted by the length of their examples, ties by their order; int64, shape (n,).

    Those that come for the second time are sorted apart, after those that come for the first time, and so on: an
    example would otherwise stand beside itself, and share a batch with itself.

    Args:
        positions: shape (n,). lengths: of the example at each position, shape (N,).
    """
    by_position = np.argsort(positions, kind="stable")
    in_order = positions[by_position]
    times = np.empty(len(positions), dtype=np.int64)
    times[by_position] = np.arange(len(positions)) - np.searchsorted(in_order, in_order)
    return positions[np.lexsort((lengths[positions], times))]


class LengthBuckets:
    """The positions of a stream in batches of similar length.

    A window is `WINDOW` batches, or as many as the period of the stream holds. The positions of a window are drawn at
    once and sorted `by_length`. The batches of a window follow in an order drawn from
    (seed, window). A window holds the same positions as that part of the stream, so that every epoch still sees each
    example once.

    Args:
        stream: of positions.
        lengths: the length of the example at each position, shape (N,).
        count: examples in a batch.
        seed: of the order of the batches.
    """

    def __init__(self, stream: Stream, lengths: np.ndarray, count: int, seed: int) -> None:
        self._stream, self._lengths, self._count, self._seed = stream, lengths, count, seed
        self._batches = max(1, min(WINDOW, stream.period // count))
        self._window: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    def batch(self, step: int) -> np.ndarray:
        """The positions of one step, int64, shape (count,)."""
        window, index = divmod(step, self._batches)
        if self._window[0] != window:
            self._window = (window, self._sorted(window))
        return self._window[1][index]

    def _sorted(self, window: int) -> np.ndarray:
        """The positions of all batches of a window, shape (batches, count)."""
        size = self._batches * self._count
        positions = self._stream.take(window * size, size)
        batches = by_length(positions, self._lengths).reshape(self._batches, self._count)
        return np.random.default_rng((self._seed, window)).permutation(batches)


class BatchStream:
    """The training batches of K replicas.

    If examples have a length (`pool.examples.lengths()`), batches hold examples of similar length; see
    `LengthBuckets`.

    Args:
        pool: whose positions the streams give.
        streams: one a replica.
        batch_size: B, examples a step and replica.
        target: the pool of target examples, needed if `target_fraction` > 0.
        target_fraction: share of each batch drawn from the target (joint training), 0 to 1.
        target_stream: positions of the target; None for one epoch after another, shuffled.
        seed: of the order in which target examples are drawn.

    Raises:
        ConfigError: if `target_fraction` is not between 0 and 1, or is positive without a target.
    """

    def __init__(
        self,
        pool: Pool,
        streams: Sequence[Stream],
        batch_size: int,
        *,
        target: Pool | None = None,
        target_fraction: float = 0.0,
        target_stream: Stream | None = None,
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
        self._n_target = round(target_fraction * batch_size)
        self._seed = seed
        self._pool_batches = [self._batched(pool, s, batch_size - self._n_target) for s in self.streams]
        if self._n_target and target is not None:
            stream = ShuffledStream(np.arange(len(target)), seed) if target_stream is None else target_stream
            self._target_batches = self._batched(target, stream, self._n_target)

    @property
    def replicas(self) -> int:
        """K, the number of replicas; 1 without streams."""
        return max(1, len(self.streams))

    @property
    def from_pool(self) -> int:
        """Pool examples in a step of one replica. They come before the target examples."""
        return self.batch_size - self._n_target

    def for_streams(self, *streams: Stream) -> BatchStream:
        """The training batches of only those replicas that read `streams`."""
        subset = copy.copy(self)
        subset.streams = list(streams)
        subset._pool_batches = [self._batched(self.pool, s, self.batch_size - self._n_target) for s in streams]
        return subset

    def ids(self, batches: list[Batch]) -> list[str]:
        """The ids of the examples in the batches of one step, as `step` returned them and in that order."""
        n_pool = self.from_pool
        if self._target is None or not self._n_target:
            pieces = [(self.pool, batch.positions) for batch in batches]
        elif not n_pool:
            pieces = [(self._target, batch.positions) for batch in batches]
        elif len(batches) == 2:
            pieces = [(p, batch.positions) for p, batch in zip((self.pool, self._target), batches, strict=True)]
        else:
            # Each replica has its pool examples before its target examples.
            by_replica = batches[0].positions.unflatten(0, (self.replicas, self.batch_size))
            pieces = [x for row in by_replica for x in ((self.pool, row[:n_pool]), (self._target, row[n_pool:]))]
        return [i for pool, positions in pieces for i in pool.ids.take(positions.numpy()).to_pylist()]

    def step(self, step: int) -> list[Batch]:
        """The batches of one step, each with an equal share of all K replicas, ordered by replica.

        Pool and target examples are in one batch if their shapes are equal and they are not packed into shared rows.
        Otherwise the batch of pool examples comes before the batch of target examples.
        """
        pool_rows, target_rows = self.rows(step)
        return collated((self.pool, pool_rows), (self._target or self.pool, target_rows), self.replicas)

    def rows(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions in pool and target of the examples of one step, ordered by replica; int64, shape (n,) each."""
        pool_rows = target_rows = np.empty(0, dtype=np.int64)
        if self.from_pool and self._pool_batches:
            pool_rows = np.concatenate([positions_of(step) for positions_of in self._pool_batches])
        if self._n_target and self._target is not None:
            target_rows = np.concatenate([self._target_batches(step)] * self.replicas)
        return pool_rows, target_rows

    def _batched(self, pool: Pool, stream: Stream, count: int) -> Callable[[int], np.ndarray]:
        """A function from a step to the positions of its batch (int64, shape (count,))."""
        lengths = getattr(pool.examples, "lengths", None)
        if callable(lengths) and count:
            return LengthBuckets(stream, lengths(), count, self._seed).batch
        return lambda step: stream.take(step * count, count)


def collated(
    from_pool: tuple[Pool, np.ndarray], from_target: tuple[Pool, np.ndarray], replicas: int = 1
) -> list[Batch]:
    """The examples of one step: one batch if they can be in one, or one of the pool and one of the target.

    Args:
        from_pool, from_target: each a pool, and the positions of examples in it, by replica.
    """
    present = [(pool, rows) for pool, rows in (from_pool, from_target) if len(rows)]
    if len(present) == 2 and replicas == 1:
        (pool, rows), (target, target_rows) = present
        batch_with = getattr(pool.examples, "batch_with", None)
        batch: Batch | None = None if batch_with is None else batch_with(rows, target.examples, target_rows)
        if batch is not None:
            return [batch]
    return joined([pool.batch(rows) for pool, rows in present], replicas)


def joined(batches: list[Batch], replicas: int) -> list[Batch]:
    """Two batches as one, if their shapes are equal and they are not packed into shared rows; others unchanged."""
    if len(batches) == 2 and batches[0].shape == batches[1].shape and "row" not in batches[0].inputs:
        return [_interleave(batches, replicas)]
    return batches


def _interleave(batches: list[Batch], replicas: int) -> Batch:
    """Concatenate batches so that the examples of each replica are contiguous."""

    def join(tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([x.unflatten(0, (replicas, -1)) for x in tensors], dim=1).flatten(0, 1)

    log_odds = [b.log_odds for b in batches if b.log_odds is not None]
    return Batch(
        log_odds=join(log_odds) if log_odds else None,
        inputs={name: join([b.inputs[name] for b in batches]) for name in batches[0].inputs},
        labels=join([b.labels for b in batches]),
        positions=join([b.positions for b in batches]),
        tokens=sum(b.tokens for b in batches),
        answer_tokens=sum(b.answer_tokens for b in batches),
    )
