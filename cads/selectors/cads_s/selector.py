"""CADS-S: which sources to train on. A policy over masks (or mixtures) of sources, learned from short runs.

The outer gradient is the corrected estimator: the score-function estimator of the true bilevel objective,
with the penalty of CADS (arXiv 2510.16806), and a regression on the runs so far, as its control variate.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import numpy as np

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.errors import ConfigError
from cads.estimators.control_variate import ControlVariate
from cads.estimators.loss_curves import extrapolate
from cads.estimators.reachable_loss import ReachableLossModel, mean_over_sources
from cads.policies.base import Policy
from cads.search.base import NO_SEARCH_AFFORDABLE, guard_message
from cads.search.fidelity import MIN_STEPS, MIN_TRIALS, Rung
from cads.search.inner_costs import InnerLoopCosts, PlannedInnerLoop
from cads.search.inner_runs import InnerLoop
from cads.search.rungs import affordable, run_rung, update_flops
from cads.search.single_run import OneRunSearch, by_source
from cads.search.source_selection import source_marginals, source_selection
from cads.search.space import MixtureSpace, SearchSpace, SubsetSpace
from cads.seeding import derive
from cads.selection import Selection
from cads.selectors.cads_s.policy_gradient import ascend_policy
from cads.selectors.cads_s.proposals import initial_design, promote, sample_candidates
from cads.selectors.cads_s.target_risk import (
    excess_target_loss,
    least_theta,
    n_probed_models,
    probing_flops,
    theta_flops,
    theta_risks,
)
from cads.selectors.cads_s.trials import TrialHistory
from cads.task import Task


@dataclass
class CadsSources(OneRunSearch):
    """CADS-S, corrected estimator: a policy over sources, learned on a ladder of short runs.

    Each rung trains a few draws of the policy, and always the full pool, on a share of each source, measures the
    outer objective relative to the full pool, refits the control variate, and moves the policy along the corrected
    gradient. The best of the last rung is returned, if it beats the full pool.
    """

    policy: Literal["bernoulli", "mixture"] = "bernoulli"
    """Subsets of sources, or mixture ratios."""
    reach: Literal["fitted", "extrapolated"] = "fitted"
    """l*: fitted over masks to the losses the short runs reached, or to those extrapolated to the budget."""
    alpha: float | None = None
    """Weight of the penalty in the control variate, c1 = c2 = alpha, or 0 where the budget buys no R; null: c1 and c2
    are fitted to the short runs."""
    policy_steps: int = 60
    """Steps of the policy after each rung; 0: it stays where it starts."""

    method: ClassVar[str] = "cads-s"
    weigh = staticmethod(by_source)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("policy", ("bernoulli", "mixture")), ("reach", ("fitted", "extrapolated"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: choose from {list(known)}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ConfigError(f"alpha = {self.alpha}: it must be at least 0 and finite, or null to be fitted")
        if not (isinstance(self.policy_steps, int) and self.policy_steps >= 0):
            raise ConfigError(f"policy_steps = {self.policy_steps}: it must be a whole number, at least 0")

    def plan_search(self, costs: PlannedInnerLoop, train_flops: float) -> bool:
        """What `search` would do; see `Search`."""
        space = self._space(costs.task)
        theta, where = theta_flops(costs, space, train_flops, self.policy_steps)
        if theta:
            costs.fit_target(theta, stage="theta")
            for _ in range(n_probed_models(costs)):
                costs.losses(sum(map(len, where)), stage="R", flops=probing_flops(costs, where))
        done = 0
        for rung in affordable(costs, space, train_flops, self.policy_steps):
            runs = rung.n_trials if space.count is None else min(rung.n_trials, space.count)
            costs.run(runs, rung.flops, stage=rung.stage)
            done += runs
            costs.learn(update_flops(space, done, self.policy_steps))
        return done > 0

    def min_flops(self, costs: InnerLoopCosts) -> float:
        """Short runs, what is learned from them, and theta where it tells as much; see `Search`."""
        space = self._space(costs.task)
        theta = least_theta(costs, space) if costs.task.pretrained else 0.0
        runs = MIN_TRIALS * (MIN_STEPS * costs.step_flops + costs.measuring_flops)
        return runs + theta + update_flops(space, 2 * MIN_TRIALS, self.policy_steps)

    def _space(self, task: Task) -> SearchSpace:
        return SubsetSpace(task.pool) if self.policy == "bernoulli" else MixtureSpace(task.pool)

    def run_search(self, inner: InnerLoop, budget: Budget, train_flops: float, seed: int, ledger: Ledger) -> Selection:
        """theta, and rung by rung draws, runs, control variate and policy; see `Search`."""
        task, space = inner.task, self._space(inner.task)
        risk, where = theta_risks(inner, space, train_flops, self.policy_steps, seed)
        # What is read of the first run comes out of what the rungs share.
        owed = probing_flops(inner, where) if where and task.pretrained else 0.0
        left = PlannedInnerLoop(task, inner.ledger.left - owed, held_out=self.held_out)
        rungs = affordable(left, space, train_flops, self.policy_steps)
        if not rungs:
            return self.full_pool(task, budget, seed, ledger, NO_SEARCH_AFFORDABLE)
        policy = space.policy()
        n = len(space.sizes)
        trials = TrialHistory(np.empty((0, n)), *(np.empty(0) for _ in range(4)))
        control: ControlVariate | None = None
        for rung_index, rung in enumerate(rungs):
            count = rung.n_trials if space.count is None else min(rung.n_trials, space.count)
            proposed = sample_candidates(space, policy, derive(seed, "draws", rung_index))
            reference_run = None
            if owed and control is None:
                reference_run = run_rung(inner, space, space.full[None], rung, seed, rung_index)
                risk = excess_target_loss(inner, risk, where, reference_run.models[0])
            if control is None:
                draws = initial_design(space, proposed, risk, count, alone=not task.pretrained)
            else:
                draws = promote(space, proposed, control, trials, count)
            runs = run_rung(inner, space, draws, rung, seed, rung_index, reference_run)
            reached = runs.final_train_loss
            if self.reach == "extrapolated":
                reached = extrapolate(runs.flops, runs.losses, train_flops)
            trials = trials.append(draws, runs, reached, rung.fidelity)
            control = self._control(space, trials, risk, rung)
            delta_objective = runs.objective - runs.objective[0]
            policy = ascend_policy(
                space, policy, control, draws, delta_objective, rung.fidelity, self.policy_steps, seed
            )
            inner.learn(update_flops(space, len(trials.delta_objective), self.policy_steps))
            self._watch(inner, space, policy, control, trials, rung_index)
        return self._conclude(inner, space, policy, trials, budget, seed, ledger)

    def _control(self, space: SearchSpace, trials: TrialHistory, risk: np.ndarray, rung: Rung) -> ControlVariate:
        latest = trials.fidelity == rung.fidelity
        reach = ReachableLossModel(space.weights(trials.draws[latest]), trials.final_train_loss[latest], space.sizes)
        return ControlVariate(
            trials.draws,
            trials.delta_objective,
            trials.fidelity,
            trials.fidelity,
            features=space.features,
            risk=lambda draws: mean_over_sources(space.weights(draws), space.sizes, risk),
            reach=lambda draws: reach(space.weights(draws)),
            alpha=self.alpha if self.alpha is None or risk.any() else 0.0,
        )

    def _watch(
        self,
        inner: InnerLoop,
        space: SearchSpace,
        policy: Policy,
        control: ControlVariate,
        trials: TrialHistory,
        rung_index: int,
    ) -> None:
        monitor = inner.monitor
        marginals = source_marginals(policy)
        weights = space.weights(marginals[None])
        risk, reach = float(control.risk(marginals[None])[0]), float(control.reach(marginals[None])[0])
        monitor.scalar("outer/best_gain", float(np.nanmin(trials.delta_objective)), rung_index)
        monitor.scalar("outer/objective", float(control(marginals[None])[0]), rung_index)
        monitor.scalar("outer/R", risk, rung_index)
        monitor.scalar("outer/l*", reach, rung_index)
        monitor.scalar("outer/gap", risk - reach, rung_index)
        monitor.scalar("outer/entropy", policy.entropy(), rung_index)
        monitor.scalar("control/c1", control.c1, rung_index)
        monitor.scalar("control/c2", control.c2, rung_index)
        monitor.scalar("control/leave_one_out_error", control.loo_error, rung_index)
        monitor.probabilities(space.pool.source_names, marginals, rung_index)
        monitor.histogram("outer/probabilities", marginals[space.pool.sources], rung_index)
        monitor.panels(space.pool, weights[0][space.pool.sources], rung_index, inner.task.describe)

    def _conclude(
        self,
        inner: InnerLoop,
        space: SearchSpace,
        policy: Policy,
        trials: TrialHistory,
        budget: Budget,
        seed: int,
        ledger: Ledger,
    ) -> Selection:
        """The best of the last rung, as measured: the regression, which sees further, errs by more at full fidelity."""
        draws, delta_objective = trials.latest
        best = 1 + int(np.argmin(delta_objective[1:])) if len(delta_objective) > 1 else 0
        if self.guard and not trials.beats_full_pool(draws[best]):
            best = 0
        return source_selection(
            inner.task,
            space,
            draws[best],
            policy,
            budget=budget,
            method=self.method,
            seed=seed,
            ledger=ledger,
            config=asdict(self),
            notes={
                "guard": guard_message(best > 0),
                "gain": -float(delta_objective[best]),
                "runs": len(trials.delta_objective),
            },
        )
