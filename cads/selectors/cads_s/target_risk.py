"""R of each source: what a model that was fitted to the target loses there, and what it costs to know it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from cads.scoring.pool_scores import reading_flops
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop
from cads.search.rungs import affordable
from cads.search.space import SearchSpace
from cads.seeding import derive

THETA_SHARE, THETA_PASSES = 0.1, 20
"""theta is fitted to the target for this share of C, but for no more passes over it than this."""
MOST_FOR_THETA = 0.1
"""Share of the allowance that theta and R may take: where budgets are small, short runs tell more."""
PROBE_EXAMPLES, FEW_PROBES = 256, 32
"""Examples of each source on which R is measured: usually, and where the allowance does not buy these beside theta."""
THETA_STEPS = 8
"""Steps on the target that a pretrained theta is given at least: then it tells sources apart."""
GUIDED_RUNS = 2
"""Runs for each source, in the first rung, up to which theta is worth cutting short what it costs."""


def probe_positions(space: SearchSpace, count: int = PROBE_EXAMPLES) -> list[np.ndarray]:
    """Positions of the examples of each source on which R is measured, `count` at most."""
    return [np.flatnonzero(space.pool.sources == source)[:count] for source in range(len(space.sizes))]


def probing_flops(costs: InnerLoopCosts, where: Sequence[np.ndarray]) -> float:
    """What `mean_losses` will charge: where lengths differ, not what a mean example costs."""
    pool, forward = costs.task.pool, costs.task.costs.forward
    return sum(reading_flops(forward, pool, there) for there in where)


def mean_losses(inner: InnerLoop, where: Sequence[np.ndarray], theta: nn.Module) -> np.ndarray:
    """The mean loss of theta on the examples of each source, of which R is made, nats, shape (S,)."""
    return np.array([inner.losses(theta, there, stage="R").mean() for there in where])


def n_probed_models(costs: InnerLoopCosts) -> int:
    """How many models are measured on the sources: theta, and the first run on the full pool if they are pretrained."""
    return 1 + costs.task.pretrained


def theta_flops(
    costs: InnerLoopCosts, space: SearchSpace, train_flops: float, steps: int
) -> tuple[float, list[np.ndarray]]:
    """What theta is trained for, and where R is measured; 0 if that would take too much of what the ledger has left.

    Where short runs are too few to learn which sources matter, theta's losses are the guide: it is trained for less,
    and measured on fewer examples.

    Args:
        steps: of the policy after each rung.
    """
    flops = costs.target_flops(THETA_SHARE, THETA_PASSES, train_flops)
    most = MOST_FOR_THETA * costs.ledger.left
    where = probe_positions(space)
    if flops + looking_flops(costs, where) > most:
        enough = costs.target_step_flops
        if costs.task.pretrained:
            most, enough = max(most, least_theta(costs, space)), THETA_STEPS * enough
        rungs = affordable(costs, space, train_flops, steps, reserved=most)
        if not rungs or rungs[0].n_trials > GUIDED_RUNS * len(space.sizes):
            return 0.0, where
        if most - looking_flops(costs, where) < enough:
            where = probe_positions(space, FEW_PROBES)
        flops = most - looking_flops(costs, where)
    return (0.0 if flops < costs.target_step_flops else flops), where


def looking_flops(costs: InnerLoopCosts, where: Sequence[np.ndarray]) -> float:
    """What measuring the sources will charge, with as many models as `n_probed_models`."""
    return n_probed_models(costs) * probing_flops(costs, where)


def least_theta(costs: InnerLoopCosts, space: SearchSpace) -> float:
    """FLOPs of a theta that is trained and measured just enough to tell sources apart."""
    return THETA_STEPS * costs.target_step_flops + looking_flops(costs, probe_positions(space, FEW_PROBES))


def theta_risks(
    inner: InnerLoop, space: SearchSpace, train_flops: float, steps: int, seed: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Mean loss in each source of theta, a model fitted to the target.

    Args:
        steps: of the policy after each rung.

    Returns:
        nats, shape (S,), and the positions of the examples that it was measured on; all 0, and none, if the budget does
        not buy theta.
    """
    flops, where = theta_flops(inner, space, train_flops, steps)
    if not flops:
        return np.zeros(len(space.sizes)), []
    theta = inner.fit_target(flops, seed=derive(seed, "theta"), stage="theta")
    return mean_losses(inner, where, theta), where


def excess_target_loss(inner: InnerLoop, risk: np.ndarray, where: Sequence[np.ndarray], u: nn.Module) -> np.ndarray:
    """The risk of each source less what u, trained on the pool, has there; but for the mean over sources.

    A pretrained model finds some sources easier than others, whatever they are good for, and learns from whatever it is
    trained on how long answers are and how they end: both are taken out, as the penalty takes out what can be reached.

    Args:
        risk: of theta, nats, shape (S,). where: positions of the examples of each source that it was measured on.
    """
    reached = mean_losses(inner, where, u)
    return np.asarray(risk - (reached - reached.mean()))
