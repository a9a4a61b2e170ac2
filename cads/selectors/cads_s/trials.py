"""The trials of a search over sources so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cads.estimators.control_variate import Control
from cads.search.inner_runs import Runs

BEYOND_DOUBT = 2.0
"""Standard errors by which a choice must beat the full pool: short runs on similar data differ by less than a target
of a few hundred examples can tell."""


@dataclass
class Trials:
    """All short runs so far: draws (n, S), objective relative to the full pool's at the same fidelity (n,) and the
    standard error of that over the target (n,), fidelity (n,), and training loss reached, nats (n,)."""

    draws: np.ndarray
    gains: np.ndarray
    errors: np.ndarray
    fidelity: np.ndarray
    reached: np.ndarray

    @property
    def latest(self) -> tuple[np.ndarray, np.ndarray]:
        """Draws (K, S) and gains (K,) of the latest rung, the full pool's first, without those that diverged."""
        sound = (self.fidelity == self.fidelity[-1]) & np.isfinite(self.gains)
        return self.draws[sound], self.gains[sound]

    def beats_everything(self, draw: np.ndarray) -> bool:
        """Whether a draw of the latest rung is better than the full pool, there and on average over its rungs, by
        more than can be told from a sample of examples like the target."""
        its = (self.draws == draw).all(axis=1) & np.isfinite(self.gains)
        gain, mean, error = self.gains[its][-1], self.gains[its].mean(), self.errors[its][-1]
        return bool(gain < 0 and mean < -BEYOND_DOUBT * error)

    def value(self, draws: np.ndarray, control: Control) -> np.ndarray:
        """What each draw promises at full fidelity, shape (M,): h, and half of what h missed in its latest run."""
        values = control(draws) - control(self.draws[:1])
        missed: dict[bytes, float] = {}
        for row, gain, fidelity in zip(self.draws, self.gains, self.fidelity, strict=True):
            if np.isfinite(gain):
                pair = control(np.stack([row, self.draws[0]]), fidelity)
                missed[row.tobytes()] = gain - float(pair[0] - pair[1])
        for i, row in enumerate(draws):
            values[i] += missed.get(row.tobytes(), 0.0) / 2
        return values

    def extended(self, draws: np.ndarray, runs: Runs, reached: np.ndarray, fidelity: float) -> Trials:
        """With another rung, whose first run is the full pool."""
        return Trials(
            np.concatenate([self.draws, draws]),
            np.concatenate([self.gains, runs.objective - runs.objective[0]]),
            np.concatenate([self.errors, runs.errors]),
            np.concatenate([self.fidelity, np.full(len(draws), fidelity)]),
            np.concatenate([self.reached, reached]),
        )
