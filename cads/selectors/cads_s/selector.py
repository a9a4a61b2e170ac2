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
from cads.estimators.control_variate import Control
from cads.estimators.loss_curves import extrapolate
from cads.estimators.reachable_loss import FittedReach, mean_over_sources
from cads.policies.base import Policy
from cads.search.base import NOTHING, verdict
from cads.search.fidelity import LEAST_RUNS, MIN_STEPS, Rung
from cads.search.inner_costs import Planned, Purse
from cads.search.inner_runs import Inner
from cads.search.rungs import affordable, run_rung, update_flops
from cads.search.single_run import OneRunSearch, by_source
from cads.search.source_selection import source_marginals, source_selection
from cads.search.space import Masks, Mixtures, Space
from cads.seeding import derive
from cads.selection import Selection
from cads.selectors.cads_s.policy_gradient import improve
from cads.selectors.cads_s.proposals import first_draws, next_draws, propose
from cads.selectors.cads_s.target_risk import least_theta, looks, probing_flops, risk_beside, theta_flops, theta_risks
from cads.selectors.cads_s.trials import Trials
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

    def spend(self, purse: Planned, training: float) -> bool:
        """What `search` would do; see `Search`."""
        space = self._space(purse.task)
        theta, where = theta_flops(purse, space, training, self.policy_steps)
        if theta:
            purse.fit_target(theta, stage="theta")
            for _ in range(looks(purse)):
                purse.losses(sum(map(len, where)), stage="R", flops=probing_flops(purse, where))
        done = 0
        for rung in affordable(purse, space, training, self.policy_steps):
            runs = rung.runs if space.count is None else min(rung.runs, space.count)
            purse.run(runs, rung.flops, stage=rung.stage)
            done += runs
            purse.learn(update_flops(space, done, self.policy_steps))
        return done > 0

    def least(self, purse: Purse) -> float:
        """Short runs, what is learned from them, and theta where it tells as much; see `Search`."""
        space = self._space(purse.task)
        theta = least_theta(purse, space) if purse.task.pretrained else 0.0
        runs = LEAST_RUNS * (MIN_STEPS * purse.step_flops + purse.measuring_flops)
        return runs + theta + update_flops(space, 2 * LEAST_RUNS, self.policy_steps)

    def _space(self, task: Task) -> Space:
        return Masks(task.pool) if self.policy == "bernoulli" else Mixtures(task.pool)

    def search(self, inner: Inner, budget: Budget, training: float, seed: int, ledger: Ledger) -> Selection:
        """theta, and rung by rung draws, runs, control variate and policy; see `Search`."""
        task, space = inner.task, self._space(inner.task)
        risk, where = theta_risks(inner, space, training, self.policy_steps, seed)
        # What is read of the first run comes out of what the rungs share.
        owed = probing_flops(inner, where) if where and task.pretrained else 0.0
        left = Planned(task, inner.ledger.left - owed, held_out=self.held_out)
        rungs = affordable(left, space, training, self.policy_steps)
        if not rungs:
            return self.full_pool(task, budget, seed, ledger, NOTHING)
        policy = space.policy()
        n = len(space.sizes)
        trials = Trials(np.empty((0, n)), *(np.empty(0) for _ in range(4)))
        control: Control | None = None
        for height, rung in enumerate(rungs):
            count = rung.runs if space.count is None else min(rung.runs, space.count)
            proposed = propose(space, policy, derive(seed, "draws", height))
            begun = None
            if owed and control is None:
                begun = run_rung(inner, space, space.full[None], rung, seed, height)
                risk = risk_beside(inner, risk, where, begun.models[0])
            if control is None:
                draws = first_draws(space, proposed, risk, count, alone=not task.pretrained)
            else:
                draws = next_draws(space, proposed, control, trials, count)
            runs = run_rung(inner, space, draws, rung, seed, height, begun)
            reached = runs.reached
            if self.reach == "extrapolated":
                reached = extrapolate(runs.flops, runs.losses, training)
            trials = trials.extended(draws, runs, reached, rung.fidelity)
            control = self._control(space, trials, risk, rung)
            gains = runs.objective - runs.objective[0]
            policy = improve(space, policy, control, draws, gains, rung.fidelity, self.policy_steps, seed)
            inner.learn(update_flops(space, len(trials.gains), self.policy_steps))
            self._watch(inner, space, policy, control, trials, height)
        return self._conclude(inner, space, policy, trials, budget, seed, ledger)

    def _control(self, space: Space, trials: Trials, risk: np.ndarray, rung: Rung) -> Control:
        latest = trials.fidelity == rung.fidelity
        reach = FittedReach(space.weights(trials.draws[latest]), trials.reached[latest], space.sizes)
        return Control(
            trials.draws,
            trials.gains,
            trials.fidelity,
            trials.fidelity,
            features=space.features,
            risk=lambda draws: mean_over_sources(space.weights(draws), space.sizes, risk),
            reach=lambda draws: reach(space.weights(draws)),
            alpha=self.alpha if self.alpha is None or risk.any() else 0.0,
        )

    def _watch(self, inner: Inner, space: Space, policy: Policy, control: Control, trials: Trials, height: int) -> None:
        monitor = inner.monitor
        marginals = source_marginals(policy)
        weights = space.weights(marginals[None])
        risk, reach = float(control.risk(marginals[None])[0]), float(control.reach(marginals[None])[0])
        monitor.scalar("outer/best_gain", float(np.nanmin(trials.gains)), height)
        monitor.scalar("outer/objective", float(control(marginals[None])[0]), height)
        monitor.scalar("outer/R", risk, height)
        monitor.scalar("outer/l*", reach, height)
        monitor.scalar("outer/gap", risk - reach, height)
        monitor.scalar("outer/entropy", policy.entropy(), height)
        monitor.scalar("control/c1", control.c1, height)
        monitor.scalar("control/c2", control.c2, height)
        monitor.scalar("control/leave_one_out_error", control.loo_error, height)
        monitor.probabilities(space.pool.source_names, marginals, height)
        monitor.histogram("outer/probabilities", marginals[space.pool.sources], height)
        monitor.panels(space.pool, weights[0][space.pool.sources], height, inner.task.describe)

    def _conclude(
        self,
        inner: Inner,
        space: Space,
        policy: Policy,
        trials: Trials,
        budget: Budget,
        seed: int,
        ledger: Ledger,
    ) -> Selection:
        """The best of the last rung, as measured: the regression, which sees further, errs by more at full fidelity."""
        draws, gains = trials.latest
        best = 1 + int(np.argmin(gains[1:])) if len(gains) > 1 else 0
        if self.guard and not trials.beats_everything(draws[best]):
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
            notes={"guard": verdict(best > 0), "gain": -float(gains[best]), "runs": len(trials.gains)},
        )
