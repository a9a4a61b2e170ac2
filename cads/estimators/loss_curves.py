"""The loss that a training curve reaches: its last steps, and its extrapolation to a larger budget."""

from __future__ import annotations

import numpy as np

from cads.errors import ConfigError

TAIL = 0.1
"""Share of the steps, at the end, over which the training loss of a fit is averaged."""


def last_steps(losses: np.ndarray) -> np.ndarray:
    """The last `TAIL` of a curve of losses, shape (T, ...), at least one step."""
    return losses[-max(1, round(TAIL * len(losses))) :]


SKIPPED = 0.2
"""Share of a training curve, at its start, that the extrapolation leaves out: there the loss is no power law."""
FLOOR = 1e-6
"""Smallest loss (nats) whose logarithm is taken."""


def extrapolate(flops: np.ndarray, losses: np.ndarray, budget: float, skipped: float = SKIPPED) -> np.ndarray:
    """l*_C, the training loss within reach of budget C, from trials: `log l = a + b log c`, by least squares.

    Each curve is continued to C along its line, which never rises: a loss that rises is noise. The line is fitted to
    the steps with a finite loss after the first `skipped` of the curve. The learning rate should be that of a run of C:
    where it falls to 0 at the end of the trial the loss falls with it, and the line would continue that.

    Args:
        flops: compute after each step, shape (T,).
        losses: batch losses, nats, shape (T, K).
        budget: C, in FLOPs.
        skipped: share of the curve that is left out, such as its warm-up.

    Returns:
        nats, shape (K,). NaN where the trial diverged: fewer than two losses to fit are finite, or none of the last.

    Raises:
        ConfigError: if there are fewer than two steps.
    """
    if len(flops) < 2:
        raise ConfigError(f"a curve of {len(flops)} steps cannot be extrapolated: it needs at least two")
    start = min(int(skipped * len(flops)), len(flops) - 2)
    x, y = np.log(flops[start:]), np.log(np.maximum(losses[start:], FLOOR))
    finite = np.isfinite(y)
    y[~finite] = np.nan
    reachable = _log_linear(x, y, budget)
    for k in np.flatnonzero(~finite.all(axis=0)):
        if finite[:, k].sum() >= 2 and np.isfinite(last_steps(losses[:, k])).any():
            reachable[k] = _log_linear(x[finite[:, k]], y[finite[:, k], k : k + 1], budget)[0]
    return reachable


def _log_linear(x: np.ndarray, y: np.ndarray, budget: float) -> np.ndarray:
    """Non-increasing lines fitted to log losses y (T, K) over log FLOPs x (T,), at the budget: nats, shape (K,)."""
    centred = x - x.mean()
    slope = np.minimum(centred @ y / (centred @ centred), 0.0)
    return np.asarray(np.exp(y.mean(axis=0) + slope * (np.log(budget) - x.mean())))
