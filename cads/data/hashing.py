"""Hashes of many rows at once: of the content of each example, of columns of a table, and of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

ROWS = 2**16
"""Rows that are hashed or copied at a time."""
SIZE = 16
"""Bytes in the digest of a row."""


class Digest(Protocol):
    """An unfinished hash of `hashlib`."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Add `data` to the hash."""
        ...


def digests(contents: Iterable[np.ndarray]) -> pa.Array:
    """The BLAKE2b digest of each content, large binary of `SIZE` bytes, shape (n,).

    Equal contents have equal digests. They are computed in blocks, so that at most `ROWS` are Python objects at a time.
    """
    blocks, remaining = [], iter(contents)
    while block := [hashlib.blake2b(content.data, digest_size=SIZE).digest() for content in islice(remaining, ROWS)]:
        blocks.append(pa.array(block, pa.large_binary()))
    return pa.concat_arrays(blocks) if blocks else pa.array([], pa.large_binary())


def row_digests(rows: np.ndarray) -> pa.Array:
    """The digest of each row of `rows` (uint8, shape (n, L)); see `digests`."""
    return digests(np.ascontiguousarray(rows))


def add_pairs(digest: Digest, first: pa.Array, second: pa.Array) -> None:
    """Add two columns of strings or bytes without missing values to `digest`, row by row, separated by a zero byte."""
    for start in range(0, len(first), ROWS):
        pair = (column.slice(start, ROWS).cast(pa.large_binary()) for column in (first, second))
        joined = pc.binary_join_element_wise(*pair, pa.scalar(b"\0", pa.large_binary()))
        _, _, data = joined.buffers()
        if data is not None:
            digest.update(data)


def add_column(digest: Digest, column: pa.Array | pa.ChunkedArray) -> None:
    """Add a column of strings or bytes without missing values to `digest`.

    The hash does not depend on how the column is chunked, nor on its Arrow type.
    """
    for start in range(0, len(column), ROWS):
        block = column.slice(start, ROWS)
        block = (block.combine_chunks() if isinstance(block, pa.ChunkedArray) else block).cast(pa.large_binary())
        digest.update(np.asarray(pc.binary_length(block), dtype="<i8").tobytes())
        _, offsets, data = block.buffers()
        bounds = np.frombuffer(offsets, dtype=np.int64)[block.offset : block.offset + len(block) + 1]
        if bounds[-1] > bounds[0]:
            digest.update(memoryview(data)[bounds[0] : bounds[-1]])


def add_tensors(digest: Digest, tensors: Mapping[str, Tensor]) -> None:
    """Add tensors to a hash: name, type, shape and contents of each, in the order of their names."""
    for name, tensor in sorted(tensors.items()):
        x = tensor.detach().cpu().contiguous()
        digest.update(f"\0{name}\0{x.dtype}\0{tuple(x.shape)}\0".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().data)
