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
from cads.search.inner_costs import Purse
from cads.search.inner_runs import Inner, Runs
from cads.search.space import Space
from cads.seeding import derive

ENUMERATED = 10
"""Up to this many sources the gradient of E[h] is exact; above, it is sampled."""
SAMPLED = 2048
"""Draws for that sample, and for candidates of the next rung."""


def update_flops(space: Space, runs: int, steps: int) -> float:
    """Learning from a rung: the regression on `runs` short runs, and `steps` of the policy."""
    drawn = SAMPLED if space.count is None or len(space.sizes) > ENUMERATED else space.count
    designed = design_flops(drawn, n_columns(len(space.sizes)), runs)
    return designed + source_policy_flops(len(space.sizes), space.n_features, drawn, runs, steps)


def affordable(purse: Purse, space: Space, training: float, steps: int, reserved: float = 0.0) -> list[Rung]:
    """The ladder that what is left of the ledger buys, with `steps` of the policy after each rung, and as much as is
    reserved."""
    most, rungs = 0, purse.ladder(training)
    # A ladder of fewer rungs can hold more runs, from which it takes more to learn.
    while (runs := sum(rung.runs for rung in rungs)) > most:
        most, rungs = runs, purse.ladder(training, update_flops(space, runs, steps) + reserved)
    return rungs


def run_rung(
    inner: Inner, space: Space, draws: np.ndarray, rung: Rung, seed: int, height: int, begun: Runs | None = None
) -> Runs:
    """Train each draw on the rung's share of the pool; see `run_streams`.

    What two draws have in common comes in another order in each: orders are drawn over all that a draw selects.
    """
    positions = subsample(inner.task.pool, rung.data, derive(seed, "subsample"))
    order = derive(seed, "rung", height)
    return run_streams(inner, [space.stream(draw, positions, order) for draw in draws], rung, order, begun)


def run_streams(inner: Inner, streams: Sequence[Stream], rung: Rung, order: int, begun: Runs | None = None) -> Runs:
    """Train on each stream, all from the same weights and with the same dropout.

    Args:
        streams: the first is that of the full pool.
        order: seed of weights and dropout.
        begun: the run on the first stream, if it has been made before.

    Raises:
        DataError: if the run on the full pool, which all others are measured against, has no finite objective.
    """
    if begun is not None:
        streams = streams[1:]
    beside = None if begun is None else begun.first
    runs = inner.run(streams, rung.flops, seed=order, stage=rung.stage, beside=beside)
    if begun is not None:
        runs = begun.followed_by(runs)
    check_reference(float(runs.objective[0]), rung.stage)
    return runs
