"""A pool of N examples: their ids, an optional source each, and their payload."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cads.data.batch import Batch
from cads.data.hashing import add_pairs
from cads.data.ids import all_distinct
from cads.data.origin import Origin
from cads.errors import DataError


class Examples(Protocol):
    """The payload of a pool: N examples that can be collated, in memory or in a file."""

    def __len__(self) -> int: ...

    def batch(self, positions: np.ndarray) -> Batch:
        """Collate the examples at `positions` (int64, shape (B,))."""
        ...

    def take(self, positions: np.ndarray) -> Examples:
        """Only the examples at `positions`, in that order."""
        ...

    def shapes(self) -> tuple[np.ndarray, np.ndarray]:
        """Groups of examples of equal shape, which cost the same.

        Returns:
            representatives, shape (U,): one position for each distinct shape;
            codes, shape (N,): the index into representatives of each example.
        """
        ...

    def digests(self) -> pa.Array | list[bytes]:
        """A hash of the inputs of each example, without its label, in order; large pools give a binary array."""
        ...

    def label_digest(self) -> bytes:
        """One hash of all labels, in order."""
        ...


class Pool:
    """N examples: stable ids, an optional source each, and the payload.

    Args:
        ids: one string an example, unique.
        examples: the payload, of the same length.
        sources: one integer code an example (shape (N,)), or None if the pool has no sources.
        source_names: the name behind each code; every source must have at least one example.
        name: the name of this pool in error messages.
        origin: where each example was read, or None if that is not known.

    Raises:
        DataError: if the pool is empty, ids are not unique strings, lengths differ, or a source has no example.
    """

    def __init__(
        self,
        ids: Sequence[str] | pa.Array | pa.ChunkedArray,
        examples: Examples,
        sources: np.ndarray | None = None,
        source_names: Sequence[str] = (),
        *,
        name: str = "pool",
        origin: Origin | None = None,
    ) -> None:
        try:
            ids = ids if isinstance(ids, pa.Array | pa.ChunkedArray) else pa.array(ids, pa.string())
        except (pa.ArrowException, TypeError) as error:
            raise DataError(f"the {name} has ids that are not strings ({error}): give one string an example") from error
        try:
            self.ids: pa.Array = ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids
        except pa.ArrowInvalid as error:
            raise DataError(f"the {name} has ids of more than 2 GB ({error}): divide it into shards") from error
        if self.ids.type != pa.string():
            raise DataError(f"the {name} has ids of type {self.ids.type}: give strings")
        self.examples = examples
        self.sources = None if sources is None else np.asarray(sources, dtype=np.int32)
        self.source_names = tuple(source_names)
        self.name = name
        self.origin = origin
        self._check()

    def _check(self) -> None:
        if len(self.ids) == 0:
            raise DataError(f"the {self.name} is empty: it needs at least one example")
        if len(self.examples) != len(self.ids):
            raise DataError(
                f"the {self.name} has {len(self.ids)} ids for {len(self.examples)} examples: "
                "give one id to each example"
            )
        if self.origin is not None and len(self.origin) != len(self.ids):
            raise DataError(f"the {self.name} has {len(self.ids)} ids for {len(self.origin)} rows of its files")
        if self.ids.null_count:
            raise DataError(f"the {self.name} has {self.ids.null_count} missing ids: every example needs one")
        if not all_distinct(self.ids):
            counts = pc.value_counts(self.ids)
            duplicates = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
            raise DataError(
                f"the {self.name} has duplicate ids, {len(duplicates)} in all, such as "
                f"{duplicates[:3].to_pylist()}: ids must be unique"
            )
        if self.sources is None:
            return
        if len(self.sources) != len(self.ids):
            raise DataError(f"the {self.name} has {len(self.sources)} sources for {len(self.ids)} examples")
        if self.sources.min() < 0 or self.sources.max() >= len(self.source_names):
            raise DataError(
                f"the {self.name} has source codes outside 0..{len(self.source_names) - 1}: "
                "each code indexes source_names"
            )
        empty_sources = [s for s, n in zip(self.source_names, self.source_sizes, strict=True) if n == 0]
        if empty_sources:
            raise DataError(f"sources of the {self.name} with no example: {empty_sources}; remove them or give data")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def source_sizes(self) -> np.ndarray:
        """Number of examples in each source, shape (S,).

        Raises:
            DataError: if the pool has no sources.
        """
        if self.sources is None:
            raise DataError(f"the {self.name} has no sources: name a source column, or select per example")
        return np.bincount(self.sources, minlength=len(self.source_names))

    def batch(self, positions: np.ndarray | Sequence[int]) -> Batch:
        """Collate the examples at `positions`."""
        return self.examples.batch(np.asarray(positions, dtype=np.int64))

    def batches(self, size: int, positions: np.ndarray | None = None) -> Iterator[Batch]:
        """All examples (or those at `positions`) once, in order, in batches of at most `size`."""
        positions = np.arange(len(self)) if positions is None else positions
        for start in range(0, len(positions), size):
            yield self.batch(positions[start : start + size])

    def subset(self, positions: np.ndarray, name: str) -> Pool:
        """The pool of the examples at `positions`, without sources."""
        positions = np.asarray(positions, dtype=np.int64)
        return Pool(self.ids.take(positions), self.examples.take(positions), name=name)

    def positions_in(self, mask: np.ndarray) -> np.ndarray:
        """Positions of all examples whose source `mask` (bool, shape (S,)) includes."""
        if self.sources is None:
            raise DataError(f"the {self.name} has no sources: name a source column, or select per example")
        return np.flatnonzero(np.asarray(mask, dtype=bool)[self.sources])

    @property
    def digests(self) -> pa.Array:
        """A hash of the inputs of each example, without its label; large binary, shape (N,)."""
        digests = self.examples.digests()
        return (digests if isinstance(digests, pa.Array) else pa.array(digests, pa.binary())).cast(pa.large_binary())

    @cached_property
    def content_codes(self) -> np.ndarray:
        """A code for the content of each example, int32, shape (N,): equal inputs have equal codes."""
        return self.code_contents()

    def code_contents(self) -> np.ndarray:
        """`content_codes`, which the pool does not keep."""
        return np.asarray(self.digests.dictionary_encode().indices)

    @cached_property
    def content_hash(self) -> str:
        """Hash of ids, inputs, labels and sources: two pools with the same hash give the same results."""
        digest = hashlib.sha256()
        add_pairs(digest, self.ids, self.digests)
        digest.update(self.examples.label_digest())
        if self.sources is not None:
            digest.update(np.ascontiguousarray(self.sources).data)
            digest.update("\0".join(self.source_names).encode())
        return digest.hexdigest()
