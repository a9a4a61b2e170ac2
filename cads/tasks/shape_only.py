"""Pools of which only the shapes are known, which is enough to compute costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import pyarrow as pa
import torch

from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.errors import ConfigError, DataError


@dataclass(frozen=True)
class Field:
    """Shape and type of one tensor of an example."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.int64


class ShapeOnly:
    """N examples of one shape without contents; their batches are on the meta device.

    Args:
        n: number of examples.
        inputs: inputs of the model for one example, by name.
        labels: labels of one example.
        tokens: positions of one example that the model computes.

    Raises:
        ConfigError: if a number or a side of a shape is below 1.
    """

    def __init__(self, n: int, inputs: dict[str, Field], labels: Field, tokens: int = 1) -> None:
        sides = [side for field in (*inputs.values(), labels) for side in field.shape]
        if min(n, tokens, *sides) < 1:
            shapes = {name: field.shape for name, field in inputs.items()}
            raise ConfigError(
                f"{n} examples of {tokens} tokens, inputs of shape {shapes} and labels of {labels.shape}: "
                "each of these numbers must be at least 1"
            )
        self._n, self._inputs, self._labels, self._tokens = n, inputs, labels, tokens

    def __len__(self) -> int:
        return self._n

    def batch(self, positions: np.ndarray) -> Batch:
        """Collate empty examples."""
        n = len(positions)
        return Batch(
            inputs={name: _empty(n, field) for name, field in self._inputs.items()},
            labels=_empty(n, self._labels),
            positions=torch.as_tensor(positions),
            tokens=n * self._tokens,
            answer_tokens=n * self._tokens,
        )

    def take(self, positions: np.ndarray) -> ShapeOnly:
        """A payload with one example for each position."""
        return ShapeOnly(len(positions), self._inputs, self._labels, self._tokens)

    def shapes(self) -> tuple[np.ndarray, np.ndarray]:
        """All examples have the same shape."""
        return np.zeros(1, dtype=np.int64), np.zeros(self._n, dtype=np.int64)

    def digests(self) -> NoReturn:
        """Refused: there are no contents to hash.

        Raises:
            DataError: always.
        """
        raise DataError("this pool has shapes and no examples: it can be planned for, not selected from")

    label_digest = digests


def shape_only_pool(name: str, examples: ShapeOnly, sources: dict[str, int] | None = None) -> Pool:
    """A pool with ids `name-0`, `name-1`, ... and sources of the given sizes.

    Raises:
        ConfigError: if a source has a size below 1.
    """
    for source, size in (sources or {}).items():
        if size < 1:
            raise ConfigError(f"source {source!r} has size {size}: it must be at least 1")
    ids = pa.array([f"{name}-{i}" for i in range(len(examples))], pa.string())
    codes = np.repeat(np.arange(len(sources)), list(sources.values())) if sources else None
    return Pool(ids, examples, codes, tuple(sources or ()), name=name)


def _empty(n: int, field: Field) -> torch.Tensor:
    return torch.empty(n, *field.shape, dtype=field.dtype, device="meta")
