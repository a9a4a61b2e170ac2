"""What rides on a training run: it draws each batch, weighs its examples, and learns from their losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.data.training_batches import BatchStream


class Rider(BatchStream, ABC):
    """The training batches of one model, which depend on the course of its training.

    The trainer calls `step` before each step and `observe` after it: before the next one, where that `needs_losses`, or
    after some more, in order. All processes of a run have equal riders, which see equal losses.

    Args:
        pool: of the examples. batch_size: examples in a step.
    """

    def __init__(self, pool: Pool, batch_size: int) -> None:
        super().__init__(pool, [], batch_size)

    @property
    def needs_losses(self) -> bool:
        """Whether the next step depends on the losses of all steps so far; if not, they may be observed later."""
        return True

    @abstractmethod
    def step(self, step: int) -> list[Batch]:
        """The batches of one step; called once for each step, in order."""

    @abstractmethod
    def observe(self, losses: np.ndarray) -> None:
        """Learn from the losses of the next step to be observed (nats, shape (B,), in the order of its batches)."""

    @abstractmethod
    def ids(self, batches: list[Batch]) -> list[str]:
        """The ids of the examples in the batches of the last step."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A hash of all that its draws depend on, beside the losses."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All that later draws depend on, on the CPU."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`."""


def follow(rider: Rider, start: int, *, pin: bool) -> Iterator[list[Batch]]:
    """The batches of step `start`, of step `start + 1`, and so on without end, in page-locked memory with `pin`."""
    step = start
    while True:
        batches = rider.step(step)
        yield [batch.pin_memory() for batch in batches] if pin else batches
        step += 1
