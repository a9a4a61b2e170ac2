"""CADS-E: which examples to train on. Each example has a probability, moved by the difference of two models' losses.

The penalty form of CADS (arXiv 2510.16806) gives example i the signal `c1 l_i(theta) - c2 l_i(u)`. theta, the target
model, is trained on the target. u, the reference model, is trained on draws from the policy, so that `R - l*` needs no
sampling (Rao-Blackwell). The weight of l* and the length of the step follow from the budget: both are chosen by trials
of the true objective.

A theta that has seen the target often enough, and then the target with what the policy keeps, needs no u. For
pretrained models, few steps of both are enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from cads.accounting.operations import candidates_flops
from cads.data.pool import Pool
from cads.data.streams import ShuffledStream
from cads.data.subsample import subsample
from cads.data.token_batches import by_id, in_id_order
from cads.errors import NotAffordableError
from cads.monitor import Monitor
from cads.search.base import NO_SEARCH_AFFORDABLE, Search, check_reference, guard_message
from cads.search.choice import Choice
from cads.search.fidelity import Rung
from cads.search.guard import beats_full_pool
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop, InnerRuns
from cads.search.rungs import run_streams
from cads.search.stages import FitTarget, ScorePool, Stages, Trials, UpdatePolicy, reference_trial
from cads.seeding import derive
from cads.selectors.cads_e.candidates import Candidate, Signals, entropy, most_probable
from cads.selectors.cads_e.schedule import KEPT_FOR_THETA, TARGET_FRACTION, SignalModels, least_flops, signal_models


@dataclass
class CadsExamples(Search):
    """CADS-E: selection probabilities for single examples; sources are not needed.

    The target model is fitted to one half of the target, the reference model to the pool. Each candidate policy is one
    step along the penalty's gradient from the uniform policy, the same in each class. It has its own length, and its
    own weight on the losses of the reference model. Trials on rungs of growing fidelity find the best candidate on the
    other half of the target. Every rung holds a trial on the full pool. The best candidate must beat that by two paired
    standard errors, and by more where it is the best of several.

    With a larger allowance, the target model is trained for longer, at last on the target and on what it keeps itself.
    Then no reference model is needed, and a few long trials decide. For pretrained models, few steps of both models are
    enough. If their trials see the whole pool, the first trial trains the reference model.
    """

    method: ClassVar[str] = "cads-e"
    held_out: ClassVar[bool] = True
    whole_sources: ClassVar[bool] = False
    default_allowance: ClassVar[float] = 3.0

    def stages(self, costs: InnerLoopCosts, train_flops: float) -> Stages:
        """The target model, the reference model, and the trials that compare candidates; see `Search`."""
        n = len(costs.task.pool)
        models = signal_models(costs, train_flops)
        if not models.theta:
            raise NotAffordableError(NO_SEARCH_AFFORDABLE)
        yield FitTarget(models.theta)
        yield ScorePool(n, "R")
        if models.theta_refit_flops:
            yield UpdatePolicy(candidates_flops(n, 1))
            yield FitTarget(models.theta_refit_flops, "theta, with the pool")
            yield ScorePool(n, "R")
        if models.u:
            yield reference_trial(models.u, train_flops)
            yield ScorePool(n, "l*")
        rungs = models.comparisons(costs, train_flops)
        if not rungs:
            raise NotAffordableError(NO_SEARCH_AFFORDABLE)
        probe = ScorePool(n, "l*") if models.reference_is_first_run else None
        for rung in rungs:
            n_trials = min(rung.n_trials, 1 + len(models.steps))
            # All candidates but the full pool, and the best one once more.
            yield UpdatePolicy(candidates_flops(n, n_trials))
            yield Trials(replace(rung, n_trials=n_trials), probe=probe)
            probe = None

    def min_flops(self, costs: InnerLoopCosts) -> float:
        """Two models, their losses, and two trials; see `Search`."""
        return least_flops(costs) if costs.task.pretrained else 0.0

    def run_search(self, inner: InnerLoop, train_flops: float, seed: int) -> Choice:
        """Train both models, make candidates, and compare them rung by rung; see `Search`."""
        task, monitor = inner.task, inner.monitor
        models = signal_models(inner, train_flops)
        signals = learn_from(inner, models, seed)
        rungs = models.comparisons(inner, train_flops)
        if not rungs:
            raise NotAffordableError(NO_SEARCH_AFFORDABLE)
        reference_run: InnerRuns | None = None
        if models.reference_is_first_run:
            reference_run = run_candidates(inner, [signals.everything], rungs[0], seed, 0)
            signals = replace(
                signals, from_u=inner.losses(reference_run.models.pop(), np.arange(len(task.pool)), stage="l*")
            )
        full_pool = signals.everything
        candidates, n_compared = [full_pool, *signals.candidates], 0
        for rung_index, rung in enumerate(rungs):
            candidates = candidates[: rung.n_trials]
            delta_objective, stderr = compare(
                inner, candidates, rung, seed, rung_index, reference_run if rung_index == 0 else None
            )
            order = [0, *(1 + np.argsort(np.nan_to_num(delta_objective[1:], nan=np.inf), kind="stable"))]
            candidates, delta_objective, stderr = [candidates[i] for i in order], delta_objective[order], stderr[order]
            # Later rungs try the best of the first one again: the number that it was chosen from stays.
            n_compared = n_compared or len(candidates) - 1
            is_better = len(candidates) > 1 and (
                beats_full_pool(delta_objective[1], stderr[1], n_compared)
                if self.guard
                else bool(np.isfinite(delta_objective[1]))
            )
            best, improvement = (candidates[1], -float(delta_objective[1])) if is_better else (full_pool, 0.0)
            # As planned: the probabilities of the best candidate were computed, whether or not it is kept.
            inner.learn(candidates[min(1, len(candidates) - 1)].flops)
            probability = best.probability()
            watch_penalty(monitor, signals, probability, rung_index)
            watch_sources(monitor, task.pool, probability, rung_index)
            monitor.scalar("outer/best_gain", float(np.nanmin(delta_objective)), rung_index)
            monitor.scalar("outer/entropy", entropy(probability), rung_index)
            monitor.scalar("control/ratio_of_weights", best.reach_weight, rung_index)
            monitor.histogram("outer/probabilities", probability, rung_index)
        monitor.panels(task.pool, probability, len(rungs), task.describe)
        return Choice(
            selected=most_probable(probability),
            score=probability,
            probability=probability,
            notes={
                "guard": guard_message(guard=self.guard, chosen=best is not full_pool),
                "gain": improvement,
                "c2/c1": best.reach_weight,
                "kept": best.kept,
            },
        )


def learn_from(inner: InnerLoop, models: SignalModels, seed: int) -> Signals:
    """The losses of every example under theta, the target model, and, if it is trained, under u."""
    task, positions = inner.task, np.arange(len(inner.task.pool))
    groups, steps, visited = task.groups(task.pool), models.steps, by_id(task.pool)
    theta = inner.fit_target(models.theta, seed=derive(seed, "theta"), stage="theta")
    signals = Signals.of(inner.losses(theta, positions, stage="R"), None, steps, groups)
    if models.theta_refit_flops:
        inner.learn(candidates_flops(len(positions), 1))
        kept_positions = visited[most_probable(Candidate(signals, 0.0, KEPT_FOR_THETA).probability())[visited]]
        order = derive(seed, "theta", "with the pool")
        theta = inner.fit_target(
            models.theta_refit_flops,
            seed=order,
            stage="theta, with the pool",
            model=theta,
            stream=ShuffledStream(kept_positions, order),
            target_fraction=TARGET_FRACTION,
        )
        return Signals.of(inner.losses(theta, positions, stage="R"), None, steps, groups)
    if not models.u:
        return signals
    order = derive(seed, "reference")
    runs = inner.run([ShuffledStream(visited, order)], models.u, seed=order, stage="u")
    check_reference(float(runs.objective[0]), "u")
    return replace(signals, from_u=inner.losses(runs.models[0], positions, stage="l*"))


def compare(
    inner: InnerLoop,
    candidates: Sequence[Candidate],
    rung: Rung,
    seed: int,
    rung_index: int,
    reference_run: InnerRuns | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The objective of each candidate less that of the first (the full pool), after a trial, and its standard error.

    Both have shape (K,).

    Args:
        reference_run: the trial on the full pool, if it has been run before.
    """
    runs = run_candidates(inner, candidates, rung, seed, rung_index, reference_run)
    inner.monitor.scalar("outer/objective", float(np.nanmin(runs.objective)), rung_index)
    return runs.objective - runs.objective[0], runs.stderr


