"""The batches of a training run as they are loaded, by this process or by others that run ahead of it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator

from torch.utils.data import DataLoader, Dataset

from cads.data.batch import Batch
from cads.data.training_batches import BatchStream
from cads.errors import DataError


def load_steps(draws: BatchStream, start: int, workers: int, *, pin: bool) -> Iterator[list[Batch]]:
    """The pieces of step `start`, of the one after it, and so on without end.

    Args:
        workers: processes that load; 0 for this one. pin: whether batches go to page-locked memory.
    """
    yield from DataLoader(
        _Steps(draws),
        batch_size=None,
        sampler=_Count(start),
        num_workers=workers,
        pin_memory=pin,
        collate_fn=_identity,
    )


def fingerprint(draws: BatchStream) -> str:
    """What is trained on, as far as the first step tells."""
    digest = hashlib.sha256(f"{draws.batch_size} {draws.replicas}".encode())
    for stream in draws.streams:
        digest.update(stream.take(0, draws.batch_size).tobytes())
    return digest.hexdigest()


def check_answers(draws: BatchStream, pieces: list[Batch], step: int) -> None:
    """Refuse a batch from which nothing can be learned.

    Raises:
        DataError: naming the step and examples.
    """
    if not sum(p.answer_tokens for p in pieces):
        raise DataError(
            f"no answer token in the batch of step {step} (examples {draws.ids(pieces)[:5]}): there is nothing to "
            "learn from them; remove them, or keep more of them when they are cut"
        )


class _Steps(Dataset[list[Batch]]):
    """The steps of `draws` as a map-style dataset, for `DataLoader`."""

    def __init__(self, draws: BatchStream) -> None:
        self._draws = draws

    def __getitem__(self, step: int) -> list[Batch]:
        return self._draws.step(step)


class _Count:
    """start, start + 1, ..."""

    def __init__(self, start: int) -> None:
        self._start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self._start)


def _identity(pieces: list[Batch]) -> list[Batch]:
    return pieces
