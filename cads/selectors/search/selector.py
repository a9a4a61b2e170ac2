"""A search for the sources to train on. A policy over masks (or mixtures) of sources, learned from trials.

The policy moves along the gradient of h, a regression of the true bilevel objective on the trials so far that begins
with the penalty of CADS (arXiv 2510.16806). What h leaves of the latest trials corrects it. This is no unbiased policy
gradient: the trials are chosen to find good draws, and h is fitted to them (`cads.selectors.search.policy_gradient`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from torch import nn

from cads.errors import ConfigError, NotAffordableError
from cads.estimators.control_variate import ControlVariate
from cads.estimators.loss_curves import extrapolate
from cads.estimators.reachable_loss import ReachableLossModel, mean_over_sources
from cads.policies.base import Policy
from cads.search.base import NO_SEARCH_AFFORDABLE, Search, guard_message
from cads.search.choice import Choice
from cads.search.constants import constants_of
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop
from cads.search.rungs import affordable_rungs, run_rung, update_flops
from cads.search.source_choice import source_choice, source_marginals
from cads.search.space import MixtureSpace, SearchSpace, SubsetSpace
from cads.search.stages import FitTarget, ScorePool, Stages, Trials, UpdatePolicy
from cads.seeding import derive
from cads.selectors.search.policy_gradient import RegressionGradient, ascend_policy
from cads.selectors.search.proposals import initial_design, promote, sample_candidates
from cads.selectors.search.target_risk import (
    excess_target_loss,
    mean_losses,
    min_theta_flops,
    probing_flops,
    theta_flops,
)
from cads.selectors.search.trials import TrialHistory
from cads.task import Task


@dataclass
class PolicySearch(Search):
    """A search by trials before the training: a policy over sources, learned from trials on rungs of growing fidelity.

    Each rung trains on a few subsets or mixtures, and on the full pool, with a share of each source. It measures the
    outer objective relative to the full pool, refits a regression on penalty and sources, and moves the policy along
    the gradient of that. The best draw of the last rung is returned, if it beats the full pool.
    """

    policy: Literal["bernoulli", "mixture"] = "bernoulli"
    """Subsets of sources, or mixture ratios."""
    reach: Literal["fitted", "extrapolated"] = "fitted"
    """The training loss within reach: fitted over masks to what the trials reached, or to that extrapolated to the
    budget."""
    alpha: float | None = None
    """Weight of the penalty in the regression: of the target model's loss, and of the training loss within reach.
    It is 0 where the budget buys no target model. null: the two weights are fitted to the trials."""
    policy_steps: int = 60
    """Steps of the policy after each rung; 0: it stays where it starts."""

    method: ClassVar[str] = "search"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in (("policy", ("bernoulli", "mixture")), ("reach", ("fitted", "extrapolated"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} = {getattr(self, name)!r}: choose from {list(choices)}")
        if self.alpha is not None and not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ConfigError(f"alpha = {self.alpha}: it must be at least 0 and finite, or null to be fitted")
        if not (isinstance(self.policy_steps, int) and self.policy_steps >= 0):
            raise ConfigError(f"policy_steps = {self.policy_steps}: it must be a whole number, at least 0")

    def stages(self, costs: InnerLoopCosts, train_flops: float) -> Stages:
        """The target model and R, then trials and an update of the policy on each rung; see `Search`."""
        space = self._space(costs.task)
        theta, positions = theta_flops(costs, space, train_flops, self.policy_steps)
        probe: ScorePool | None = None
        reserved = 0.0
        if theta:
            probe = ScorePool(sum(map(len, positions)), "R", probing_flops(costs, positions), positions)
            yield FitTarget(theta)
            yield probe
        if probe is not None and constants_of(costs.task).subtracts_reference:
            # The model of the first trial is probed too. The rungs share what that leaves.
            reserved = probing_flops(costs, positions)
        else:
            probe = None
        rungs = affordable_rungs(costs, space, train_flops, self.policy_steps, reserved)
        if not rungs:
            raise NotAffordableError(NO_SEARCH_AFFORDABLE)
        for rung in rungs:
            n_trials = rung.n_trials if space.count is None else min(rung.n_trials, space.count)
            yield Trials(replace(rung, n_trials=n_trials), probe=probe)
            yield UpdatePolicy(update_flops(space, costs.n_trials, self.policy_steps))
            probe = None

    def min_flops(self, costs: InnerLoopCosts) -> float:
        """Fewest trials, an update of the policy, and the target model if a reference is subtracted; see `Search`."""
        space, constants = self._space(costs.task), constants_of(costs.task)
        theta = min_theta_flops(costs, space) if constants.subtracts_reference else 0.0
        trials = constants.min_trials * (constants.min_steps * costs.step_flops + costs.measuring_flops)
        return trials + theta + update_flops(space, 2 * constants.min_trials, self.policy_steps)

    def _space(self, task: Task) -> SearchSpace:
        return SubsetSpace(task.pool) if self.policy == "bernoulli" else MixtureSpace(task.pool)

    def run_search(self, inner: InnerLoop, train_flops: float, seed: int) -> Choice:
        """Carry out the stages: draws, trials, regression and policy, rung by rung; see `Search`."""
        space = self._space(inner.task)
        policy, history = space.policy(), TrialHistory.empty(len(space.sizes))
        theta: nn.Module | None = None
        target_losses = np.zeros(len(space.sizes))
        control: ControlVariate | None = None
        rung_index = 0
        for stage in self.stages(inner, train_flops):
            match stage:
                case FitTarget(flops, name):
                    theta = inner.fit_target(flops, seed=derive(seed, "theta"), stage=name)
                case ScorePool(positions=positions) if theta is not None:
                    target_losses = mean_losses(inner, positions, theta)
                    theta = None
                case Trials(rung, probe=probe):
                    reference_run = None
                    if probe is not None:
                        reference_run = run_rung(inner, space, space.full[None], rung, seed, rung_index)
                        target_losses = excess_target_loss(
                            inner, target_losses, probe.positions, reference_run.models.pop()
                        )
                    sampled = sample_candidates(space, policy, derive(seed, "draws", rung_index))
                    if control is None:
                        single = not constants_of(inner.task).subtracts_reference
                        draws = initial_design(space, sampled, target_losses, rung.n_trials, single=single)
                    else:
                        draws = promote(space, sampled, control, history, rung.n_trials)
                    runs = run_rung(inner, space, draws, rung, seed, rung_index, reference_run)
                    train_loss = runs.final_train_loss
                    if self.reach == "extrapolated":
                        train_loss = extrapolate(runs.flops, runs.losses, train_flops)
                    history = history.append(draws, runs, train_loss, rung.fidelity)
                    control = self._control(space, history, target_losses, rung)
                case UpdatePolicy(flops) if control is not None:
                    delta_objective = runs.objective - runs.objective[0]
                    gradient = RegressionGradient(space, policy, control, draws, delta_objective, rung.fidelity, seed)
                    policy = ascend_policy(policy, gradient, self.policy_steps)
                    inner.learn(flops)
                    self._watch(inner, space, policy, control, history, rung_index)
                    rung_index += 1
        return self._conclude(space, policy, history)

    def _control(
        self, space: SearchSpace, history: TrialHistory, target_losses: np.ndarray, rung: Rung
    ) -> ControlVariate:
        latest = history.fidelity == rung.fidelity
        reach = ReachableLossModel(space.weights(history.draws[latest]), history.final_train_loss[latest], space.sizes)
        return ControlVariate(
            history.draws,
            history.delta_objective,
            history.fidelity,
            history.fidelity,
            features=space.features,
            target_loss=lambda draws: mean_over_sources(space.weights(draws), space.sizes, target_losses),
            reachable_loss=lambda draws: reach(space.weights(draws)),
            alpha=self.alpha if self.alpha is None or target_losses.any() else 0.0,
        )

    def _watch(
        self,
        inner: InnerLoop,
        space: SearchSpace,
        policy: Policy,
        control: ControlVariate,
        history: TrialHistory,
        rung_index: int,
    ) -> None:
        monitor = inner.monitor
        marginals = source_marginals(policy)
        weights = space.weights(marginals[None])
        target_loss = float(control.target_loss(marginals[None])[0])
        reachable_loss = float(control.reachable_loss(marginals[None])[0])
        monitor.scalar("outer/best_gain", float(np.nanmin(history.delta_objective)), rung_index)
        monitor.scalar("outer/objective", float(control(marginals[None])[0]), rung_index)
        monitor.scalar("outer/target_model_loss", target_loss, rung_index)
        monitor.scalar("outer/loss_within_reach", reachable_loss, rung_index)
        monitor.scalar("outer/gap", target_loss - reachable_loss, rung_index)
        monitor.scalar("outer/entropy", policy.entropy(), rung_index)
        monitor.scalar("control/weight_of_target_model_loss", control.c1, rung_index)
        monitor.scalar("control/weight_of_loss_within_reach", control.c2, rung_index)
        monitor.scalar("control/leave_one_out_error", control.loo_error, rung_index)
        monitor.probabilities(space.pool.source_names, marginals, rung_index)
        monitor.histogram("outer/probabilities", marginals[space.pool.sources], rung_index)
        monitor.panels(space.pool, weights[0][space.pool.sources], rung_index, inner.task.describe)

    def _conclude(self, space: SearchSpace, policy: Policy, history: TrialHistory) -> Choice:
        """The best draw of the last rung, as measured: the regression errs by more at full fidelity."""
        draws, delta_objective = history.latest
        best = 1 + int(np.argmin(delta_objective[1:])) if len(delta_objective) > 1 else 0
        if self.guard and not history.beats_full_pool(draws[best]):
            best = 0
        notes: dict[str, object] = {
            "guard": guard_message(guard=self.guard, chosen=best > 0),
            "gain": -float(delta_objective[best]),
            "runs": len(history.delta_objective),
        }
        return source_choice(space, draws[best], policy, notes)
