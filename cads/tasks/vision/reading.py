"""One pass over image files: what cannot be read, and of the rest the digests, the sums and the sizes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from cads.data.hashing import digests
from cads.errors import DataError

PIECE = 32
"""Images that a thread reads at a time."""
PIECES_PER_THREAD = 4
"""Pieces of each thread that are waited for together; a signal is honoured after them."""
LEVELS = np.arange(256, dtype=np.int64)
"""Values of a pixel."""


class Decoded(NamedTuple):
    """An image in the shape of all: `pixels`, uint8, shape (C, H, W); its own size (W, H); whether it is animated."""

    pixels: np.ndarray
    size: tuple[int, int]
    has_more_frames: bool


@dataclass(frozen=True)
class Reading:
    """What is known of N images that were decoded.

    Attributes:
        digests: a hash of the pixels of each, large binary.
        sums: sums of its values and of their squares in each channel, int64, shape (N, 2, C).
        sizes: its width and height in its file, int64, shape (N, 2).
        has_more_frames: whether its file holds frames that are not read, bool, shape (N,).
    """

    digests: pa.Array
    sums: np.ndarray
    sizes: np.ndarray
    has_more_frames: np.ndarray

    def take(self, positions: np.ndarray) -> Reading:
        """The same of the images at `positions`."""
        taken = self.digests.take(pa.array(np.asarray(positions, dtype=np.int64)))
        return Reading(taken, self.sums[positions], self.sizes[positions], self.has_more_frames[positions])


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def read_all(
    read: Callable[[int], Decoded], rows: np.ndarray, channels: int, n_threads: int
) -> tuple[Reading, dict[int, str]]:
    """Decode each image once.

    Args:
        read: decodes the image at a row; called by `n_threads` threads. It raises a DataError if that fails.
        rows: of the images, shape (N,).
        channels: C.

    Returns:
        what is known of the images, with zeros for those that cannot be read;
        for the position of each of these, why.
    """
    pieces = [rows[start : start + PIECE] for start in range(0, len(rows), PIECE)]
    read_pieces: list[tuple[Reading, dict[int, str]]] = []
    step = n_threads * PIECES_PER_THREAD
    with ThreadPoolExecutor(n_threads) as threads:
        for start in range(0, len(pieces), step):
            read_pieces += threads.map(lambda piece: _read_piece(read, piece, channels), pieces[start : start + step])
    readings = [reading for reading, _ in read_pieces]
    errors = {i * PIECE + at: error for i, (_, failed) in enumerate(read_pieces) for at, error in failed.items()}
    joined = Reading(
        pa.concat_arrays([reading.digests for reading in readings]),
        np.concatenate([reading.sums for reading in readings]),
        np.concatenate([reading.sizes for reading in readings]),
        np.concatenate([reading.has_more_frames for reading in readings]),
    )
    return joined, errors


def _read_piece(read: Callable[[int], Decoded], rows: np.ndarray, channels: int) -> tuple[Reading, dict[int, str]]:
    sums = np.zeros((len(rows), 2, channels), dtype=np.int64)
    sizes = np.zeros((len(rows), 2), dtype=np.int64)
    has_more_frames = np.zeros(len(rows), dtype=bool)
    errors: dict[int, str] = {}

    def contents() -> Iterator[np.ndarray]:
        for i, row in enumerate(rows):
            try:
                pixels, sizes[i], has_more_frames[i] = read(int(row))
            except DataError as error:
                errors[i] = str(error)
                yield np.empty(0, dtype=np.uint8)
                continue
            for channel, values in enumerate(pixels):
                counts = np.bincount(values.ravel(), minlength=len(LEVELS))
                sums[i, :, channel] = counts @ LEVELS, counts @ LEVELS**2
            yield pixels

    return Reading(digests(contents()), sums, sizes, has_more_frames), errors
