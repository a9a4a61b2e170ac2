"""A batch of B collated examples, and the shape of one example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

Shape = tuple[tuple[str, tuple[int, ...]], ...]
"""The shape of one example: of each input by name, without the batch dimension. Equal shapes cost the same."""


@dataclass(frozen=True)
class Batch:
    """B collated examples.

    Attributes:
        inputs: what the model reads, by name; each of shape (B, ...).
        labels: the expected outputs, shape (B,) or (B, T).
        positions: the index of each example in its pool, shape (B,), int64.
        tokens: token positions that the model computes on, padding included (images: one per example).
        answer_tokens: token positions that the training loss is computed on (images: one per example).
        log_odds: of weighing each example by `sigmoid(log_odds - loss)` in a training step, shape (B,), infinite for
            the weight 1; None if all examples count alike.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    positions: Tensor
    tokens: int
    answer_tokens: int
    log_odds: Tensor | None = None

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def shape(self) -> Shape:
        """The shape of one example of the batch."""
        # Every training step reads the shape: a list is several times faster here than a generator.
        return tuple([(name, self.inputs[name].shape[1:]) for name in sorted(self.inputs)])

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `function` applied to inputs and labels (to move, cast or pin them)."""
        inputs = {name: function(x) for name, x in self.inputs.items()}
        log_odds = None if self.log_odds is None else function(self.log_odds)
        return replace(self, inputs=inputs, labels=function(self.labels), log_odds=log_odds)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; a copy from pinned memory does not block."""
        return self.map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by `torch.utils.data.DataLoader`)."""
        return self.map(Tensor.pin_memory)

    def take(self, index: Tensor) -> Batch:
        """The examples at `index` (int64, shape (b,)) of a batch whose examples have equally many tokens."""
        return self._rows(lambda x: x[index], len(index))

    def part(self, start: int, end: int) -> Batch:
        """The examples from `start` to before `end`, without a copy; tokens as for `take`."""
        return self._rows(lambda x: x[start:end], end - start)

    def _rows(self, function: Callable[[Tensor], Tensor], count: int) -> Batch:
        tokens, answers = (round(n * count / len(self)) for n in (self.tokens, self.answer_tokens))
        return replace(self.map(function), positions=function(self.positions), tokens=tokens, answer_tokens=answers)

    def split(self, parts: int, replicas: int = 1) -> list[Batch]:
        """At most `parts` micro-batches of nearly equal length, for gradient accumulation.

        Each micro-batch holds an equal share of every replica. Its rows are ordered by replica, as in the full batch.
        """
        if parts == 1:
            return [self]
        rows = torch.arange(len(self)).view(replicas, -1)
        columns = np.array_split(np.arange(rows.shape[1]), parts)
        micro_batches = [rows[:, c].flatten() for c in columns if len(c)]
        return [self.take(members) for members in micro_batches]
