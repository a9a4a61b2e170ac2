"""Which examples each training step sees: a pure function of (seed, step), so that any step can be resumed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from cads.errors import ConfigError, DataError
from cads.task import Batch, Pool


class Stream(Protocol):
    """An endless sequence of positions in a pool."""

    def take(self, start: int, count: int) -> np.ndarray:
        """Elements start .. start+count-1 of the sequence, int64, shape (count,)."""
        ...


class Epochs:
    """All `positions` once an epoch, in an order drawn anew for each epoch from (seed, epoch).

    Raises:
        DataError: if there is no position.
    """

    def __init__(self, positions: np.ndarray, seed: int) -> None:
        if len(positions) == 0:
            raise DataError("nothing to train on: no example is selected; lower the threshold or raise the budget")
        self._positions = np.asarray(positions, dtype=np.int64)
        self._seed = seed
        self._order: tuple[int, np.ndarray] = (-1, self._positions)

    def take(self, start: int, count: int) -> np.ndarray:
        """Elements start .. start+count-1 of the concatenated epochs."""
        pieces = []
        while count > 0:
            epoch, offset = divmod(start, len(self._positions))
            piece = self._permutation(epoch)[offset : offset + count]
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return np.concatenate(pieces) if len(pieces) > 1 else pieces[0]

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

    def take(self, start: int, count: int) -> np.ndarray:
        """Elements start .. start+count-1; the generator is seeded by (seed, start)."""
        u = np.random.default_rng((self._seed, start)).random(count) * self._cumulative[-1]
        drawn = np.searchsorted(self._cumulative, u, side="right")
        return np.minimum(drawn, len(self._cumulative) - 1).astype(np.int64)


class Draws:
    """The training batches of K replicas.

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
        if self._from_target and target is not None:
            self._target_stream = Epochs(np.arange(len(target)), seed)

    @property
    def replicas(self) -> int:
        """K."""
        return max(1, len(self.streams))

    def only(self, stream: Stream) -> Draws:
        """The draws of one replica alone."""
        alone = copy.copy(self)
        alone.streams = [stream]
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

        Pool and target examples stand in one piece where their shapes are equal.
        """
        pieces = []
        count = self.batch_size - self._from_target
        if count:
            positions = [s.take(step * count, count) for s in self.streams]
            pieces.append(self.pool.batch(np.concatenate(positions)))
        if self._from_target and self._target is not None:
            positions = [self._target_stream.take(step * self._from_target, self._from_target)]
            pieces.append(self._target.batch(np.concatenate(positions * self.replicas)))
        if len(pieces) == 2 and pieces[0].shape == pieces[1].shape:
            return [_interleave(pieces, self.replicas)]
        return pieces


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
