"""CADS-E: the models whose losses tell examples apart, and the trials that compare candidates, for an allowance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cads.accounting.operations import candidates_flops
from cads.search.constants import PRETRAINED
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts

THETA_SHARE, THETA_PASSES = 0.2, 20
"""theta, the target model, is trained on the target for this share of C, but for at most so many passes."""
REFERENCE_SHARE = 0.25
"""u, the reference model, is trained on the pool for this share of C."""
EACH_OF_ALLOWANCE = 0.15
"""Largest share of the allowance for theta, and for u."""
CANDIDATE_STEPS = (
    (0.6, -1.0), (0.85, 1.0), (0.5, 1.0), (0.85, -1.0), (0.6, 0.0), (0.5, -1.0), (0.85, 0.0), (0.95, -1.0),
)  # fmt: skip
"""Candidates, the widest spread first: the expected share of the pool that is kept, which is the length of the step,
and the weight c2/c1 of l*, which must come from the data. A positive weight cancels what u has memorised, as in the
penalty. At few passes u has memorised nothing, so that l* carries no such signal. Then u is a second opinion on what
belongs to the task, and the weight is negative."""
FIDELITIES = (1 / 8, 1 / 4, 1 / 2)
"""Shares of C: of the trials that compare candidates if the allowance is small; of those that do so otherwise; and of
those in which the best candidate must then beat the full pool. Shorter trials prefer easy examples, which help early
and not later."""
MAX_THETA_SHARE, MIN_THETA_SHARE = 1.5, 0.3
"""Largest and smallest share of C for theta, in two halves, if trials of the highest fidelity decide. Only a theta that
has seen the target often enough tells wrong examples from hard ones."""
WORTH_REPEATING = 0.75
"""Smallest share of C for theta with which its second half is worth another pass over the pool."""
KEPT_FOR_THETA, TARGET_FRACTION = 0.6, 0.3
"""In its second half theta is trained, as in the penalty, on the target and on what the policy keeps: the first is the
share of the pool that is kept, the second the share of each batch that comes from the target."""
KEEP_FRACTIONS = (0.6, 0.8, 0.9, 0.7, 0.5)
"""Shares of the pool that the candidates of such a theta keep, in the order in which they are tried."""
LEAST_STEPS, LEAST_RUNS = 40, 3
"""Fewest steps of a trial, and fewest trials, the one on the full pool among them."""
PRETRAINED_SHARE, PRETRAINED_STEPS = 0.1, 16
"""For pretrained models: theta's largest share of the allowance and of C, and its fewest steps. Fewer steps do not tell
examples apart, and more than twice as many add nothing (`experiments/results`). u is trained for as many FLOPs."""
PRETRAINED_KEEP_FRACTIONS = (0.2, 0.33, 0.5, 0.67, 0.83)
"""Shares of the pool that candidates of pretrained models keep."""
TARGET_PASSES, MAX_PASSES = 3.0, 8.0
"""Passes of the final training over the examples that are kept. Shares that come nearest to the first number are tried
first. Shares with more passes than the second number are not tried."""


@dataclass(frozen=True)
class SignalModels:
    """FLOPs of the models whose losses are the signals; 0 for a model that the ledger's limit does not buy.

    Attributes:
        theta: of the target model, trained on the target.
        theta_refit_flops: of training theta further, on the target and on what the policy keeps.
        u: of the reference model, trained on the pool.
    """

    theta: float = 0.0
    theta_refit_flops: float = 0.0
    u: float = 0.0

    @property
    def reference_is_first_run(self) -> bool:
        """Whether the first trial, on the full pool, trains u."""
        return False

    @property
    def steps(self) -> Sequence[tuple[float, float]]:
        """Share that is kept, and weight of l*, of each candidate of these models."""
        return affordable_steps(with_reach=self.u > 0)

    def comparisons(self, costs: InnerLoopCosts, train_flops: float) -> list[Rung]:
        """The trials that compare candidates, once theta and u are paid for."""
        return comparisons(costs, train_flops, per_run=candidates_flops(len(costs.task.pool), 1))


class FromScratch(SignalModels):
    """A theta that takes all FLOPs beside a few long trials, and needs no u."""

    @property
    def steps(self) -> Sequence[tuple[float, float]]:
        """See `SignalModels`."""
        return [(kept, 0.0) for kept in KEEP_FRACTIONS]

    def comparisons(self, costs: InnerLoopCosts, train_flops: float) -> list[Rung]:
        """See `SignalModels`."""
        fidelity, price = deciding(costs, train_flops)
        if (n_trials := int(costs.ledger.left / price)) < 2:
            return []
        return [costs.deciding_rung(fidelity, train_flops, n_trials)]


@dataclass(frozen=True)
class FineTuned(SignalModels):
    """Few steps of both models, which are pretrained, and the difference of their losses.

    Pretrained models find some examples easier than others, whatever the value of these for training. From any data
    they learn how long answers are and how they end. The losses of u hold both effects as well, and cancel them.

    Attributes:
        passes: that the final training makes over the pool.
    """

    passes: float = 1.0

    @property
    def reference_is_first_run(self) -> bool:
        """See `SignalModels`. If the trials see only a part of the pool, u is trained apart from them."""
        return self.u == 0

    @property
    def steps(self) -> Sequence[tuple[float, float]]:
        """See `SignalModels`."""
        log_share = math.log(self.passes / TARGET_PASSES)
        shares = sorted(PRETRAINED_KEEP_FRACTIONS, key=lambda share: abs(math.log(share) - log_share))
        candidates = [share for share in shares if self.passes <= MAX_PASSES * share] or [max(shares)]
        return [(share, 1.0) for share in candidates]

    def comparisons(self, costs: InnerLoopCosts, train_flops: float) -> list[Rung]:
        """See `SignalModels`."""
        n = len(costs.task.pool)
        available = costs.ledger.left - (costs.scoring_flops(n) if self.reference_is_first_run else 0.0)
        return self.affordable_trials(costs, train_flops, available)

    def affordable_trials(self, costs: InnerLoopCosts, train_flops: float, available: float) -> list[Rung]:
        """A trial per candidate and one on the full pool, as long as is affordable; or fewer, of the shortest."""
        per_trial = costs.measuring_flops + candidates_flops(len(costs.task.pool), 1)
        lowest = max(FIDELITIES[0], PRETRAINED.min_steps * costs.step_flops / train_flops)
        n_trials = min(1 + len(self.steps), int(available / (lowest * train_flops + per_trial)))
        if lowest > 1 or n_trials < 2:
            return []
        fidelity = max(lowest, min(FIDELITIES[2], (available / n_trials - per_trial) / train_flops))
        return [Rung(fidelity, fidelity * train_flops, 1.0 if self.reference_is_first_run else fidelity, n_trials)]


def deciding(costs: InnerLoopCosts, train_flops: float) -> tuple[float, float]:
    """Share of C, and FLOPs, of a trial that decides by itself."""
    fidelity = shortest(costs, train_flops, FIDELITIES[2])
    return fidelity, fidelity * train_flops + costs.measuring_flops + candidates_flops(len(costs.task.pool), 1)


def signal_models(costs: InnerLoopCosts, train_flops: float) -> SignalModels:
    """The models that the rest of the ledger's limit buys, with a pass over the pool each, beside the trials."""
    if costs.task.pretrained:
        return fine_tuned_signal_models(costs, train_flops)
    n = len(costs.task.pool)
    scoring, remaining = costs.scoring_flops(n), costs.ledger.left
    fidelity, price = deciding(costs, train_flops)
    theta_flops = min(MAX_THETA_SHARE * train_flops, remaining - LEAST_RUNS * price - scoring)
    if fidelity <= 1 and theta_flops >= max(MIN_THETA_SHARE * train_flops, costs.target_step_flops):
        both_halves = min(theta_flops, remaining - LEAST_RUNS * price - 2 * scoring - candidates_flops(n, 1))
        from_target = round(TARGET_FRACTION * costs.task.recipe.batch_size)
        if from_target and both_halves >= max(WORTH_REPEATING * train_flops, 2 * costs.target_step_flops):
            return FromScratch(both_halves / 2, both_halves / 2)
        return FromScratch(theta_flops)
    max_share = EACH_OF_ALLOWANCE * remaining / train_flops
    theta = costs.target_flops(min(THETA_SHARE, max_share), THETA_PASSES, train_flops)
    per_run = costs.measuring_flops + candidates_flops(n, 1)
    min_fidelity = shortest(costs, train_flops, FIDELITIES[0])
    max_flops = remaining - LEAST_RUNS * (min_fidelity * train_flops + per_run)
    if min_fidelity > 1 or theta < costs.target_step_flops or theta + scoring > max_flops:
        return SignalModels()
    u = min(REFERENCE_SHARE, max_share) * train_flops
    if u < costs.step_flops or theta + u + 2 * scoring + costs.measuring_flops > max_flops:
        return SignalModels(theta)
    return SignalModels(theta, u=u)


