"""Which examples each training step sees: a pure function of (seed, step), so that any step can be resumed."""

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
"""Batches of examples with a length that are drawn together and then sorted, so that hardly anything is padding."""


class LengthBuckets:
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


class BatchStream:
    """The training batches of K replicas.

    Where examples have a length (`pool.examples.lengths()`), batches hold examples of similar length; see
    `LengthBuckets`.

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
            stream = ShuffledStream(np.arange(len(target)), seed)
            self._target_batches = self._batched(target, stream, self._from_target)

    @property
    def replicas(self) -> int:
        """K."""
        return max(1, len(self.streams))

    @property
    def from_pool(self) -> int:
        """Examples of a step and replica that come from the pool: they stand before those of the target."""
        return self.batch_size - self._from_target

    def for_streams(self, *streams: Stream) -> BatchStream:
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

    def step(self, step: int) -> list[Batch]:
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
            return LengthBuckets(stream, lengths(), count, self._seed).batch
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
