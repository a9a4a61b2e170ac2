"""Steps whose losses the host has not read yet: on a GPU it reads several at once, since reading waits for the device.

The update of such a step is already in the queue of the device when its losses are read. So the device itself checks
that loss and gradient are finite, and leaves weights, moments and running means alone from the first step on that
has one that is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from cads.training.gradient import Accumulated, StepLosses, read_together

READ_TOGETHER = 16
"""Most steps that are read at once."""


def reads_later(accelerator: Accelerator) -> bool:
    """Whether steps on this device are read together. Elsewhere nothing waits; loss scaling reads each step itself."""
    return accelerator.device.type == "cuda" and accelerator.scaler is None


@dataclass(frozen=True)
class UnreadStep:
    """A step that was taken.

    Attributes:
        losses: of its examples. norms: of the gradient of each replica, shape (K,).
        rate: its learning rate. total: FLOPs of one replica after it. ids: of its examples.
    """

    losses: StepLosses
    norms: Tensor
    rate: float
    total: float
    ids: Callable[[], list[str]]


@dataclass
class UnreadSteps:
    """The steps of one run that were taken and not read.

    Attributes:
        bad: whether one of the steps so far had a loss or norm that is not finite, on the device, shape (); None before
            the first.
    """

    bad: Tensor | None = None
    _steps: list[UnreadStep] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: UnreadStep) -> None:
        """Add a step that was taken."""
        self._steps.append(step)

    def take(self) -> Iterator[tuple[UnreadStep, Accumulated, np.ndarray]]:
        """All steps with their losses and norms, in order: one transfer. They are read then."""
        steps, self._steps = self._steps, []
        read = read_together([(step.losses, step.norms) for step in steps])
        return iter([(step, *values) for step, values in zip(steps, read, strict=True)])

    def update(self, optimizer: Any, step: UnreadStep, buffers: list[tuple[Tensor, Tensor]]) -> None:
        """Update the weights by a step, unless it or one before has a loss or norm that is not finite.

        Args:
            optimizer: a fused one of PyTorch. buffers: those of the model and what they were before the step.
        """
        bad = ~(step.losses.are_finite() & step.norms.isfinite().all())
        self.bad = bad if self.bad is None else self.bad | bad
        # What loss scaling tells a fused optimizer: 1 leaves everything as it is.
        optimizer.found_inf = self.bad.float()
        try:
            optimizer.step()
        finally:
            del optimizer.found_inf
        for x, before in buffers:
            x.copy_(torch.where(self.bad, before, x))
