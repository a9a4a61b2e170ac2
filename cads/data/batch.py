"""B collated examples, and the shape of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

Shape = tuple[tuple[str, tuple[int, ...]], ...]
"""The shape of one example: its inputs by name, without the batch dimension. Equal shapes cost the same."""


@dataclass(frozen=True)
class Batch:
    """B collated examples.

    Attributes:
        inputs: what the model reads, by name; each of shape (B, ...).
        labels: what it should answer, shape (B,) or (B, T).
        positions: where the examples stand in their pool, shape (B,), int64.
        tokens: positions the model computes on, padding included (images: one per example).
        answer_tokens: positions that are learned from (images: one per example).
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    positions: Tensor
    tokens: int
    answer_tokens: int

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def shape(self) -> Shape:
        """The shape of one of its examples."""
        # It is asked for in every training step: a list is several times faster here than a generator.
        return tuple([(name, self.inputs[name].shape[1:]) for name in sorted(self.inputs)])

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `function` applied to inputs and labels (to move, cast or pin them)."""
        inputs = {name: function(x) for name, x in self.inputs.items()}
        return replace(self, inputs=inputs, labels=function(self.labels))

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; the copy from pinned memory does not block."""
        return self.map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory (called by `torch.utils.data.DataLoader`)."""
        return self.map(Tensor.pin_memory)

    def split(self, parts: int, replicas: int = 1) -> list[Batch]:
        """At most `parts` pieces of nearly equal length, for gradient accumulation.

        Each piece holds its share of every replica, replica by replica as the whole does.
        """
        if parts == 1:
            return [self]
        rows = torch.arange(len(self)).view(replicas, -1)
        pieces = [rows[:, p].flatten() for p in np.array_split(np.arange(rows.shape[1]), parts) if len(p)]
        return [
            Batch(
                inputs={name: x[piece] for name, x in self.inputs.items()},
                labels=self.labels[piece],
                positions=self.positions[piece],
                tokens=round(self.tokens * len(piece) / len(self)),
                answer_tokens=round(self.answer_tokens * len(piece) / len(self)),
            )
            for piece in pieces
        ]
