"""CADS-E: which examples to train on. One probability for each, moved by what two models disagree about.

The penalty form of CADS (arXiv 2510.16806) gives example i the signal `c1 l_i(theta) - c2 l_i(u)`: theta is
fitted to the target, u to draws from the policy, so `R - l*` needs no sampling (Rao-Blackwell). How much l*
counts, and how far to move, follow from the budget: both are chosen by short runs of the true objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from scipy.special import expit

from cads.budget import Budget, Ledger
from cads.draws import Epochs
from cads.inner import Inner
from cads.monitor import Monitor
from cads.optimizer import Rung, divide, strata, subsample, uniform
from cads.seeds import derive
from cads.selection import Selection
from cads.task import Pool, Task

ALLOWANCE = 2.75
"""Selection FLOPs in units of the training budget, if the budget need not cover selection."""
THETA_SHARE, THETA_PASSES = 0.2, 20
"""theta is fitted to the target for this share of C, but for no more passes over it than this."""
REFERENCE_SHARE = 0.25
"""u is trained on the pool for this share of C."""
MOST_FOR_SCORES = 0.6
"""Share of the allowance that theta, u and their passes over the pool may take; the rest compares on the target."""
STEPS = (
    (0.55, 1.0), (0.7, 0.5), (0.55, 0.0), (0.85, 1.0), (0.4, 1.0), (0.85, 0.0), (0.7, 1.0), (0.4, 0.5),
    (0.25, 1.0), (0.7, 0.0), (0.85, 0.5), (0.55, 0.5), (0.4, 0.0), (0.25, 0.0),
)  # fmt: skip
"""Steps that are tried, widest spread first: the expected share of the pool that is kept, which is the length of
the step, and the weight c2/c1 of l*, which must come from the data (at small budgets l* carries no signal)."""
SHARPNESS = 3.0
"""Slope of the probabilities in the standardised signal."""


@dataclass
class Candidate:
    """A policy over examples: probabilities, shape (N,), and how it was made."""

    probability: np.ndarray
    reach_weight: float
    kept: float

    @property
    def selected(self) -> np.ndarray:
        """The most probable mask, bool, shape (N,)."""
        return self.probability > 0.5


@dataclass
class CadsExamples:
    """CADS-E: selection probabilities for single examples; sources are not needed.

    theta is fitted to the target and u to the pool; each candidate policy is one step along the penalty's
    gradient from the uniform policy, of its own length and weight on l*. A ladder of short runs finds the best
    one on the target, the full pool among them throughout.
    """

    allowance: float | None = None
    """Selection FLOPs at most, in units of the training FLOPs; null: 2.75, or 1/3 if the budget counts selection."""
    outer: str | None = None
    """The metric to minimise on the target; null for the task's own."""
    guard: bool = True
    """Return the full pool unless the choice beat it on the target."""

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Choose examples; see `Selector`."""
        monitor = monitor or Monitor()
        division = divide(task, budget, self.allowance, ALLOWANCE)
        spent = Ledger(limit=division.selection)
        inner = Inner(task, spent, monitor, self.outer)
        try:
            return self._search(inner, budget, division.training, seed, ledger)
        finally:
            ledger.merge(spent)

    def _search(self, inner: Inner, budget: Budget, training: float, seed: int, ledger: Ledger) -> Selection:
        task, monitor = inner.task, inner.monitor
        signals = example_losses(inner, training, seed)
        rungs = inner.ladder(training)
        if signals is None or not rungs:
            notes: dict[str, object] = {"guard": "the allowance buys no scores: the full pool is returned"}
            return uniform(task, budget, method="cads-e", seed=seed, ledger=ledger, notes=notes)
        everything = Candidate(np.ones(len(task.pool)), 0.0, 1.0)
        field = [everything, *candidates(*signals)]
        gains = np.zeros(len(field))
        for height, rung in enumerate(rungs):
            field = field[: rung.runs]
            gains = compare(inner, field, rung, seed, height)
            order = [0, *(1 + np.argsort(np.nan_to_num(gains[1:], nan=np.inf), kind="stable"))]
            field, gains = [field[i] for i in order], gains[order]
            best = field[1] if len(field) > 1 and gains[1] < 0 else everything
            watch_penalty(monitor, best, signals, height)
            watch_sources(monitor, task.pool, best.probability, height)
            monitor.scalar("outer/best_gain", float(np.nanmin(gains)), height)
            monitor.scalar("outer/entropy", entropy(best.probability), height)
            monitor.scalar("control/c2_over_c1", best.reach_weight, height)
            monitor.histogram("outer/probabilities", best.probability, height)
        if not self.guard and len(field) > 1:
            best = field[1]
        monitor.panels(task.pool, best.probability, len(rungs))
        verdict = "the full pool was not beaten" if best is everything else "better than the full pool on the target"
        return Selection.of(
            task.pool,
            selected=best.selected,
            score=best.probability,
            probability=best.probability,
            method="cads-e",
            seed=seed,
            budget=budget,
            ledger=ledger,
            config=asdict(self),
            notes={
                "guard": verdict,
                "gain": -float(gains.min()),
                "c2/c1": best.reach_weight,
                "kept": best.kept,
            },
        )


def example_losses(inner: Inner, training: float, seed: int) -> tuple[np.ndarray, np.ndarray | None] | None:
    """The losses of every example under theta and under u, nats, shape (N,) each.

    Returns:
        None if the allowance does not buy theta, (l(theta), None) if it does not buy u.
    """
    task, ledger = inner.task, inner.ledger
    target_pass = task.costs.per_usage(task.target, task.recipe.batch_size) * len(task.target)
    theta_flops = min(THETA_SHARE * training, THETA_PASSES * target_pass)
    scoring = task.costs.forward_pool(task.pool)
    most = MOST_FOR_SCORES * ledger.left
    if theta_flops < inner.step_flops or theta_flops + scoring > most:
        return None
    everything = np.arange(len(task.pool))
    theta = inner.fit_target(theta_flops, seed=derive(seed, "theta"), stage="theta")
    from_theta = inner.losses(theta, everything, stage="R")
    reference_flops = REFERENCE_SHARE * training
    if theta_flops + 2 * scoring + reference_flops > most or reference_flops < inner.step_flops:
        return from_theta, None
    order = derive(seed, "reference")
    u = inner.run([Epochs(everything, order)], reference_flops, seed=order, stage="u").models[0]
    return from_theta, inner.losses(u, everything, stage="l*")


def candidates(from_theta: np.ndarray, from_u: np.ndarray | None) -> list[Candidate]:
    """Policies one gradient step away from the uniform one, for each of `STEPS`.

    The Rao-Blackwellised gradient in s_i is proportional to `l_i(theta) - (c2/c1) l_i(u)` minus its mean. A
    step in the logits leaves `s_i = sigmoid(k (q - z_i))`, z the standardised signal; its length is given by
    the share of the pool with s_i > 1/2, so q is that quantile of z.
    """
    found = []
    for kept, weight in STEPS:
        if weight and from_u is None:
            continue
        signal = from_theta if from_u is None else from_theta - weight * from_u
        z = (signal - signal.mean()) / max(float(signal.std()), 1e-12)
        found.append(Candidate(expit(SHARPNESS * (np.quantile(z, kept) - z)), weight, kept))
    return found


def compare(inner: Inner, field: Sequence[Candidate], rung: Rung, seed: int, height: int) -> np.ndarray:
    """The objective of each candidate less that of the first (the full pool), after a short run; shape (K,)."""
    positions = subsample(inner.task.pool, rung.data, derive(seed, "subsample"))
    order = derive(seed, "rung", height)
    streams = []
    for candidate in field:
        chosen = positions[candidate.selected[positions]]
        streams.append(Epochs(chosen if len(chosen) else positions, order))
    runs = inner.run(streams, rung.flops, seed=order, stage=f"short runs, C/{1 / rung.fidelity:.3g}")
    return np.asarray(runs.objective - runs.objective[0])


def entropy(probability: np.ndarray) -> float:
    """Mean entropy of one example's selection, nats."""
    p = np.clip(probability, 1e-12, 1 - 1e-12)
    return float(-(p * np.log(p) + (1 - p) * np.log1p(-p)).mean())


def watch_penalty(
    monitor: Monitor, candidate: Candidate, signals: tuple[np.ndarray, np.ndarray | None], step: int
) -> None:
    """Record R, l* and the gap in expectation over the candidate's policy."""
    from_theta, from_u = signals
    monitor.scalar("outer/R", float(np.average(from_theta, weights=candidate.probability)), step)
    if from_u is not None:
        monitor.scalar("outer/l*", float(np.average(from_u, weights=candidate.probability)), step)
        gap = float(np.average(from_theta - from_u, weights=candidate.probability))
        monitor.scalar("outer/gap", gap, step)


def watch_sources(monitor: Monitor, pool: Pool, probability: np.ndarray, step: int) -> None:
    """Record the mean probability in each source, where there are sources."""
    if pool.sources is not None:
        means = np.bincount(strata(pool), weights=probability) / pool.source_sizes
        monitor.probabilities(pool.source_names, means, step)
