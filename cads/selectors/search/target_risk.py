"""R of each source: the loss of the target model on its examples, and the cost of measuring it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from cads.data.draws import draw_by_source
from cads.scoring.pool_scores import reading_flops
from cads.search.constants import FROM_SCRATCH, constants_of
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop
from cads.search.rungs import affordable_rungs
from cads.search.space import SearchSpace
from cads.seeding import derive


def probe_positions(space: SearchSpace, count: int = FROM_SCRATCH.probe_examples[0]) -> list[np.ndarray]:
    """Positions of the examples of each source on which R is measured: `count` random ones, or all if there are fewer.

    The draw has a fixed seed, so that a plan, which has no seed, prices the examples that a run measures.
    """
    return draw_by_source(space.pool, count, derive(0, "probes"))


def probing_flops(costs: InnerLoopCosts, positions: Sequence[np.ndarray]) -> float:
    """The FLOPs that `mean_losses` charges: those of these examples, as lengths may differ from the mean."""
    pool, forward = costs.task.pool, costs.task.costs.forward
    return sum(reading_flops(forward, pool, source_positions) for source_positions in positions)


def mean_losses(inner: InnerLoop, positions: Sequence[np.ndarray], model: nn.Module) -> np.ndarray:
    """The mean loss of a model on the examples of each source, nats, shape (S,); R, if it is the target model."""
    return np.array([inner.losses(model, source_positions, stage="R").mean() for source_positions in positions])


def theta_flops(
    costs: InnerLoopCosts, space: SearchSpace, train_flops: float, policy_steps: int
) -> tuple[float, list[np.ndarray]]:
    """FLOPs of training the target model, theta, and the positions on which R is measured.

    If they exceed `theta_max_allowance`, and the trials are too few to learn which sources matter, the target model
    guides the search still. Then it is trained for fewer FLOPs, and measured on fewer examples.

    Args:
        policy_steps: steps of the policy after each rung.

    Returns:
        FLOPs, 0 for no target model; and positions, by source.
    """
    constants = constants_of(costs.task)
    flops = costs.target_flops(constants.theta_share, constants.theta_passes, train_flops)
    max_flops = constants.theta_max_allowance * costs.ledger.left
    default_count, reduced_count = constants.probe_examples
    positions = probe_positions(space, default_count)
    if flops + _all_probing_flops(costs, positions) > max_flops:
        if constants.subtracts_reference:
            max_flops = max(max_flops, min_theta_flops(costs, space))
        rungs = affordable_rungs(costs, space, train_flops, policy_steps, reserved=max_flops)
        if not rungs or rungs[0].n_trials > constants.guided_trials * len(space.sizes):
            return 0.0, positions
        min_flops = constants.theta_min_steps * costs.target_step_flops
        if max_flops - _all_probing_flops(costs, positions) < min_flops:
            positions = probe_positions(space, reduced_count)
        flops = max_flops - _all_probing_flops(costs, positions)
    return (0.0 if flops < costs.target_step_flops else flops), positions


def _all_probing_flops(costs: InnerLoopCosts, positions: Sequence[np.ndarray]) -> float:
    """FLOPs of measuring all sources, with each of the `n_probed_models`."""
    return constants_of(costs.task).n_probed_models * probing_flops(costs, positions)


def min_theta_flops(costs: InnerLoopCosts, space: SearchSpace) -> float:
    """Fewest FLOPs with which a target model is trained and measured enough to tell sources apart."""
    constants = constants_of(costs.task)
    positions = probe_positions(space, constants.probe_examples[1])
    return constants.theta_min_steps * costs.target_step_flops + _all_probing_flops(costs, positions)


def excess_target_loss(
    inner: InnerLoop, target_losses: np.ndarray, positions: Sequence[np.ndarray], reference_model: nn.Module
) -> np.ndarray:
    """R of each source less the loss of the reference model there, centred over sources; shape (S,).

    A pretrained model finds some sources easier than others, whatever their value for training. From any data it
    learns how long answers are and how they end. The reference model's loss holds both effects and removes them, as
    the penalty subtracts the loss within reach.

    Args:
        target_losses: R, of the target model, nats, shape (S,).
        positions: of the examples of each source that R was measured on.
        reference_model: trained on the pool.
    """
    reference_loss = mean_losses(inner, positions, reference_model)
    return np.asarray(target_losses - (reference_loss - reference_loss.mean()))
