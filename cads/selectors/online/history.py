"""The history of a run: what the outer loop does at every logging step, for TensorBoard, terminal and Selection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import entr

from cads.data.pool import Pool
from cads.monitor import CURVE_POINTS, Describe, Monitor

SCALARS = ("target_share", "n_effective", "training_loss", "reachable_loss")
BY_SOURCE = ("source_shares", "signal", "stderr", "wrong")
IN_USE = 0.5
"""A source is in use if it is drawn at least half as often as if all examples were."""
STORED = 20
"""Most points that a Selection keeps."""
NAMED = 3
"""Sources that the terminal names."""


@dataclass(frozen=True)
class HistoryPoint:
    """The state of the outer loop at one step.

    Attributes:
        source_shares: in what is drawn from the pool, shape (S,), sum 1.
        signal, stderr: mean standardised loss of each source, and its standard error, shape (S,).
        wrong: share of wrong labels of each source, shape (S,); 0 where it is not learned.
        target_share: of the target in a batch.
        n_effective: what the pool is worth in examples.
        training_loss: L_tr, mean loss of the pool examples of the step, nats.
        reachable_loss: l*, what the groups of these examples have on average, nats.
    """

    source_shares: np.ndarray
    signal: np.ndarray
    stderr: np.ndarray
    wrong: np.ndarray
    target_share: float
    n_effective: float
    training_loss: float
    reachable_loss: float


class PolicyHistory:
    """Records a point at about `CURVE_POINTS` evenly spaced steps, and shows it.

    Args:
        monitor: shows the points. names: of the sources; empty without sources.
        sizes: number of examples of each source, shape (S,).
        group_shares: share of each group (class) in what is drawn from the pool, shape (G,).
        n_steps: expected number of steps. start: number of the first.
    """

    def __init__(
        self,
        monitor: Monitor,
        names: Sequence[str],
        sizes: np.ndarray,
        group_shares: np.ndarray,
        n_steps: int,
        start: int,
    ) -> None:
        self._monitor, self._names, self._sizes = monitor, tuple(names), sizes
        self._group_shares = group_shares
        self._every = max(1, n_steps // CURVE_POINTS)
        self._step = self._start = start
        self._rows: list[np.ndarray] = []
        self._latest: Callable[[], HistoryPoint] | None = None

    @property
    def points(self) -> list[tuple[int, HistoryPoint]]:
        """The points so far, with the number of the step of each."""
        return [self._read(row) for row in self._rows]

    def step(self, point: Callable[[], HistoryPoint]) -> None:
        """A step is done; `point` is called if it is recorded."""
        self._step += 1
        self._latest = point
        if (self._step - self._start) % self._every and self._step != self._start + 1:
            return
        now = point()
        scalars = [getattr(now, name) for name in SCALARS]
        self._rows.append(np.concatenate([[self._step], scalars, *(getattr(now, name) for name in BY_SOURCE)]))
        self._show(self._step, now)

    def state(self) -> np.ndarray:
        """All points and the present step, float64, shape (points + 1, columns)."""
        columns = 1 + len(SCALARS) + len(BY_SOURCE) * len(self._sizes)
        return np.stack([*self._rows, np.full(columns, float(self._step))])

    def restore(self, state: np.ndarray) -> None:
        """Go on from `state`; its points are shown again."""
        self._rows, self._step = list(state[:-1].copy()), int(state[-1, 0])
        for step, point in self.points:
            self._show(step, point)

    def finish(self, pool: Pool, probability: np.ndarray, describe: Describe) -> None:
        """Show the probability of each example at the end (shape (N,)), and the most and least probable examples."""
        step = self._step
        if self._latest is not None and (not self._rows or self._rows[-1][0] != step):
            self._show(step, self._latest())
        self._monitor.histogram("outer/probabilities", probability, step)
        self._monitor.panels(pool, probability, step, describe)
        self._monitor.status("")

    def to_json(self) -> dict[str, Any]:
        """At most `STORED` points: steps, and the share of each source and of the target at each."""
        points = self.points[:: max(1, -(-len(self._rows) // STORED))]
        return {
            "step": [step for step, _ in points],
            "target_share": [round(point.target_share, 4) for _, point in points],
            "source_shares": [[round(x, 4) for x in point.source_shares.tolist()] for _, point in points],
        }

    def describe(self, point: HistoryPoint) -> str:
        """What is drawn, in one line: "12 sources, 3 in use: clean 61 %, ..."."""
        share = f"target {point.target_share:.0%} of each batch"
        if len(self._names) < 2:
            return f"target and pool: {share}"
        in_use = point.source_shares >= IN_USE * self._sizes / self._sizes.sum()
        order = np.argsort(-point.source_shares, kind="stable")[:NAMED]
        named = ", ".join(f"{self._names[s]} {point.source_shares[s]:.0%}" for s in order)
        return f"{len(self._names)} sources, {int(in_use.sum())} in use: {named}; {share}"

    def _read(self, row: np.ndarray) -> tuple[int, HistoryPoint]:
        n = 1 + len(SCALARS)
        values: dict[str, Any] = dict(zip(BY_SOURCE, np.split(row[n:], len(BY_SOURCE)), strict=True))
        values |= dict(zip(SCALARS, row[1:n].tolist(), strict=True))
        return int(row[0]), HistoryPoint(**values)

    def _show(self, step: int, point: HistoryPoint) -> None:
        monitor, shares = self._monitor, point.source_shares
        monitor.status(self.describe(point))
        monitor.scalar("outer/target_share", point.target_share, step)
        monitor.scalar("outer/effective_pool_size", point.n_effective, step)
        monitor.scalar("outer/target_model_loss", point.training_loss, step)
        monitor.scalar("outer/loss_within_reach", point.reachable_loss, step)
        monitor.scalar("outer/gap", point.training_loss - point.reachable_loss, step)
        monitor.scalar("outer/entropy", float(entr(shares).sum()), step)
        for group, share in enumerate(self._group_shares.tolist()):
            monitor.scalar(f"share_of_group/{group}", share, step)
        if self._names:
            monitor.probabilities(self._names, shares, step)
            for name, signal, stderr, wrong in zip(self._names, point.signal, point.stderr, point.wrong, strict=True):
                monitor.scalar(f"signal/{name}", float(signal), step)
                monitor.scalar(f"signal_stderr/{name}", float(stderr), step)
                monitor.scalar(f"wrong_labels/{name}", float(wrong), step)
