"""The short runs on subsets or mixtures of sources: what the ladder of them buys, and making them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cads.accounting.operations import design_flops, source_policy_flops
from cads.data.streams import Stream
from cads.data.subsample import subsample
from cads.estimators.design import n_columns
from cads.search.base import check_reference
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop, InnerRuns
from cads.search.space import SearchSpace
from cads.seeding import derive

ENUMERATED = 10
"""Up to this many sources the gradient of E[h] is exact; above, it is sampled."""
SAMPLED = 2048
"""Draws for that sample, and for candidates of the next rung."""


def update_flops(space: SearchSpace, runs: int, steps: int) -> float:
    """Learning from a rung: the regression on `runs` short runs, and `steps` of the policy."""
    drawn = SAMPLED if space.count is None or len(space.sizes) > ENUMERATED else space.count
    designed = design_flops(drawn, n_columns(len(space.sizes)), runs)
    return designed + source_policy_flops(len(space.sizes), space.n_features, drawn, runs, steps)


def affordable(
    costs: InnerLoopCosts, space: SearchSpace, train_flops: float, steps: int, reserved: float = 0.0
) -> list[Rung]:
    """The ladder that what is left of the ledger buys, with `steps` of the policy after each rung, and as much as is
    reserved."""
    most, rungs = 0, costs.fidelity_schedule(train_flops)
    # A ladder of fewer rungs can hold more runs, from which it takes more to learn.
    while (runs := sum(rung.n_trials for rung in rungs)) > most:
        most, rungs = runs, costs.fidelity_schedule(train_flops, update_flops(space, runs, steps) + reserved)
    return rungs


def run_rung(
    inner: InnerLoop,
    space: SearchSpace,
    draws: np.ndarray,
    rung: Rung,
    seed: int,
    rung_index: int,
    reference_run: InnerRuns | None = None,
) -> InnerRuns:
    """Train each draw on the rung's share of the pool; see `run_streams`.

    What two draws have in common comes in another order in each: orders are drawn over all that a draw selects.
    """
    positions = subsample(inner.task.pool, rung.data_fraction, derive(seed, "subsample"))
    order = derive(seed, "rung", rung_index)
    return run_streams(inner, [space.stream(draw, positions, order) for draw in draws], rung, order, reference_run)


def run_streams(
    inner: InnerLoop, streams: Sequence[Stream], rung: Rung, order: int, reference_run: InnerRuns | None = None
) -> InnerRuns:
    """Train on each stream, all from the same weights and with the same dropout.

    Args:
        streams: the first is that of the full pool.
        order: seed of weights and dropout.
        begun: the run on the first stream, if it has been made before.

    Raises:
        DataError: if the run on the full pool, which all others are measured against, has no finite objective.
    """
    if reference_run is not None:
        streams = streams[1:]
    beside = None if reference_run is None else reference_run.reference
    runs = inner.run(streams, rung.flops, seed=order, stage=rung.stage, reference=beside)
    if reference_run is not None:
        runs = reference_run.followed_by(runs)
    check_reference(float(runs.objective[0]), rung.stage)
    return runs
