"""Loss after temperature scaling: the quality of a classifier apart from its confidence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TOLERANCE = 1e-13
"""Estimated distance to the minimum, in nats, at which the search ends."""

MAX_ITERATIONS = 200
"""Far more than are needed: Newton's method takes about 5 iterations, and about 30 on separable data."""


def calibrated_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """Negative log-likelihoods after the one temperature T that fits these labels best.

        min_b f(b),   f(b) = mean_n [ logsumexp(b z_n) - b z_n[y_n] ],   b = 1 / T >= 0

    with f' = mean( E_b[z] - z[y] ) and f'' = mean( Var_b[z] ) >= 0: convex in b, solved by Newton's method
    within a bracket, in float64. It is the temperature scaling of Guo et al. (2017), "On Calibration of
    Modern Neural Networks".

    Args:
        logits: z, shape (N, C).
        labels: y, shape (N,), in 0..C-1.

    Returns:
        the loss of each example, of which f at its minimum is the mean, in nats, float64, shape (N,);
        T: infinite where the logits are worse than uniform ones, near 0 where every label has the largest logit.
        All are nan if a logit is not finite.
    """
    z = logits.detach().cpu().double()
    if not torch.isfinite(z).all():
        return torch.full((len(z),), math.nan, dtype=torch.float64), math.nan
    z = z - z.gather(1, labels.cpu()[:, None])
    # After division by their mean size, logits of any scale have a minimum near b = 1.
    scale = float(z.abs().mean())
    uniform = torch.full((len(z),), math.log(z.shape[1]), dtype=torch.float64)
    if scale == 0:
        return uniform, math.inf
    z = z / scale
    if float(z.mean()) >= 0:
        return uniform, math.inf

    low, high, b = 0.0, math.inf, 1.0
    for _ in range(MAX_ITERATIONS):
        p = torch.softmax(b * z, dim=1)
        mean = (p * z).sum(dim=1)
        slope = float(mean.mean())
        curvature = float((p * (z - mean[:, None]).square()).sum(dim=1).mean())
        if slope * slope <= 2 * TOLERANCE * curvature:
            break
        low, high = (b, high) if slope < 0 else (low, b)
        step = slope / curvature if curvature > 0 else math.copysign(math.inf, slope)
        b = min(b - step, 4 * b)
        if not low < b < high:
            b = (low + high) / 2
    return torch.logsumexp(b * z, dim=1), scale / b
