"""The stages of a search: one description, which `plan` charges for and `select` carries out.

A search is a generator of stages. It decides each stage by the rest of the ledger's limit, after the stage before has
been charged. `PlannedInnerLoop.charge` charges for a stage without running it; `Search.run_search` carries it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cads.search.fidelity import Rung


@dataclass(frozen=True)
class FitTarget:
    """Train the target model, theta, on the target for `flops`."""

    flops: float
    name: str = "theta"


@dataclass(frozen=True)
class ScorePool:
    """One forward pass of a model over examples of the pool.

    Attributes:
        count: how many examples.
        name: stage of the ledger.
        flops: its cost; None for that of as many mean examples.
        positions: of the examples, by source; empty if the whole pool is scored, or a sample of it.
    """

    count: int
    name: str
    flops: float | None = None
    positions: Sequence[np.ndarray] = ()


@dataclass(frozen=True)
class Trials:
    """Train models on parts of the pool, and measure them on the target.

    Attributes:
        rung: the number of trials, their length, and their share of the pool.
        name: stage of the ledger; None for that of the rung.
        probe: examples that the model of the first trial, on the full pool, scores before the others are chosen.
    """

    rung: Rung
    name: str | None = None
    probe: ScorePool | None = None

    @property
    def stage(self) -> str:
        """The stage of the ledger."""
        return self.rung.stage if self.name is None else self.name


@dataclass(frozen=True)
class Steps:
    """Training steps on the pool that are not a trial, such as unrolled ones."""

    name: str
    flops: float
    n_steps: int


@dataclass(frozen=True)
class UpdatePolicy:
    """Fit the regression on the trials, or compute probabilities, for `flops`."""

    flops: float
    name: str = "policy"


Stage = FitTarget | ScorePool | Trials | Steps | UpdatePolicy
Stages = Iterator[Stage]
