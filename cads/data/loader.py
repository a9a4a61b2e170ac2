"""Loads the batches of a training run, in this process or in worker processes that prefetch them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

from torch.utils.data import DataLoader, Dataset

from cads.data.batch import Batch
from cads.data.training_batches import BatchStream
from cads.errors import DataError


def load_steps(batch_stream: BatchStream, start: int, workers: int, *, pin: bool) -> Iterator[list[Batch]]:
    """The batches of step `start`, of step `start + 1`, and so on without end; see `BatchStream.step`.

    Args:
        batch_stream: what is trained on.
        start: the first step.
        workers: number of worker processes; 0 loads in this process.
        pin: whether batches are copied to page-locked memory.
    """
    yield from DataLoader(
        _Steps(batch_stream),
        batch_size=None,
        sampler=_Count(start),
        num_workers=workers,
        pin_memory=pin,
        collate_fn=_identity,
    )


def fingerprint(batch_stream: BatchStream) -> str:
    """A hash of the batch size, the number of replicas, and the first positions of each stream."""
    digest = hashlib.sha256(f"{batch_stream.batch_size} {batch_stream.replicas}".encode())
    for stream in batch_stream.streams:
        digest.update(stream.take(0, batch_stream.batch_size).tobytes())
    return digest.hexdigest()


def check_answers(batch_stream: BatchStream, batches: list[Batch], step: int) -> None:
    """Refuse a step without any answer token: there is nothing to learn from.

    Raises:
        DataError: naming the step and its first examples.
    """
    if not sum(batch.answer_tokens for batch in batches):
        raise DataError(
            f"no answer token in the batch of step {step} (examples {batch_stream.ids(batches)[:5]}): there is nothing "
            "to learn from them; remove them, or truncate examples less"
        )


class _Steps(Dataset[list[Batch]]):
    """The steps of a `BatchStream` as a map-style dataset, for `DataLoader`."""

    def __init__(self, batch_stream: BatchStream) -> None:
        self._batch_stream = batch_stream

    def __getitem__(self, step: int) -> list[Batch]:
        return self._batch_stream.step(step)


class _Count:
    """A sampler that yields start, start + 1, ... without end."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._start)


def _identity(batches: list[Batch]) -> list[Batch]:
    return batches
