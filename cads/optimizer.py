"""What CADS-S and CADS-E share: dividing the compute, the ladder of short runs, and the guard."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cads.budget import ROUNDING, Budget, Ledger, PlannedLedger
from cads.errors import BudgetError, ConfigError
from cads.monitor import Monitor
from cads.selection import Selection
from cads.task import Pool, Task

COUNTED_ALLOWANCE, ALLOWED_PER_PASS = (1 / 3, 1.0), 1 / 12
"""Selection's share, least and most, in units of what is left for training, if the budget must cover both, and how it
grows with the passes over the pool that the budget buys: up to four, a pass is worth nearly as much as one over fresh
examples, and past that less and less (Muennighoff et al. 2023), so that selection takes what is worth little."""
PRETRAINED_PER_PASS, MOST_FOR_LEAST = 1 / 6, 3.0
"""The same for models that are pretrained: they learn a pool by heart within fewer passes. And where that does not buy
the least that a search can do, they give up to this much for it: how much they are trained matters less to them than on
what (`experiments/results`)."""
LOWEST, STEP = 1 / 16, 2
"""Share of the budget (and of each source) of the shortest runs, and by what it grows from rung to rung."""
SHARES = ((1.0,), (0.6, 0.4), (0.4, 0.3, 0.3))
"""How the allowance is divided among rungs, lowest first, where there are one, two and three of them: with few runs
in all, it pays to learn from many short ones."""
PRETRAINED_SHARES = ((1.0,), (0.5, 0.5), (0.4, 0.3, 0.3))
"""The same where models are pretrained, whose shortest runs mislead most: they hide what will be learned by heart."""
KEPT_PASSES = 16
"""Short runs see as many passes as the full one, up to this many; above it they lose passes and examples alike (the
share of the data is multiplied by the root of the excess). What is worth training on changes with both: fewer
passes hide what will be learned by heart, fewer examples make quantity look dear."""
BY_HEART = 1 / 2
"""Share of the data, of what keeps the passes, that runs of pretrained models see: they make twice as many."""
FEW_PASSES = 2.5
"""Passes of the final training over the pool up to which runs of pretrained models see all of it. What is worth
keeping is then gone over some three times, which costs nothing yet, and on a part of the data what is left out would be
missing: of 900 examples the best fifth is 0.16 to 0.24 nats ahead of the pool in ten steps on all of it, as it is in
the end, and hardly or not in ten steps on a seventh (`experiments/results`)."""
MIN_STEPS = 10
"""Steps of the shortest run. Runs from the same weights differ by their data and its order alone: after ten steps they
already rank subsets of sources with a Spearman correlation of 0.75 to 0.97 (`experiments/results`)."""
LEAST_RUNS = 3
"""Short runs, the full pool's among them, below which nothing is spent."""


class Selector(Protocol):
    """Anything that chooses what to train on; found through the entry-point group `cads.selectors`."""

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Choose from `task.pool` for training within `budget`, charging `ledger` for what is spent."""
        ...

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """What `select` would charge, by stage; nothing is trained and no example is read."""
        ...


@dataclass(frozen=True)
class Division:
    """How a budget is divided.

    Attributes:
        training: FLOPs for training the final model.
        selection: the most that selection may spend.
    """

    training: float
    selection: float


def divide(task: Task, budget: Budget, allowance: float | None, default: float, least: float = 0.0) -> Division:
    """Divide `budget` between selection and training.

    Args:
        allowance: selection FLOPs in units of the training FLOPs; None for `default`, but for no more than
            `counted_allowance` if the budget must cover selection.
        least: FLOPs below which selection can do nothing.

    Raises:
        ConfigError: if the allowance is negative or not finite.
        BudgetError: if what is left for training does not buy one step.
    """
    total = budget.flops(task)
    if allowance is None:
        allowance = min(counted_allowance(task, total, least), default) if budget.count_selection else default
    if not (math.isfinite(allowance) and allowance >= 0):
        raise ConfigError(f"allowance = {allowance}: it must be finite and >= 0, in units of the training FLOPs")
    training = total / (1 + allowance) if budget.count_selection else total
    check_step(task, training)
    return Division(training, allowance * training)


def counted_allowance(task: Task, total: float, least: float = 0.0) -> float:
    """What selection may spend of `total` FLOPs that cover training too, in units of what is left for training.

    A step of training is left, if `total` buys one.

    Args:
        least: FLOPs below which selection can do nothing.
    """
    usages = total / task.costs.per_usage(task.pool, task.recipe.batch_size)
    lowest, most = COUNTED_ALLOWANCE
    per_pass = PRETRAINED_PER_PASS if task.pretrained else ALLOWED_PER_PASS
    wanted = min(most, max(lowest, per_pass * usages / len(task.pool)))
    least *= ROUNDING
    if task.pretrained and least < total and (needed := least / (total - least)) <= MOST_FOR_LEAST:
        wanted = max(wanted, needed)
    return min(wanted, max(0.0, usages / task.recipe.batch_size - 1))


def check_step(task: Task, flops: float) -> None:
    """Refuse a budget that does not buy one training step.

    Raises:
        BudgetError: with the cost of a step.
    """
    batch_size = task.recipe.batch_size
    step = task.costs.per_usage(task.pool, batch_size) * batch_size
    if flops < step * (1 - 1e-9):
        raise BudgetError(
            f"a budget of {flops:.4g} FLOPs does not buy one step of {batch_size} examples, which costs "
            f"{step:.4g}: raise the budget or lower batch_size"
        )


@dataclass(frozen=True)
class Rung:
    """One height of the ladder of short runs: `runs` of `flops` each, a share `fidelity` of the final training's,
    on a share `data` of each source."""

    fidelity: float
    flops: float
    data: float
    runs: int

    @property
    def stage(self) -> str:
        """What the ledger calls it."""
        return f"short runs, C/{1 / self.fidelity:.3g}"


def ladder(
    training: float,
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
    needs `LEAST_RUNS`, since one candidate is no search.

    Args:
        training: C, FLOPs of the final training. allowance: FLOPs for all runs. step: FLOPs of one step.
        per_run: FLOPs on top of each run, for measuring it. passes: over the pool, that `training` buys.
        per_rung: FLOPs on top of each rung, for learning from it. pretrained: whether models are.
    """
    lowest = max(LOWEST, MIN_STEPS * step / training)
    shares = PRETRAINED_SHARES if pretrained else SHARES
    fidelities = sorted({min(1.0, lowest * STEP**height) for height in range(len(shares))})
    while fidelities:
        rungs = []
        for f, share in zip(fidelities, shares[len(fidelities) - 1], strict=True):
            runs = int(max(0.0, allowance * share - per_rung) / (f * training + per_run))
            decides = f == fidelities[-1]
            data = data_share(f, passes, decides=decides, pretrained=pretrained)
            rungs.append(Rung(f, f * training, data, runs))
        if all(r.runs >= (2 if len(rungs) > 1 else LEAST_RUNS) for r in rungs):
            return rungs
        fidelities.pop()
    return []


