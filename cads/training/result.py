"""The result of a training run: models, the losses of all steps, and the FLOPs spent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import nn

from cads.estimators.loss_curves import last_steps
from cads.runtime.checkpoint import State


@dataclass
class TrainResult:
    """The result of a training run, for K replicas.

    Attributes:
        models: the trained models, on the training device.
        losses: the mean loss of each step's batch, nats, shape (steps, K); NaN where the batch was skipped.
        flops: what one replica has spent after each step, shape (steps,).
        diverged: replicas that met a non-finite loss, bool, shape (K,); their weights are meaningless.
        seconds: wall-clock time; 0 if it is not known.
        skipped: batches that were left out since their loss or gradient was not finite.
        before: FLOPs that one replica spent in earlier segments of the run; `flops` and `losses` include them.
        state: to resume from, on the CPU; None unless the segment keeps it.
        example_losses: the loss of each pool example in its latest training step, nats, shape (N,), NaN where it was
            in none; None unless the segment keeps them.
    """

    models: list[nn.Module]
    losses: np.ndarray
    flops: np.ndarray
    diverged: np.ndarray
    seconds: float
    skipped: int = 0
    before: float = 0.0
    state: State | None = None
    example_losses: np.ndarray | None = None

    @property
    def flops_per_second(self) -> float:
        """FLOP/s achieved by all replicas together; 0 if the time is not known."""
        if not self.seconds:
            return 0.0
        return float(self.flops[-1] - self.before) * len(self.diverged) / self.seconds

    @property
    def training_loss(self) -> np.ndarray:
        """Mean loss over the last steps (nats, shape (K,)): the training loss that the budget reached.

        Skipped batches have no part in it; where a replica diverged it is NaN.
        """
        last = last_steps(self.losses)
        finite = np.isfinite(last)
        mean_losses = np.where(finite, last, 0.0).sum(axis=0) / np.maximum(1, finite.sum(axis=0))
        return np.where(self.diverged | ~finite.any(axis=0), np.nan, mean_losses)


def stack_results(models: list[nn.Module], fits: list[TrainResult | None]) -> TrainResult:
    """One result of K replicas from `fits`, the results of single replicas (None where a replica diverged).

    Args:
        models: those that the result holds.
    """
    finished = [f for f in fits if f is not None]
    diverged = np.array([f is None for f in fits])
    if not finished:
        return TrainResult(models, np.full((1, len(fits)), np.nan), np.array([np.nan]), diverged, 0.0)
    # Where examples differ in cost, so do the numbers of steps: the last steps of all replicas are aligned.
    steps = min(len(f.losses) for f in finished)
    missing = np.full(steps, np.nan)
    losses = np.stack([missing if f is None else f.losses[-steps:, 0] for f in fits], axis=1)
    flops = np.mean([f.flops[-steps:] for f in finished], axis=0)
    return TrainResult(
        models, losses, flops, diverged, sum(f.seconds for f in finished), sum(f.skipped for f in finished)
    )
