"""Rungs of trials: how many, how long, on how much of the data (multi-fidelity search)."""

from __future__ import annotations

import math
from dataclasses import dataclass

MIN_FIDELITY, RUNG_FACTOR = 1 / 16, 2
"""Share of the budget (and of each source) of the shortest runs, and by what it grows from rung to rung."""
RUNG_BUDGET_SHARES = ((1.0,), (0.6, 0.4), (0.4, 0.3, 0.3))
"""How the allowance is divided among rungs, lowest first, where there are one, two and three of them: with few runs
in all, it pays to learn from many short ones."""
PRETRAINED_RUNG_BUDGET_SHARES = ((1.0,), (0.5, 0.5), (0.4, 0.3, 0.3))
"""The same where models are pretrained, whose shortest runs mislead most: they hide what will be learned by heart."""
MAX_KEPT_PASSES = 16
"""Short runs see as many passes as the full one, up to this many; above it they lose passes and examples alike (the
share of the data is multiplied by the root of the excess). What is worth training on changes with both: fewer
passes hide what will be learned by heart, fewer examples make quantity look dear."""
PRETRAINED_DATA_FACTOR = 1 / 2
"""Share of the data, of what keeps the passes, that runs of pretrained models see: they make twice as many."""
FULL_DATA_MAX_PASSES = 2.5
"""Passes of the final training over the pool up to which runs of pretrained models see all of it. What is worth
keeping is then gone over some three times, which costs nothing yet, and on a part of the data what is left out would be
missing: of 900 examples the best fifth is 0.16 to 0.24 nats ahead of the pool in ten steps on all of it, as it is in
the end, and hardly or not in ten steps on a seventh (`experiments/results`)."""
MIN_STEPS = 10
"""Steps of the shortest run. Runs from the same weights differ by their data and its order alone: after ten steps they
already rank subsets of sources with a Spearman correlation of 0.75 to 0.97 (`experiments/results`)."""
MIN_TRIALS = 3
"""Short runs, the full pool's among them, below which nothing is spent."""


@dataclass(frozen=True)
class Rung:
    """One rung_index of the ladder of short runs: `runs` of `flops` each, a share `fidelity` of the final training's,
    on a share `data` of each source."""

    fidelity: float
    flops: float
    data_fraction: float
    n_trials: int

    @property
    def stage(self) -> str:
        """What the ledger calls it."""
        return f"short runs, C/{1 / self.fidelity:.3g}"


def fidelity_schedule(
    train_flops: float,
    allowance: float,
    step: float,
    per_run: float,
    passes: float,
    per_rung: float = 0.0,
    *,
    pretrained: bool = False,
) -> list[Rung]:
    """Short runs that spend `allowance`.

    The smallest run follows from the budget: at least `MIN_STEPS`, at most the whole training. Rungs
    that would hold fewer than two runs (one is always the full pool) are left out, the highest first; a single one
    needs `MIN_TRIALS`, since one candidate is no search.

    Args:
        training: C, FLOPs of the final training. allowance: FLOPs for all runs. step: FLOPs of one step.
        per_run: FLOPs on top of each run, for measuring it. passes: over the pool, that `training` buys.
        per_rung: FLOPs on top of each rung, for learning from it. pretrained: whether models are.
    """
    lowest = max(MIN_FIDELITY, MIN_STEPS * step / train_flops)
    shares = PRETRAINED_RUNG_BUDGET_SHARES if pretrained else RUNG_BUDGET_SHARES
    fidelities = sorted({min(1.0, lowest * RUNG_FACTOR**rung_index) for rung_index in range(len(shares))})
    while fidelities:
        rungs = []
        for f, share in zip(fidelities, shares[len(fidelities) - 1], strict=True):
            n_trials = int(max(0.0, allowance * share - per_rung) / (f * train_flops + per_run))
            decides = f == fidelities[-1]
            data = data_fraction(f, passes, decides=decides, pretrained=pretrained)
            rungs.append(Rung(f, f * train_flops, data, n_trials))
        if all(r.n_trials >= (2 if len(rungs) > 1 else MIN_TRIALS) for r in rungs):
            return rungs
        fidelities.pop()
    return []


def data_fraction(fidelity: float, passes: float, *, decides: bool, pretrained: bool = False) -> float:
    """Share of each source that a run on a share `fidelity` of the budget sees.

    A run that decides gives up passes as well as examples, as long as it sees each example once, because where examples
    alone are missing, quantity looks dearer than it is. Those of pretrained models never do: these learn a small subset
    by heart within the passes that the final training makes over it, which takes a shorter run more of them; where
    there are too few passes for that (`FULL_DATA_MAX_PASSES`), it sees everything.

    Args:
        passes: over the pool, that the whole budget buys.
    """
    share = fidelity * max(1.0, math.sqrt(passes / MAX_KEPT_PASSES))
    if pretrained:
        share = 1.0 if passes <= FULL_DATA_MAX_PASSES else share * PRETRAINED_DATA_FACTOR
    elif decides:
        share = max(share, min(math.sqrt(fidelity), fidelity * passes))
    return min(1.0, share)


PRETRAINED_SHARE, PRETRAINED_STEPS = 0.1, 16
"""Of models that are pretrained, theta takes this share of the allowance, and of C, at most, and this many steps at
least: fewer do not tell examples apart, and more than twice as many add nothing (`experiments/results`). u is trained
for as much."""