def fine_tuned_signal_models(costs: InnerLoopCosts, train_flops: float) -> SignalModels:
    """`signal_models` for pretrained models."""
    max_theta = costs.target_flops(PRETRAINED_SHARE, THETA_PASSES, train_flops)
    theta = max(costs.target_steps_flops(PRETRAINED_STEPS), min(max_theta, PRETRAINED_SHARE * costs.ledger.left))
    passes, u = costs.passes(train_flops), 0.0
    if passes > PRETRAINED.full_data_max_passes:
        u = max(theta, PRETRAINED.min_steps * costs.step_flops)
    models = FineTuned(theta, u=u, passes=passes)
    models_flops = theta + u + 2 * costs.scoring_flops(len(costs.task.pool)) + (costs.measuring_flops if u else 0.0)
    return models if models.affordable_trials(costs, train_flops, costs.ledger.left - models_flops) else SignalModels()


def least_flops(costs: InnerLoopCosts) -> float:
    """Fewest FLOPs of CADS-E with pretrained models: theta, two passes over the pool, and two trials."""
    n = len(costs.task.pool)
    trial = PRETRAINED.min_steps * costs.step_flops + costs.measuring_flops + candidates_flops(n, 1)
    return costs.target_steps_flops(PRETRAINED_STEPS) + 2 * costs.scoring_flops(n) + 2 * trial