def data_share(fidelity: float, passes: float, *, decides: bool, pretrained: bool = False) -> float:
    """Share of each source that a run on a share `fidelity` of the budget sees.

    A run that decides gives up passes as well as examples, as long as it sees each example once, because where examples
    alone are missing, quantity looks dearer than it is. Those of pretrained models never do: these learn a small subset
    by heart within the passes that the final training makes over it, which takes a shorter run more of them; where
    there are too few passes for that (`FEW_PASSES`), it sees everything.

    Args:
        passes: over the pool, that the whole budget buys.
    """
    share = fidelity * max(1.0, math.sqrt(passes / KEPT_PASSES))
    if pretrained:
        share = 1.0 if passes <= FEW_PASSES else share * BY_HEART
    elif decides:
        share = max(share, min(math.sqrt(fidelity), fidelity * passes))
    return min(1.0, share)


def free(task: Task, budget: Budget) -> PlannedLedger:
    """The plan of a selector that spends nothing.

    Raises:
        BudgetError: if the budget does not buy one step.
    """
    check_step(task, budget.flops(task))
    return PlannedLedger()


def strata(pool: Pool) -> np.ndarray:
    """The source of each example, or 0 for all if the pool has no sources; shape (N,)."""
    return np.zeros(len(pool), dtype=np.int32) if pool.sources is None else pool.sources


def subsample(pool: Pool, fidelity: float, seed: int) -> np.ndarray:
    """A random share of the contents of each source, at least one each; nested over fidelities for one seed.

    Copies of one content stay together: if they were drawn one by one, a small share of a source that holds the
    same few examples over and over would look as diverse as a share of any other.

    Returns:
        positions, sorted, int64.
    """
    sources, contents = strata(pool), pool.contents
    place = np.random.default_rng(seed).permutation(int(contents.max()) + 1)[contents]
    kept = []
    for members in np.split(np.argsort(sources, kind="stable"), np.cumsum(np.bincount(sources))[:-1]):
        # A sort is a hundred times faster here than np.unique, which hashes.
        ordered = np.sort(place[members])
        distinct_places = ordered[np.diff(ordered, prepend=-1) > 0]
        last = distinct_places[max(1, round(fidelity * len(distinct_places))) - 1]
        kept.append(members[place[members] <= last])
    return np.sort(np.concatenate(kept))


def uniform(
    task: Task, budget: Budget, *, method: str, seed: int, ledger: Ledger, notes: dict[str, object]
) -> Selection:
    """The full pool: what a selector returns when nothing better was found, or nothing could be tried."""
    return Selection.of(
        task.pool,
        selected=np.ones(len(task.pool), dtype=bool),
        method=method,
        seed=seed,
        budget=budget,
        ledger=ledger,
        notes=notes,
    )


def distinct(rows: Sequence[np.ndarray]) -> np.ndarray:
    """The rows without repetitions, in order of first appearance, shape (M, S)."""
    seen: dict[bytes, np.ndarray] = {}
    for row in rows:
        seen.setdefault(np.ascontiguousarray(row).tobytes(), row)
    return np.array(list(seen.values()))
