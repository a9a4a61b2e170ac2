"""The trials of a search over sources so far."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cads.estimators.control_variate import ControlVariate
from cads.search.inner_runs import InnerRuns

SIGNIFICANCE_Z = 2.0
"""Standard errors by which a choice must beat the full pool. Trials on similar data differ by less than a target of a
few hundred examples can resolve."""


@dataclass
class TrialHistory:
    """All trials so far.

    Attributes:
        draws: shape (n, S).
        delta_objective: the objective less that of the full pool at the same fidelity, shape (n,).
        stderr: standard error of `delta_objective` over the target, shape (n,).
        fidelity: shape (n,).
        final_train_loss: training loss over the last steps, nats, shape (n,).
    """

    draws: np.ndarray
    delta_objective: np.ndarray
    stderr: np.ndarray
    fidelity: np.ndarray
    final_train_loss: np.ndarray

    @classmethod
    def empty(cls, n_sources: int) -> TrialHistory:
        """A history of no trials."""
        return cls(np.empty((0, n_sources)), *(np.empty(0) for _ in range(4)))

    @property
    def latest(self) -> tuple[np.ndarray, np.ndarray]:
        """`draws` (K, S) and `delta_objective` (K,) of the latest rung, the full pool first; no diverged trials."""
        finite = (self.fidelity == self.fidelity[-1]) & np.isfinite(self.delta_objective)
        return self.draws[finite], self.delta_objective[finite]

    def beats_full_pool(self, draw: np.ndarray) -> bool:
        """Whether a draw of the latest rung is better than the full pool in that rung, and on average over its rungs.

        The average improvement must exceed `SIGNIFICANCE_Z` standard errors over the examples of the target.
        """
        rows = (self.draws == draw).all(axis=1) & np.isfinite(self.delta_objective)
        latest, mean, stderr = self.delta_objective[rows][-1], self.delta_objective[rows].mean(), self.stderr[rows][-1]
        return bool(latest < 0 and mean < -SIGNIFICANCE_Z * stderr)

    def value(self, draws: np.ndarray, control: ControlVariate) -> np.ndarray:
        """Predicted objective of each draw at full fidelity, shape (M,): h plus half the residual of its last trial."""
        values = control(draws) - control(self.draws[:1])
        residuals: dict[bytes, float] = {}
        for row, delta, fidelity in zip(self.draws, self.delta_objective, self.fidelity, strict=True):
            if np.isfinite(delta):
                predicted = control(np.stack([row, self.draws[0]]), fidelity)
                residuals[row.tobytes()] = delta - float(predicted[0] - predicted[1])
        for i, row in enumerate(draws):
            values[i] += residuals.get(row.tobytes(), 0.0) / 2
        return values

    def append(self, draws: np.ndarray, runs: InnerRuns, train_loss: np.ndarray, fidelity: float) -> TrialHistory:
        """The history with another rung, whose first trial is on the full pool."""
        return TrialHistory(
            np.concatenate([self.draws, draws]),
            np.concatenate([self.delta_objective, runs.objective - runs.objective[0]]),
            np.concatenate([self.stderr, runs.stderr]),
            np.concatenate([self.fidelity, np.full(len(draws), fidelity)]),
            np.concatenate([self.final_train_loss, train_loss]),
        )
