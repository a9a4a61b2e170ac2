"""Trials on subsets or mixtures of sources: the rungs that a budget buys, and running them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cads.accounting.operations import design_flops, source_policy_flops
from cads.data.streams import Stream
from cads.data.subsample import subsample
from cads.data.token_batches import in_id_order
from cads.estimators.design import n_columns
from cads.search.base import check_reference
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop, InnerRuns
from cads.search.space import SearchSpace
from cads.seeding import derive

ENUMERATED = 10
"""Most sources for which the gradient of E[h], the expected regression, is exact; above, it is sampled."""
SAMPLED = 2048
"""Draws of the policy for that gradient, and for the candidates of the next rung."""


def update_flops(space: SearchSpace, runs: int, steps: int) -> float:
    """FLOPs of learning from a rung: the regression on `runs` trials, and `steps` of the policy."""
    drawn = SAMPLED if space.count is None or len(space.sizes) > ENUMERATED else space.count
    designed = design_flops(drawn, n_columns(len(space.sizes)), runs)
    return designed + source_policy_flops(len(space.sizes), space.n_features, drawn, runs, steps)


def affordable_rungs(
    costs: InnerLoopCosts, space: SearchSpace, train_flops: float, steps: int, reserved: float = 0.0
) -> list[Rung]:
    """The rungs that the rest of the ledger's limit buys, with `steps` of the policy after each rung.

    Args:
        reserved: FLOPs that all rungs together leave for other costs.
    """
    max_trials, rungs = 0, costs.fidelity_schedule(train_flops, reserved=reserved)
    # A schedule of fewer rungs can hold more trials, and learning from more trials costs more.
    while (n_trials := sum(rung.n_trials for rung in rungs)) > max_trials:
        max_trials = n_trials
        rungs = costs.fidelity_schedule(train_flops, update_flops(space, n_trials, steps), reserved)
    return rungs


def run_rung(
    inner: InnerLoop,
    space: SearchSpace,
    draws: np.ndarray,
    rung: Rung,
    seed: int,
    rung_index: int,
    reference_run: InnerRuns | None = None,
    horizon: float | None = None,
) -> InnerRuns:
    """Train each draw on the rung's share of the pool; see `run_streams`.

    Examples that two draws share come in a different order in each: an order is drawn over all that a draw selects.
    """
    pool = inner.task.pool
    positions = in_id_order(pool, subsample(pool, rung.data_fraction, derive(seed, "subsample")))
    order = derive(seed, "rung", rung_index)
    return run_streams(
        inner, [space.stream(draw, positions, order) for draw in draws], rung, order, reference_run, horizon
    )


def run_streams(
    inner: InnerLoop,
    streams: Sequence[Stream],
    rung: Rung,
    order: int,
    reference_run: InnerRuns | None = None,
    horizon: float | None = None,
) -> InnerRuns:
    """Train one model on each stream, all from the same weights and with the same dropout.

    Args:
        streams: the first is that of the full pool.
        order: seed of weights and dropout.
        reference_run: the trial on the first stream, if it has been run before.
        horizon: see `InnerLoop.run`.

    Raises:
        DataError: if the trial on the full pool, to which all others are compared, has no finite objective.
    """
    if reference_run is not None:
        streams = streams[1:]
    objective = None if reference_run is None else reference_run.reference
    keep = None if reference_run is None else 0
    runs = inner.run(streams, rung.flops, seed=order, stage=rung.stage, reference=objective, keep=keep, horizon=horizon)
    if reference_run is not None:
        runs = reference_run.followed_by(runs)
    check_reference(float(runs.objective[0]), rung.stage)
    return runs
