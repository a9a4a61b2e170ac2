"""Rungs of trials: their number, length and share of the data (multi-fidelity search)."""

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
        n_trials: number of trials, the one on the full pool among them.
    """

    fidelity: float
    flops: float
    data_fraction: float
    n_trials: int

    @property
    def stage(self) -> str:
        """The stage of the ledger. Stored ledgers hold this name."""
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

    The shortest trial follows from the budget: it has at least `min_steps` steps, and at most those of the final
    training. A rung needs two trials, one of which is always on the full pool. A single rung needs `min_trials`. If a
    rung would hold fewer, the highest rung is left out.

    Args:
        train_flops: C, FLOPs of the final training. allowance: FLOPs for all trials. step: FLOPs of one step.
        per_trial: further FLOPs of each trial, for measuring it. passes: over the pool, that `train_flops` buys.
        per_rung: further FLOPs of each rung, for updating the policy. constants: of the models.
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

    A trial makes as many passes as the final training, up to `max_kept_passes`. A trial of the deciding rung gives up
    passes as well as examples, as long as it sees each example once: with examples alone given up, it would overrate
    the quantity of data. Trials of pretrained models do not give up passes. They make more of them, as the final
    training memorises a small subset. Up to `full_data_max_passes` passes of the final training they see the full pool.

    Args:
        passes: over the pool, that the final training makes. decides: whether no longer trial follows.
    """
    if passes <= constants.full_data_max_passes:
        return 1.0
    share = fidelity * max(1.0, math.sqrt(passes / constants.max_kept_passes)) * constants.data_factor
    if decides and constants.shares_data_when_deciding:
        share = max(share, min(math.sqrt(fidelity), fidelity * passes))
    return min(1.0, share)
