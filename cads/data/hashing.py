"""Hashes of many rows at once: of what each example holds, and of whole columns of a table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import islice
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ROWS = 2**16
"""Rows of a column that are copied at once."""
SIZE = 16
"""Bytes of the digest of a row."""


class Digest(Protocol):
    """A hash of `hashlib` that is being computed."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take in `data`."""
        ...


def digests(contents: Iterable[np.ndarray]) -> pa.Array:
    """A digest of each content (BLAKE2b), large binary of `SIZE` bytes, shape (n,): equal contents have equal ones.

    Made in blocks of `ROWS`, so that only so many are Python objects at once.
    """
    made, remaining = [], iter(contents)
    while block := [hashlib.blake2b(content.data, digest_size=SIZE).digest() for content in islice(remaining, ROWS)]:
        made.append(pa.array(block, pa.large_binary()))
    return pa.concat_arrays(made) if made else pa.array([], pa.large_binary())


def row_digests(rows: np.ndarray) -> pa.Array:
    """A digest of each row (uint8, shape (n, L)); see `digests`."""
    return digests(np.ascontiguousarray(rows))


def add_pairs(digest: Digest, first: pa.Array, second: pa.Array) -> None:
    """Take two columns of strings or bytes without missing values into `digest`, row by row, a zero byte in between."""
    for start in range(0, len(first), ROWS):
        pair = (column.slice(start, ROWS).cast(pa.large_binary()) for column in (first, second))
        joined = pc.binary_join_element_wise(*pair, pa.scalar(b"\0", pa.large_binary()))
        _, _, data = joined.buffers()
        if data is not None:
            digest.update(data)


def add_column(digest: Digest, column: pa.Array | pa.ChunkedArray) -> None:
    """Take a column of strings or bytes without missing values into `digest`, whatever its chunks and its type."""
    for start in range(0, len(column), ROWS):
        piece = column.slice(start, ROWS)
        piece = (piece.combine_chunks() if isinstance(piece, pa.ChunkedArray) else piece).cast(pa.large_binary())
        digest.update(np.asarray(pc.binary_length(piece), dtype="<i8").tobytes())
        _, offsets, data = piece.buffers()
        ends = np.frombuffer(offsets, dtype=np.int64)[piece.offset : piece.offset + len(piece) + 1]
        if ends[-1] > ends[0]:
            digest.update(memoryview(data)[ends[0] : ends[-1]])
