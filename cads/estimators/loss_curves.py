"""The loss that a training curve will reach: its last steps, and its extrapolation."""

from __future__ import annotations

import numpy as np

from cads.errors import ConfigError

TAIL = 0.1
"""Share of the steps, at the end, over which the training loss of a fit is averaged."""


def last_steps(losses: np.ndarray) -> np.ndarray:
    """The last steps of a course of losses, shape (T, ...), at least one."""
    return losses[-max(1, round(TAIL * len(losses))) :]


SKIPPED = 0.2
"""Share of a training curve, at its start, that the extrapolation leaves out: there the loss is no power law."""
FLOOR = 1e-6
"""Smallest loss (nats) whose logarithm is taken."""


def extrapolate(flops: np.ndarray, losses: np.ndarray, budget: float) -> np.ndarray:
    """l*_C from short runs: each curve continued to C log-linearly, `log l = a + b log c`, by least squares.

    Args:
        flops: compute after each step, shape (T,).
        losses: batch losses, nats, shape (T, K).
        budget: C, in FLOPs.

    Returns:
        nats, shape (K,). The line never rises, since a loss that does is noise. It is fitted to the steps with a finite
        loss; NaN where there are not two of them, or none at the end of the curve: that run diverged.

    Raises:
        ConfigError: if there are fewer than two steps.
    """
    if len(flops) < 2:
        raise ConfigError(f"a curve of {len(flops)} steps cannot be extrapolated: it needs at least two")
    begin = min(int(SKIPPED * len(flops)), len(flops) - 2)
    x, y = np.log(flops[begin:]), np.log(np.maximum(losses[begin:], FLOOR))
    known = np.isfinite(y)
    y[~known] = np.nan
    found = _continued(x, y, budget)
    for k in np.flatnonzero(~known.all(axis=0)):
        if known[:, k].sum() >= 2 and np.isfinite(last_steps(losses[:, k])).any():
            found[k] = _continued(x[known[:, k]], y[known[:, k], k : k + 1], budget)[0]
    return found


def _continued(x: np.ndarray, y: np.ndarray, budget: float) -> np.ndarray:
    """The falling lines through log losses y (T, K) over log FLOPs x (T,), read off at the budget; nats, shape (K,)."""
    centred = x - x.mean()
    slope = np.minimum(centred @ y / (centred @ centred), 0.0)
    return np.asarray(np.exp(y.mean(axis=0) + slope * (np.log(budget) - x.mean())))