def comparisons(
    costs: InnerLoopCosts,
    train_flops: float,
    *,
    lowest: float = FIDELITIES[0],
    least_runs: int = LEAST_RUNS,
    per_run: float = 0.0,
    reserve: float = 0.0,
) -> list[Rung]:
    """The trials that the rest of the ledger's limit buys: of candidates, then of the best one against the full pool.

    Args:
        lowest: share of C of the trials if the allowance is small.
        least_runs: fewest trials, the one on the full pool among them; if fewer are affordable, there are none.
        per_run: further FLOPs of each trial, for the policy. reserve: FLOPs that are kept back.
    """
    available = costs.ledger.left - reserve
    small, usual, confirming = (shortest(costs, train_flops, fidelity) for fidelity in (lowest, *FIDELITIES[1:]))
    flops = {
        fidelity: fidelity * train_flops + costs.measuring_flops + per_run for fidelity in (small, usual, confirming)
    }
    if (n_usual := int((available - 2 * flops[confirming]) / flops[usual])) >= LEAST_RUNS and usual < confirming:
        n_trials = {usual: n_usual, confirming: 2}
    else:
        fidelity = usual if available >= LEAST_RUNS * flops[usual] else small
        n_trials = {fidelity: int(available / flops[fidelity])}
    lowest_fidelity, n_compared = next(iter(n_trials.items()))
    if lowest_fidelity > 1 or n_compared < least_runs:
        return []
    return [costs.deciding_rung(fidelity, train_flops, count) for fidelity, count in n_trials.items()]


def shortest(costs: InnerLoopCosts, train_flops: float, fidelity: float) -> float:
    """`fidelity`, or that of a trial of `LEAST_STEPS` steps if it is higher."""
    return max(fidelity, LEAST_STEPS * costs.step_flops / train_flops)


def affordable_steps(*, with_reach: bool) -> list[tuple[float, float]]:
    """The `CANDIDATE_STEPS` that are available: without l*, only those that give it no weight."""
    return [(kept, weight) for kept, weight in CANDIDATE_STEPS if with_reach or not weight]
