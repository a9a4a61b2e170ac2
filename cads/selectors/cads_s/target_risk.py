"""R of each source: what a model that was fitted to the target loses there, and what it costs to know it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from cads.scoring.pool_scores import reading_flops
from cads.search.constants import FROM_SCRATCH, constants_of
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop
from cads.search.rungs import affordable
from cads.search.space import SearchSpace


def probe_positions(space: SearchSpace, count: int = FROM_SCRATCH.probe_examples[0]) -> list[np.ndarray]:
    """Positions of the examples of each source on which R is measured, `count` at most."""
    return [np.flatnonzero(space.pool.sources == source)[:count] for source in range(len(space.sizes))]


def probing_flops(costs: InnerLoopCosts, positions: Sequence[np.ndarray]) -> float:
    """What `mean_losses` will charge: where lengths differ, not what a mean example costs."""
    pool, forward = costs.task.pool, costs.task.costs.forward
    return sum(reading_flops(forward, pool, of_source) for of_source in positions)


def mean_losses(inner: InnerLoop, positions: Sequence[np.ndarray], model: nn.Module) -> np.ndarray:
    """The mean loss of a model on the examples of each source, of which R is made, nats, shape (S,)."""
    return np.array([inner.losses(model, of_source, stage="R").mean() for of_source in positions])


def theta_flops(
    costs: InnerLoopCosts, space: SearchSpace, train_flops: float, policy_steps: int
) -> tuple[float, list[np.ndarray]]:
    """What the target model, theta, is trained for, and the positions on which R is measured.

    Where trials are too few to learn which sources matter, its losses are the guide. Then it is trained for less, and
    measured on fewer examples.

    Args:
        policy_steps: of the policy after each rung.

    Returns:
        FLOPs, 0 if they would take too much of what the ledger has left; and positions, by source.
    """
    constants = constants_of(costs.task)
    flops = costs.target_flops(constants.theta_share, constants.theta_passes, train_flops)
    max_flops = constants.theta_max_allowance * costs.ledger.left
    many, few = constants.probe_examples
    positions = probe_positions(space, many)
    if flops + _all_probing_flops(costs, positions) > max_flops:
        if constants.subtracts_reference:
            max_flops = max(max_flops, min_theta_flops(costs, space))
        rungs = affordable(costs, space, train_flops, policy_steps, reserved=max_flops)
        if not rungs or rungs[0].n_trials > constants.guided_trials * len(space.sizes):
            return 0.0, positions
        min_flops = constants.theta_min_steps * costs.target_step_flops
        if max_flops - _all_probing_flops(costs, positions) < min_flops:
            positions = probe_positions(space, few)
        flops = max_flops - _all_probing_flops(costs, positions)
    return (0.0 if flops < costs.target_step_flops else flops), positions


def _all_probing_flops(costs: InnerLoopCosts, positions: Sequence[np.ndarray]) -> float:
    """What measuring the sources will charge, with all models that are."""
    return constants_of(costs.task).n_probed_models * probing_flops(costs, positions)


def min_theta_flops(costs: InnerLoopCosts, space: SearchSpace) -> float:
    """FLOPs of a target model that is trained and measured just enough to tell sources apart."""
    constants = constants_of(costs.task)
    few = probe_positions(space, constants.probe_examples[1])
    return constants.theta_min_steps * costs.target_step_flops + _all_probing_flops(costs, few)


def excess_target_loss(
    inner: InnerLoop, risk: np.ndarray, positions: Sequence[np.ndarray], reference_model: nn.Module
) -> np.ndarray:
    """The risk of each source less the loss of the reference model there, centred over sources; shape (S,).

    A pretrained model finds some sources easier than others, whatever they are good for. From whatever it is trained
    on, it learns how long answers are and how they end. Both are taken out, as the penalty takes out what can be
    reached.

    Args:
        risk: of the target model, nats, shape (S,). positions: of the examples of each source that it was measured on.
        reference_model: trained on the pool.
    """
    reached = mean_losses(inner, positions, reference_model)
    return np.asarray(risk - (reached - reached.mean()))
