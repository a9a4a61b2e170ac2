"""CADS-S: which sources to train on. A policy over masks (or mixtures) of sources, learned from short runs.

The outer gradient is the corrected estimator: the score-function estimator of the true bilevel objective,
with the penalty of CADS (arXiv 2510.16806), and a regression on the runs so far, as its control variate.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from cads.budget import Budget, Ledger
from cads.control import Control
from cads.design import d_optimal, spaced
from cads.errors import ConfigError
from cads.estimator import corrected, direct, enumerate_masks, expected_gradient
from cads.inner import Inner, Planned, Purse, Runs
from cads.one_run import OneRunSearch, by_source
from cads.optimizer import LEAST_RUNS, MIN_STEPS, Rung, distinct
from cads.penalty import FittedReach, extrapolate, mean_over_sources
from cads.policy import BernoulliPolicy, MixturePolicy, Policy
from cads.rungs import ENUMERATED, SAMPLED, affordable, run_rung, update_flops
from cads.search import NOTHING, verdict
from cads.seeds import derive
from cads.selection import Selection
from cads.source_risk import least_theta, looks, probing_flops, risk_beside, theta_flops, theta_risks
from cads.space import Masks, Mixtures, Space
from cads.task import Task

POLICY_STEP = 0.05
"""Length of the steps of the policy in the largest probability; it falls to 0 over those after a rung."""
LARGEST_RATIO = 5.0
"""Importance ratios above it are cut off, when a policy has moved away from where its masks were drawn."""
BEYOND_DOUBT = 2.0
"""Standard errors by which a choice must beat the full pool: short runs on similar data differ by less than a target
of a few hundred examples can tell."""
WEIGHT_DIGITS = 12
"""Digits in which weights of examples must differ for training to draw by them."""


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


def nonempty(draws: np.ndarray) -> np.ndarray:
    """The draws that select something: the policy is used conditioned on that."""
    return draws[draws.any(axis=1)]


def propose(space: Space, policy: Policy, seed: int) -> np.ndarray:
    """What a policy that is kept away from certainty draws, shape (M, S)."""
    return nonempty(space.explore(policy).sample(SAMPLED, np.random.default_rng(seed))).astype(np.float64)


def first_draws(space: Space, proposed: np.ndarray, risk: np.ndarray, count: int, *, alone: bool) -> np.ndarray:
    """The draws of the first rung, the full pool first, shape (K, S), K <= `count`.

    The sources without those of the largest risk (shape (S,)), one after another, and of those that the policy proposes
    the ones from which most can be learned besides.

    Args:
        alone: whether the source of least risk alone is tried in any case, or where all of them can be tried. Models
            that learn it by heart do better with two.
    """
    known = space.nested(np.argsort(risk, kind="stable")) if risk.any() else space.full[None]
    if not alone and 2 < count < len(known):
        known = known[:-1]
    few = count <= len(space.sizes)
    known = spaced(known, count if few else max(1, count // 2))
    candidates = distinct([*known, *proposed])
    return candidates[d_optimal(candidates, count, taken=len(known))]


def next_draws(space: Space, proposed: np.ndarray, control: Control, trials: Trials, count: int) -> np.ndarray:
    """The draws of a later rung, the full pool first, shape (K, S), K <= `count`.

    The best of the latest rung, and what promises most of what the policy proposes and of what was tried, with the
    neighbours of the very best.
    """
    candidates = distinct([*proposed, *trials.draws])
    ranked = candidates[np.argsort(trials.value(candidates, control), kind="stable")]
    tried = {row.tobytes() for row in trials.draws}
    near = [n for n in space.neighbours(ranked[0], control) if n.tobytes() not in tried]
    draws, gains = trials.latest
    return distinct([space.full, draws[np.argmin(gains)], ranked[0], *near, *ranked[1:]])[:count]


def source_marginals(policy: Policy) -> np.ndarray:
    """The probability, or mean ratio, of each source, shape (S,)."""
    if isinstance(policy, BernoulliPolicy):
        return policy.probabilities
    if isinstance(policy, MixturePolicy):
        return policy.means
    raise ConfigError(f"{type(policy).__name__} is no policy over sources")


def source_selection(task: Task, space: Space, draw: np.ndarray, policy: Policy, **about: Any) -> Selection:
    """The Selection that trains on `draw`; the score of an example is the probability of its source."""
    pool = task.pool
    assert pool.sources is not None
    marginals = source_marginals(policy)
    weights = space.weights(draw[None])[0]
    # Equal weights may differ in their last bits where they are quotients of ratios and sizes.
    relative = np.round(weights / weights.max(), WEIGHT_DIGITS)
    return Selection.of(
        pool,
        selected=(relative > 0)[pool.sources],
        score=marginals[pool.sources],
        probability=(weights / weights.max())[pool.sources],
        weighted=not np.isin(relative, (0, 1)).all(),
        source_probability=dict(zip(pool.source_names, marginals.tolist(), strict=True)),
        **about,
    )


def improve(
    space: Space,
    policy: Policy,
    control: Control,
    draws: np.ndarray,
    gains: np.ndarray,
    fidelity: float,
    steps: int,
    seed: int,
) -> Policy:
    """Move the policy by `steps` along the corrected gradient, on the latest runs, weighted as it moves away from them.

    The first draw is the full pool, which the policy did not propose: it is no sample. With fewer than two
    samples the control variate is all there is.
    """
    sound = np.isfinite(gains)
    sound[0] = False
    if isinstance(policy, BernoulliPolicy):
        sound &= np.isin(draws, (0, 1)).all(axis=1)
        draws = draws.astype(bool)
    draws, gains = draws[sound], gains[sound]
    held = control(draws, fidelity)
    start = space.explore(policy).log_prob(draws)
    masks = None
    if isinstance(policy, BernoulliPolicy) and policy.n <= ENUMERATED:
        masks = enumerate_masks(policy.n)
        values = np.empty(len(masks))
        values[1:] = control(masks[1:])
        values[0] = values[1:].max()
    for step in range(steps):
        here = space.explore(policy)
        ratio = np.minimum(np.exp(here.log_prob(draws) - start), LARGEST_RATIO)
        if masks is not None:
            slope = expected_gradient(values, source_marginals(here))
        else:
            drawn = nonempty(here.sample(SAMPLED, np.random.default_rng(derive(seed, "control", step))))
            slope = direct(control(drawn), here.score(drawn))
        gradient = slope
        if len(draws) >= 2:
            gradient = corrected(gains, held, slope, ratio[:, None] * here.score(draws))
        largest = float(np.abs(gradient).max())
        if largest == 0:
            break
        policy.step(gradient / largest, POLICY_STEP * (1 - step / steps))
    return policy