def run_candidates(
    inner: InnerLoop,
    candidates: Sequence[Candidate],
    rung: Rung,
    seed: int,
    rung_index: int,
    reference_run: InnerRuns | None = None,
) -> InnerRuns:
    """Train on what each candidate keeps of the rung's share of the pool; see `cads.search.rungs.run_streams`."""
    pool = inner.task.pool
    positions = in_id_order(pool, subsample(pool, rung.data_fraction, derive(seed, "subsample")))
    order = derive(seed, "rung", rung_index)
    streams = []
    for candidate in candidates:
        inner.learn(candidate.flops)
        kept_positions = positions[most_probable(candidate.probability()[positions])]
        streams.append(ShuffledStream(kept_positions, order))
    return run_streams(inner, streams, rung, order, reference_run)


def watch_penalty(monitor: Monitor, signals: Signals, probability: np.ndarray, step: int) -> None:
    """Record R, l* and the gap in expectation over a policy (shape (N,))."""
    risk = float(np.average(signals.from_theta, weights=probability))
    monitor.scalar("outer/target_model_loss", risk, step)
    if signals.from_u is not None:
        reach = float(np.average(signals.from_u, weights=probability))
        monitor.scalar("outer/loss_within_reach", reach, step)
        monitor.scalar("outer/gap", risk - reach, step)


def watch_sources(monitor: Monitor, pool: Pool, probability: np.ndarray, step: int) -> None:
    """Record the mean probability (shape (N,)) in each source, if there are sources."""
    if pool.sources is not None:
        means = np.bincount(pool.sources, weights=probability) / pool.source_sizes
        monitor.probabilities(pool.source_names, means, step)
