"""The trials of a search over sources so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cads.estimators.control_variate import ControlVariate
from cads.search.inner_runs import InnerRuns

SIGNIFICANCE_Z = 2.0
"""Standard errors by which a choice must beat the full pool: short runs on similar data differ by less than a target
of a few hundred examples can tell."""


@dataclass
class TrialHistory:
    """All short runs so far: draws (n, S), objective relative to the full pool's at the same fidelity (n,) and the
    standard error of that over the target (n,), fidelity (n,), and training loss reached, nats (n,)."""

    draws: np.ndarray
    delta_objective: np.ndarray
    stderr: np.ndarray
    fidelity: np.ndarray
    final_train_loss: np.ndarray

    @classmethod
    def empty(cls, n_sources: int) -> TrialHistory:
        """Of no trial."""
        return cls(np.empty((0, n_sources)), *(np.empty(0) for _ in range(4)))

    @property
    def latest(self) -> tuple[np.ndarray, np.ndarray]:
        """Draws (K, S) and gains (K,) of the latest rung, the full pool's first, without those that diverged."""
        sound = (self.fidelity == self.fidelity[-1]) & np.isfinite(self.delta_objective)
        return self.draws[sound], self.delta_objective[sound]

    def beats_full_pool(self, draw: np.ndarray) -> bool:
        """Whether a draw of the latest rung is better than the full pool, there and on average over its rungs, by
        more than can be told from a sample of examples like the target."""
        its = (self.draws == draw).all(axis=1) & np.isfinite(self.delta_objective)
        gain, mean, error = self.delta_objective[its][-1], self.delta_objective[its].mean(), self.stderr[its][-1]
        return bool(gain < 0 and mean < -SIGNIFICANCE_Z * error)

    def value(self, draws: np.ndarray, control: ControlVariate) -> np.ndarray:
        """What each draw promises at full fidelity, shape (M,): h, and half of what h missed in its latest run."""
        values = control(draws) - control(self.draws[:1])
        missed: dict[bytes, float] = {}
        for row, gain, fidelity in zip(self.draws, self.delta_objective, self.fidelity, strict=True):
            if np.isfinite(gain):
                pair = control(np.stack([row, self.draws[0]]), fidelity)
                missed[row.tobytes()] = gain - float(pair[0] - pair[1])
        for i, row in enumerate(draws):
            values[i] += missed.get(row.tobytes(), 0.0) / 2
        return values

    def append(self, draws: np.ndarray, runs: InnerRuns, reached: np.ndarray, fidelity: float) -> TrialHistory:
        """With another rung, whose first run is the full pool."""
        return TrialHistory(
            np.concatenate([self.draws, draws]),
            np.concatenate([self.delta_objective, runs.objective - runs.objective[0]]),
            np.concatenate([self.stderr, runs.stderr]),
            np.concatenate([self.fidelity, np.full(len(draws), fidelity)]),
            np.concatenate([self.final_train_loss, reached]),
        )
