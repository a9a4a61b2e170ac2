"""CADS-S as published: the plain penalty form (Wan, Zhang, Jin; NeurIPS 2025, arXiv 2510.16806).

    min_s min_theta  E_m [ L_val(theta) + alpha ( L_tr(theta; m) - l*_C(m) ) ]

theta, the target model, takes ordinary training steps on the target and on draws from the policy, in the proportion
1 : alpha. It trains once, with one warm-up, one optimizer and one decay, while the policy moves after each round along
`alpha E[ (R(m) - l*_C(m)) grad log p(m; s) ]`. R is the loss of theta on the mask m, and l*_C the training loss within
reach of the budget C. No objective of a trained model is measured, so that a misleading penalty goes unnoticed:
`cads` is the selector to use, or `search`. `docs/published.md` says what of this the abstract states.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal, get_args

import numpy as np

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import ROUNDING, Ledger, PlannedLedger
from cads.accounting.operations import source_policy_flops
from cads.data.streams import WeightedStream
from cads.data.token_batches import by_id
from cads.errors import ConfigError, NotAffordableError
from cads.estimators.design import distinct_rows
from cads.estimators.loss_curves import SKIPPED, extrapolate
from cads.estimators.reachable_loss import ReachableLossModel, mean_over_sources
from cads.estimators.score_function import penalty
from cads.monitor import Monitor
from cads.policies.base import Policy
from cads.policies.mixture import MixturePolicy
from cads.search.allowance import BudgetSplit, split_budget
from cads.search.base import ALLOWANCE, ONE_SOURCE, has_one_source
from cads.search.choice import Choice
from cads.search.constants import FROM_SCRATCH
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts, PlannedInnerLoop
from cads.search.inner_runs import InnerLoop
from cads.search.rungs import run_rung
from cads.search.source_choice import nonempty, source_choice, source_marginals
from cads.search.source_order import in_name_order
from cads.search.space import MixtureSpace, SearchSpace, SubsetSpace
from cads.search.stages import FitTarget, ScorePool, Stages, Trials, UpdatePolicy
from cads.seeding import derive
from cads.selection import Selection
from cads.selectors.search.target_risk import mean_losses, probe_positions, probing_flops
from cads.task import Task
from cads.training.result import TrainResult

log = logging.getLogger(__name__)

SHORT = 1 / 8
"""Share of C of the trials from which l* is fitted or extrapolated; where it is fitted, of each source too."""
LATEST_WARMUP = 0.5
"""Largest share of a curve that the extrapolation leaves out since the learning rate still rises there."""
THETA_SHARE = 0.5
"""theta is trained for this share of C in all rounds together."""
MIN_WEIGHT = 1e-9
"""Of an example in the draws of theta, so that some example always has a weight."""
POLICY_STEPS, POLICY_STEP = 20, 0.05
"""Steps of the policy in each round, and their length in the largest probability."""

Reach = Literal["fitted", "extrapolated", "exact"]
PolicyName = Literal["bernoulli", "mixture"]
SPACES: dict[str, type[SearchSpace]] = {"bernoulli": SubsetSpace, "mixture": MixtureSpace}
NOT_EXACT = "the allowance does not cover runs of the whole budget (raise allowance): the full pool is returned"
NO_TRIALS_AFFORDABLE = "the budget does not cover the trials of the penalty: the full pool is returned"


@dataclass(frozen=True)
class Lengths:
    """What is spent on the parts of a selection.

    Attributes:
        split: FLOPs for training and for selection.
        trial_share: of C, for each trial. theta_share: of C, for theta in all rounds together.
        positions: of the examples of each source on which R is measured.
    """

    split: BudgetSplit
    trial_share: float
    theta_share: float
    positions: list[np.ndarray]


@dataclass
class PenalizedSources:
    """CADS-S by the plain penalty: the loss within reach from trials, then the target model and the policy in turn."""

    alpha: float = 0.1
    """Weight of the penalty."""
    first_alpha: float | None = None
    """Its weight in the first round, from which it grows or falls to alpha by the same factor in each; null: alpha."""
    policy: PolicyName = "bernoulli"
    """Subsets of the sources ("bernoulli"), or their ratios, by truncated Gaussians ("mixture")."""
    reach: Reach = "extrapolated"
    """The training loss within reach: the curves of trials, whose learning rate is that of a run of the whole budget,
    continued to it ("extrapolated"); what trials on a part of data and budget reach ("fitted"); or what runs of the
    whole budget reach ("exact")."""
    masks: int = 8
    """Masks that are tried for the training loss within reach, which is then fitted over all masks."""
    rounds: int = 5
    """Turns of the target model and the policy."""
    draws: int = 16
    """Masks drawn for each step of the policy."""
    allowance: float | None = None
    """Selection FLOPs at most, in units of the training FLOPs; null: 2.75, or less if the budget counts selection, as
    in `search`. Where that does not cover trials of C/8 and theta of C/2, all are shortened alike."""

    method: ClassVar[str] = "cads-s-penalty"
    revision: ClassVar[int] = 2
    """Finished cells of the one without a ceiling are not its own."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"alpha = {self.alpha}: it must be positive and finite")
        if self.first_alpha is not None and not (math.isfinite(self.first_alpha) and self.first_alpha > 0):
            raise ConfigError(f"first_alpha = {self.first_alpha}: it must be positive and finite, or null")
        for name, minimum in (("masks", 1), ("rounds", 1), ("draws", 2)):
            if getattr(self, name) < minimum:
                raise ConfigError(f"{name} = {getattr(self, name)}: it must be at least {minimum}")
        if self.reach not in get_args(Reach):
            raise ConfigError(f"reach = {self.reach!r}: choose from {list(get_args(Reach))}")
        if self.policy not in get_args(PolicyName):
            raise ConfigError(f"policy = {self.policy!r}: choose from {list(get_args(PolicyName))}")

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Choose sources; see `cads.selector.Selector`."""
        monitor = monitor or Monitor()
        try:
            choice = self._search(in_name_order(task), self._lengths(task, budget), seed, ledger, monitor)
        except NotAffordableError as error:
            log.warning("%s: %s", self.method, error)
            choice = Choice.full_pool(task.pool, str(error))
        return choice.selection(
            task.pool, method=self.method, seed=seed, budget=budget, ledger=ledger, config=asdict(self)
        )

    def _search(self, task: Task, lengths: Lengths, seed: int, ledger: Ledger, monitor: Monitor) -> Choice:
        selection_ledger = Ledger(limit=lengths.split.selection_flops)
        inner, space = InnerLoop(task, selection_ledger, monitor), SPACES[self.policy](task.pool)
        try:
            policy = self._alternate(inner, space, lengths, seed)
        finally:
            ledger.merge(selection_ledger)
        marginals = source_marginals(policy)
        if isinstance(policy, MixturePolicy):
            return source_choice(space, marginals, policy, {})
        mask = marginals > 0.5
        mask[np.argmax(marginals)] = True
        return source_choice(space, mask.astype(np.float64), policy, {})

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """What `select` would charge; see `cads.selector.Selector`."""
        try:
            lengths = self._lengths(task, budget)
        except NotAffordableError as error:
            return PlannedLedger(note=str(error))
        costs = PlannedInnerLoop(in_name_order(task), lengths.split.selection_flops)
        for stage in self.stages(costs, lengths):
            costs.charge(stage)
        return costs.ledger

    def stages(self, costs: InnerLoopCosts, lengths: Lengths) -> Stages:
        """Trials for l*, then the target model, R and the policy in turn; see `cads.search.stages`."""
        space, share, train_flops = SPACES[self.policy](costs.task.pool), lengths.trial_share, lengths.split.train_flops
        data = share if self.reach == "fitted" else 1.0
        yield Trials(Rung(share, share * train_flops, data, self._n_trials(space)))
        positions = lengths.positions
        for _ in range(self.rounds):
            yield FitTarget(lengths.theta_share * train_flops / self.rounds)
            yield ScorePool(sum(map(len, positions)), "R", probing_flops(costs, positions), positions)
            yield UpdatePolicy(self._update_flops(space))

    def _lengths(self, task: Task, budget: Budget) -> Lengths:
        """What is spent on training and on each part of selection.

        R is measured on fewer examples, and then trials and theta are shortened, where the allowance does not cover
        more.

        Raises:
            NotAffordableError: if the pool has one source, the budget does not cover selection, or its trials would
                have too few steps.
            BudgetError: if the budget does not buy one step.
            ConfigError: if theta's batches would hold only examples of the target, or none of them; if the allowance
                is negative or not finite.
        """
        total = budget.flops(task)
        check_step(task, total)
        self._check_alpha(task.recipe.batch_size)
        costs, space = InnerLoopCosts(task, Ledger()), SPACES[self.policy](in_name_order(task).pool)
        if has_one_source(task.pool):
            raise NotAffordableError(ONE_SOURCE)
        share = self._n_trials(space) * self._share + THETA_SHARE
        # Extrapolating a curve takes two points of it.
        min_steps = 2 if self.reach == "extrapolated" else 1
        min_train_flops = max(min_steps / self._share, self.rounds / THETA_SHARE) * costs.step_flops
        probes = [probe_positions(space, count) for count in FROM_SCRATCH.probe_examples]
        fixed = [self._fixed_flops(costs, space, positions) for positions in probes]
        limit = split_budget(task, budget, self.allowance, ALLOWANCE, share * min_train_flops + fixed[-1])
        for positions, fixed_flops in zip(probes, fixed, strict=True):
            train_flops = (total - fixed_flops) / (1 + share) if budget.count_selection else total
            needed = share * train_flops + fixed_flops
            if needed * limit.train_flops <= limit.selection_flops * train_flops * ROUNDING:
                lengths = Lengths(BudgetSplit(train_flops, needed * ROUNDING), self._share, THETA_SHARE, positions)
                break
        else:
            lengths = self._shortened(limit, (limit.selection_flops - fixed[-1]) / share, probes[-1])
        if lengths.theta_share * lengths.split.train_flops < THETA_SHARE * min_train_flops:
            raise NotAffordableError(NO_TRIALS_AFFORDABLE)
        return lengths

    def _shortened(self, split: BudgetSplit, course_flops: float, positions: list[np.ndarray]) -> Lengths:
        """Trials and theta as for a final training of `course_flops`, which is shorter than that of `split`.

        Raises:
            NotAffordableError: if l* is exact, whose trials have one length.
        """
        if self.reach == "exact":
            raise NotAffordableError(NOT_EXACT)
        scale = course_flops / split.train_flops
        return Lengths(split, scale * self._share, scale * THETA_SHARE, positions)

    def _fixed_flops(self, costs: InnerLoopCosts, space: SearchSpace, positions: Sequence[np.ndarray]) -> float:
        """FLOPs that do not grow with the budget: measuring the trials, and R and the policy in each round."""
        round_flops = probing_flops(costs, positions) + self._update_flops(space)
        return self._n_trials(space) * costs.measuring_flops + self.rounds * round_flops

    def _check_alpha(self, batch_size: int) -> None:
        """Refuse batches of theta that hold only examples of the target, or none of them.

        Raises:
            ConfigError: naming the option.
        """
        for name, alpha in (("alpha", self.alpha), ("first_alpha", self.alpha_of(0))):
            if 0 < (from_target := round(batch_size / (1 + alpha))) < batch_size:
                continue
            raise ConfigError(
                f"{name} = {alpha}: of a batch of {batch_size} the target model would take {from_target} examples "
                "from the target, and it needs some from the pool too: choose one nearer to 1, or raise batch_size"
            )

    @property
    def _share(self) -> float:
        return 1.0 if self.reach == "exact" else SHORT

    def alpha_of(self, round_index: int) -> float:
        """The weight of the penalty in a round: geometric from `first_alpha` in the first to `alpha` in the last."""
        if self.first_alpha is None or self.rounds == 1:
            return self.alpha
        return float(self.first_alpha * (self.alpha / self.first_alpha) ** (round_index / (self.rounds - 1)))

    def _n_trials(self, space: SearchSpace) -> int:
        return self.masks if space.count is None else min(self.masks, space.count)

    def _update_flops(self, space: SearchSpace) -> float:
        return source_policy_flops(len(space.sizes), space.n_features, self.draws, self.masks, POLICY_STEPS)

    def _alternate(self, inner: InnerLoop, space: SearchSpace, lengths: Lengths, seed: int) -> Policy:
        """Fit l* to trials. Then train the target model and move the policy along the penalty, `rounds` times."""
        policy, order = space.policy(), derive(seed, "theta")
        reach: ReachableLossModel | None = None
        theta: TrainResult | None = None
        round_index = 0
        for stage in self.stages(inner, lengths):
            match stage:
                case Trials(rung):
                    reach = self._reach(inner, space, rung, lengths.split.train_flops, seed)
                case FitTarget(flops, name):
                    # A round has whole steps: the learning rate is at its end with the last of them.
                    steps = max(1, int(flops / inner.step_flops * ROUNDING))
                    theta = inner.fit_on(
                        flops,
                        horizon=self.rounds * steps * inner.step_flops,
                        before=theta,
                        seed=order,
                        stage=name,
                        stream=policy_stream(space, policy, order),
                        target_fraction=1 / (1 + self.alpha_of(round_index)),
                    )
                case ScorePool(positions=positions) if theta is not None:
                    target_losses = mean_losses(inner, positions, theta.models[0])
                case UpdatePolicy(flops) if reach is not None:
                    seeds = [derive(seed, "policy", round_index, step) for step in range(POLICY_STEPS)]
                    self._descend(policy, reach, target_losses, space, seeds, self.alpha_of(round_index))
                    inner.learn(flops)
                    self._watch(inner.monitor, space, policy, target_losses, reach, round_index)
                    round_index += 1
        return policy

    def _reach(
        self, inner: InnerLoop, space: SearchSpace, rung: Rung, train_flops: float, seed: int
    ) -> ReachableLossModel:
        """l* as a function of draws, fitted to trials on some of them."""
        rng = np.random.default_rng(derive(seed, "masks"))
        sampled = nonempty(space.policy().sample(64 * rung.n_trials, rng)).astype(np.float64)
        draws = distinct_rows([space.full, *sampled])[: rung.n_trials]
        # The learning rate of a trial whose curve is continued is that of a run of C, which falls later.
        horizon = train_flops if self.reach == "extrapolated" else None
        runs = run_rung(inner, space, draws, rung, seed, 0, horizon=horizon)
        train_loss = runs.final_train_loss
        if self.reach == "extrapolated":
            warm_up = min(LATEST_WARMUP, inner.task.recipe.warmup / rung.fidelity)
            train_loss = extrapolate(runs.flops, runs.losses, train_flops, max(SKIPPED, warm_up))
        return ReachableLossModel(space.weights(draws), train_loss, space.sizes)

    def _descend(
        self,
        policy: Policy,
        reach: ReachableLossModel,
        target_losses: np.ndarray,
        space: SearchSpace,
        seeds: Sequence[int],
        alpha: float,
    ) -> None:
        """Steps of the policy along the penalty's gradient, one per seed; `target_losses`: R of each source, nats."""
        for seed in seeds:
            draws = nonempty(policy.sample(self.draws, np.random.default_rng(seed)))
            if len(draws) < 2:
                break
            gradient = penalty_gradient(policy, space, draws, target_losses, reach, alpha)
            if largest := float(np.abs(gradient).max()):
                policy.step(gradient / largest, POLICY_STEP)

    def _watch(
        self,
        monitor: Monitor,
        space: SearchSpace,
        policy: Policy,
        target_losses: np.ndarray,
        reach: ReachableLossModel,
        round_index: int,
    ) -> None:
        marginals = source_marginals(policy)
        weights = space.weights(marginals[None])
        target_loss = float(mean_over_sources(weights, space.sizes, target_losses)[0])
        reachable_loss = float(reach(weights)[0])
        monitor.scalar("outer/target_model_loss", target_loss, round_index)
        monitor.scalar("outer/loss_within_reach", reachable_loss, round_index)
        monitor.scalar("outer/gap", target_loss - reachable_loss, round_index)
        monitor.scalar("outer/entropy", policy.entropy(), round_index)
        monitor.probabilities(space.pool.source_names, marginals, round_index)


def policy_stream(space: SearchSpace, policy: Policy, seed: int) -> WeightedStream:
    """Draws from the pool, each example by the probability of its source, or by the ratio of its source."""
    assert space.pool.sources is not None
    visited = by_id(space.pool)
    weights = np.maximum(space.weights(source_marginals(policy)[None])[0], MIN_WEIGHT)
    return WeightedStream(weights[space.pool.sources[visited]], seed, visited)


def penalty_gradient(
    policy: Policy,
    space: SearchSpace,
    draws: np.ndarray,
    target_losses: np.ndarray,
    reach: Callable[[np.ndarray], np.ndarray],
    alpha: float,
) -> np.ndarray:
    """The score-function gradient of `alpha E[R(m) - l*(m)]` from draws that each hold a source.

    It is unbiased for the policy under the condition that a draw holds a source: with the mean of the other draws
    subtracted, the mean of the score under that condition does not count.

    Args:
        draws: of the policy, shape (K, S). target_losses: R of each source, nats, shape (S,). reach: l* of weights.

    Returns:
        shape (S,), nats.
    """
    weights = space.weights(draws)
    return penalty(mean_over_sources(weights, space.sizes, target_losses), reach(weights), policy.score(draws), alpha)
