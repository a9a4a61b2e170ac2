"""Samplers of `torch.utils.data` over the positions of a stream."""

from __future__ import annotations

from collections.abc import Iterator

from torch.utils.data import Sampler

from cads.data.streams import Stream

BLOCK = 2**16
"""Positions that a sampler converts to Python integers at a time."""


class StreamSampler(Sampler[int]):
    """One epoch of the positions of a stream: `count` of them, such as the number of selected examples.

    Call `set_epoch` before each epoch, as with `DistributedSampler`.
    """

    def __init__(self, stream: Stream, count: int) -> None:
        self._stream = stream
        self._count = count
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        positions = self._stream.take(self._epoch * self._count, self._count)
        for start in range(0, len(positions), BLOCK):
            yield from positions[start : start + BLOCK].tolist()
