"""Rungs of trials: how many, how long, on how much of the data (multi-fidelity search)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cads.search.constants import FROM_SCRATCH, SearchConstants


@dataclass(frozen=True)
class Rung:
    """Trials of one length.

    Attributes:
        fidelity: FLOPs of a trial as a share of the final training's.
        flops: of each trial.
        data_fraction: share of each source that a trial sees.
        n_trials: how many, the full pool's among them.
    """

    fidelity: float
    flops: float
    data_fraction: float
    n_trials: int

    @property
    def stage(self) -> str:
        """What the ledger calls it; stored accounts hang on it."""
        return f"short runs, C/{1 / self.fidelity:.3g}"


def fidelity_schedule(
    train_flops: float,
    allowance: float,
    step: float,
    per_trial: float,
    passes: float,
    per_rung: float = 0.0,
    *,
    constants: SearchConstants = FROM_SCRATCH,
) -> list[Rung]:
    """The rungs that `allowance` buys, lowest fidelity first.

    The shortest trial follows from the budget: it has at least `min_steps` steps, and at most those of the whole
    training. A rung needs two trials, of which one is always the full pool. Rungs that would hold fewer are left out,
    the highest first. A single rung needs `min_trials`.

    Args:
        train_flops: C, FLOPs of the final training. allowance: FLOPs for all trials. step: FLOPs of one step.
        per_trial: FLOPs on top of each trial, for measuring it. passes: over the pool, that `train_flops` buys.
        per_rung: FLOPs on top of each rung, for learning from it. constants: of the models.
    """
    lowest = max(constants.min_fidelity, constants.min_steps * step / train_flops)
    shares = constants.rung_budget_shares
    fidelities = sorted({min(1.0, lowest * constants.rung_factor**rung_index) for rung_index in range(len(shares))})
    while fidelities:
        rungs = []
        for f, share in zip(fidelities, shares[len(fidelities) - 1], strict=True):
            n_trials = int(max(0.0, allowance * share - per_rung) / (f * train_flops + per_trial))
            decides = f == fidelities[-1]
            rungs.append(Rung(f, f * train_flops, data_fraction(f, passes, constants, decides=decides), n_trials))
        if all(r.n_trials >= (2 if len(rungs) > 1 else constants.min_trials) for r in rungs):
            return rungs
        fidelities.pop()
    return []


def data_fraction(fidelity: float, passes: float, constants: SearchConstants = FROM_SCRATCH, *, decides: bool) -> float:
    """Share of each source that a trial of `fidelity` sees.

    A trial keeps the passes of the final training, up to `max_kept_passes`. One that decides gives up passes as well as
    examples, as long as it sees each example once: where examples alone are missing, quantity looks dearer than it is.
    Trials of pretrained models never do. They make more passes, as the final training learns a small subset by heart;
    where there are too few passes for that (`full_data_max_passes`), they see everything.

    Args:
        passes: over the pool, that the whole budget buys. decides: whether no longer trial follows.
    """
    if passes <= constants.full_data_max_passes:
        return 1.0
    share = fidelity * max(1.0, math.sqrt(passes / constants.max_kept_passes)) * constants.data_factor
    if decides and constants.shares_data_when_deciding:
        share = max(share, min(math.sqrt(fidelity), fidelity * passes))
    return min(1.0, share)
