"""What a search does, stage by stage: one description, from which `plan` charges and `select` works.

A search is a generator of stages. It decides each one by what the ledger has left, and goes on when the stage before it
has been paid for: by `PlannedInnerLoop.charge`, which runs nothing, or by whoever carries it out.
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
        name: what the ledger calls it.
        flops: what it costs; None for the price of as many mean examples.
        positions: of the examples, by source; empty where all of the pool is scored, or a sample.
    """

    count: int
    name: str
    flops: float | None = None
    positions: Sequence[np.ndarray] = ()


@dataclass(frozen=True)
class Trials:
    """Train models on parts of the pool, and measure them on the target.

    Attributes:
        rung: how many, how long, and on how much of the pool.
        name: what the ledger calls it; None for the name of the rung.
        probe: what the model of the first trial, on the full pool, is read on before the others are chosen.
    """

    rung: Rung
    name: str | None = None
    probe: ScorePool | None = None

    @property
    def stage(self) -> str:
        """What the ledger calls it."""
        return self.rung.stage if self.name is None else self.name


def reference_trial(flops: float, train_flops: float, name: str = "u") -> Trials:
    """One model, the reference model u, trained on the whole pool for `flops`."""
    return Trials(Rung(flops / train_flops, flops, 1.0, 1), name)


@dataclass(frozen=True)
class Steps:
    """Training steps on the pool that are no trial of their own, such as unrolled ones."""

    name: str
    flops: float
    n_steps: int


@dataclass(frozen=True)
class UpdatePolicy:
    """Fit the control variate, or compute probabilities, for `flops`."""

    flops: float


Stage = FitTarget | ScorePool | Trials | Steps | UpdatePolicy
Stages = Iterator[Stage]
