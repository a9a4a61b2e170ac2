"""What a run does before it trains on target and pool together. Its plan and the run both follow from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cads.search.inner_costs import InnerLoopCosts
from cads.search.stages import FitTarget, ScorePool, Stages, UpdatePolicy
from cads.selectors.online.likeness import LIKENESS, likeness_flops
from cads.selectors.online.schedule import OnlineConstants, first_phase
from cads.selectors.online.strata import source_count
from cads.task import Task

PROBE, FIRST_PROBE = "probe", "probe of the initial model"


@dataclass(frozen=True)
class Opening:
    """The FLOPs and probes of the opening of a run.

    Attributes:
        first: FLOPs of the first phase, on the target alone; 0 if the target is not trained on.
        theta: FLOPs of a model of the target that steers, and is not the final one; 0: there is none.
        per_source: examples of each source whose losses are measured; 0: none, since there is nothing to tell, or no
            model that can.
        n_sources: sources of the pool. probes: stages in which these losses are measured.
        comparing: FLOPs for comparing pool and target without a model; 0: they are not compared.
        mixed: whether target and pool are drawn together from the start, see `mixture`.
        near: whether texts of the target's kind are told from others; only where `mixed`.
    """

    first: float
    theta: float
    per_source: int
    n_sources: int
    probes: tuple[str, ...]
    comparing: float
    mixed: bool
    near: bool

    def stages(self) -> Stages:
        """What is charged to "select"; the first phase is part of the training of the final model."""
        if self.comparing:
            yield UpdatePolicy(self.comparing, LIKENESS)
        if not self.per_source:
            return
        if self.theta:
            yield FitTarget(self.theta)
        for name in self.probes:
            yield ScorePool(self.per_source * self.n_sources, name)


def opening_of(
    costs: InnerLoopCosts,
    constants: OnlineConstants,
    total: float,
    *,
    on_target: bool,
    by_likeness: bool,
    divides: bool,
) -> Opening:
    """The opening of a run of `total` FLOPs.

    A model that does not know the target yet cannot tell sources apart: then none are probed.

    Args:
        on_target: whether the target is trained on; if not, a model of it steers.
        by_likeness: whether examples are told apart by how much they look like the target.
        divides: whether examples of a source may have probabilities of their own.
    """
    task = costs.task
    # Batches of the target may be longer than the mean, and the first phase takes one.
    first = _first_flops(task, constants, total) if on_target else 0.0
    first = min(total, max(first, costs.target_step_flops)) if first else 0.0
    theta = 0.0 if on_target else _steering_flops(costs, constants, total)
    judges = first < total if on_target else theta > 0
    probes = (FIRST_PROBE, PROBE) if constants.drop else (PROBE,)
    per_source = _probes_per_source(task, constants, total, len(probes)) if judges else 0
    # Where nothing is told apart, neither sources nor labels, the target needs no phase of its own.
    mixed = bool(constants.mixed_lead) and on_target and not per_source and task.guess_loss is None
    if mixed:
        first = 0.0
    # Sources of texts that cannot be told apart say nothing; what the texts are about does.
    by_likeness = by_likeness or (divides and constants.drop and not per_source)
    comparing, near = 0.0, False
    if by_likeness and first < total:
        affordable = constants.most_comparing * total
        near = mixed and task.bags and len(task.target) > 1 and likeness_flops(task, near=True) <= affordable
        comparing = likeness_flops(task, near=near)
        if comparing > affordable:
            comparing = 0.0
    return Opening(first, theta, per_source, source_count(task.pool), probes, comparing, mixed, near)


def _first_flops(task: Task, constants: OnlineConstants, total: float) -> float:
    usage = task.costs.per_usage(task.target, task.recipe.batch_size)
    return first_phase(constants, task.recipe, n_target=len(task.target), usage_flops=usage, total=total)


def _steering_flops(costs: InnerLoopCosts, constants: OnlineConstants, total: float) -> float:
    """For a model of the target that steers: as many passes as the first phase would take; 0 if that buys no step."""
    flops = costs.target_flops(constants.most_steering, constants.first_passes, total)
    return flops if flops >= costs.target_step_flops else 0.0


def _probes_per_source(task: Task, constants: OnlineConstants, total: float, n_stages: int) -> int:
    """Examples of each source that are probed: as many as a share of the budget buys; 0 if they would tell nothing."""
    n_sources = source_count(task.pool)
    if n_sources < 2:
        return 0
    forward = task.costs.per_usage(task.pool, task.recipe.batch_size) / 3
    affordable = round(constants.most_probing * total / (forward * n_sources * n_stages))
    if constants.drop and affordable < constants.fewest_probes:
        return 0
    return int(np.clip(affordable, constants.fewest_probes, constants.probes))
