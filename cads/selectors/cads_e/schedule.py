"""CADS-E: the models that its allowance buys, whose losses tell examples apart, and the runs that compare steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cads.accounting.operations import candidates_flops
from cads.search.constants import PRETRAINED
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts
from cads.search.single_run import PRETRAINED_SHARE, PRETRAINED_STEPS

THETA_SHARE, THETA_PASSES = 0.2, 20
"""theta is fitted to the target for this share of C, but for no more passes over it than this."""
REFERENCE_SHARE = 0.25
"""u is trained on the pool for this share of C."""
EACH_OF_ALLOWANCE = 0.15
"""Share of the allowance that theta, and u, take at most."""
CANDIDATE_STEPS = (
    (0.6, -1.0), (0.85, 1.0), (0.5, 1.0), (0.85, -1.0), (0.6, 0.0), (0.5, -1.0), (0.85, 0.0), (0.95, -1.0),
)  # fmt: skip
"""Steps that are tried, the widest spread first: the expected share of the pool that is kept, which is the length of
the step, and the weight c2/c1 of l*, which must come from the data. Positive, it cancels what u has learned by
heart, as in the penalty; at few passes u has learned nothing by heart and l* carries no such signal, but u is one
more opinion on what belongs to the task: there the weight is negative."""
FIDELITIES = (1 / 8, 1 / 4, 1 / 2)
"""Shares of C: of the runs that compare candidates where the allowance is small; of those that do so otherwise; and
of those in which the best candidate must then beat the full pool. Shorter runs take easy examples for the better ones,
since they help early and not later."""
MAX_THETA_SHARE, MIN_THETA_SHARE = 1.5, 0.3
"""Shares of C: what theta takes at most, in two halves, where short runs of the highest fidelity decide besides, and
at least. Only a theta that has seen the target often enough tells what is wrong from what is hard."""
WORTH_REPEATING = 0.75
"""Share of C that theta takes at least for its second half to be worth another pass over the pool."""
KEPT_FOR_THETA, TARGET_FRACTION = 0.6, 0.3
"""In its second half theta is trained, as in the penalty, on the target and on what the policy keeps: this share of the
pool. The target is this share of each batch."""
KEEP_FRACTIONS = (0.6, 0.8, 0.9, 0.7, 0.5)
"""Shares of the pool that such a theta's candidates keep, those that are tried where few can be tried first."""
LEAST_STEPS, LEAST_RUNS = 40, 3
"""Steps of the shortest run, and runs, the full pool's among them, that are worth comparing."""
PRETRAINED_KEEP_FRACTIONS = (0.2, 0.33, 0.5, 0.67, 0.83)
"""Shares of the pool that candidates keep then."""
TARGET_PASSES, MAX_PASSES = 3.0, 8.0
"""Passes of the final training over what is kept: the shares that come nearest to the first are tried first, those
above the second not at all."""


@dataclass(frozen=True)
class SignalModels:
    """What the models cost whose losses are the signals, FLOPs; 0 for what the ledger does not buy.

    Attributes:
        theta: fitted to the target. again: theta once more, on the target and on what the policy keeps.
        u: trained on the pool.
    """

    theta: float = 0.0
    theta_refit_flops: float = 0.0
    u: float = 0.0

    @property
    def reference_is_first_run(self) -> bool:
        """Whether u is the first of the runs that compare candidates, the one on the full pool."""
        return False

    @property
    def steps(self) -> Sequence[tuple[float, float]]:
        """Share that is kept and weight of l* of the candidates that these models make."""
        return affordable_steps(with_reach=self.u > 0)

    def comparisons(self, costs: InnerLoopCosts, train_flops: float) -> list[Rung]:
        """The short runs that are left to compare candidates, once theta and u are paid for."""
        return comparisons(costs, train_flops, per_run=candidates_flops(len(costs.task.pool), 1))


class FromScratch(SignalModels):
    """A theta that takes what only few and long short runs leave, and needs no u."""

    @property
    def steps(self) -> Sequence[tuple[float, float]]:
        """See `SignalModels`."""
        return [(kept, 0.0) for kept in KEEP_FRACTIONS]

    def comparisons(self, costs: InnerLoopCosts, train_flops: float) -> list[Rung]:
        """See `SignalModels`."""
        f, price = deciding(costs, train_flops)
        if (runs := int(costs.ledger.left / price)) < 2:
            return []
        return [costs.deciding_rung(f, train_flops, runs)]


@dataclass(frozen=True)
class FineTuned(SignalModels):
    """Few steps of both models, and the difference of their losses.

    Pretrained models find some examples easier than others, whatever these are good for, and learn from whatever they
    are trained on how long answers are and how they end. Both are in what u loses as well.

    Attributes:
        passes: of the final training over the pool.
    """

    passes: float = 1.0

    @property
    def reference_is_first_run(self) -> bool:
        """See `SignalModels`. Where the short runs see a part of the pool alone, u is no such run."""
        return self.u == 0

    @property
    def steps(self) -> Sequence[tuple[float, float]]:
        """See `SignalModels`."""
        wanted = math.log(self.passes / TARGET_PASSES)
        lengths = sorted(PRETRAINED_KEEP_FRACTIONS, key=lambda kept: abs(math.log(kept) - wanted))
        tried = [kept for kept in lengths if self.passes <= MAX_PASSES * kept] or [max(lengths)]
        return [(kept, 1.0) for kept in tried]

    def comparisons(self, costs: InnerLoopCosts, train_flops: float) -> list[Rung]:
        """See `SignalModels`."""
        n = len(costs.task.pool)
        left = costs.ledger.left - (costs.scoring_flops(n) if self.reference_is_first_run else 0.0)
        return self.short_runs(costs, train_flops, left)

    def short_runs(self, costs: InnerLoopCosts, train_flops: float, left: float) -> list[Rung]:
        """As many as there are candidates, and as long as `left` FLOPs make them; or fewer, of the shortest."""
        beside = costs.measuring_flops + candidates_flops(len(costs.task.pool), 1)
        lowest = max(FIDELITIES[0], PRETRAINED.min_steps * costs.step_flops / train_flops)
        runs = min(1 + len(self.steps), int(left / (lowest * train_flops + beside)))
        if lowest > 1 or runs < 2:
            return []
        f = max(lowest, min(FIDELITIES[2], (left / runs - beside) / train_flops))
        return [Rung(f, f * train_flops, 1.0 if self.reference_is_first_run else f, runs)]


def deciding(costs: InnerLoopCosts, train_flops: float) -> tuple[float, float]:
    """Share of C, and price, of a short run that decides by itself."""
    f = shortest(costs, train_flops, FIDELITIES[2])
    return f, f * train_flops + costs.measuring_flops + candidates_flops(len(costs.task.pool), 1)


def signal_models(costs: InnerLoopCosts, train_flops: float) -> SignalModels:
    """The models that what is left of the ledger buys, with a pass over the pool each, beside the short runs."""
    if costs.task.pretrained:
        return fine_tuned_signal_models(costs, train_flops)
    n = len(costs.task.pool)
    scoring, left = costs.scoring_flops(n), costs.ledger.left
    fidelity, price = deciding(costs, train_flops)
    spare = min(MAX_THETA_SHARE * train_flops, left - LEAST_RUNS * price - scoring)
    if fidelity <= 1 and spare >= max(MIN_THETA_SHARE * train_flops, costs.target_step_flops):
        both = min(spare, left - LEAST_RUNS * price - 2 * scoring - candidates_flops(n, 1))
        from_target = round(TARGET_FRACTION * costs.task.recipe.batch_size)
        if from_target and both >= max(WORTH_REPEATING * train_flops, 2 * costs.target_step_flops):
            return FromScratch(both / 2, both / 2)
        return FromScratch(spare)
    each = EACH_OF_ALLOWANCE * left / train_flops
    theta = costs.target_flops(min(THETA_SHARE, each), THETA_PASSES, train_flops)
    per_run = costs.measuring_flops + candidates_flops(n, 1)
    least = shortest(costs, train_flops, FIDELITIES[0])
    most = left - LEAST_RUNS * (least * train_flops + per_run)
    if least > 1 or theta < costs.target_step_flops or theta + scoring > most:
        return SignalModels()
    u = min(REFERENCE_SHARE, each) * train_flops
    if u < costs.step_flops or theta + u + 2 * scoring + costs.measuring_flops > most:
        return SignalModels(theta)
    return SignalModels(theta, u=u)


def fine_tuned_signal_models(costs: InnerLoopCosts, train_flops: float) -> SignalModels:
    """The same where models are pretrained."""
    most = costs.target_flops(PRETRAINED_SHARE, THETA_PASSES, train_flops)
    theta = max(costs.target_steps_flops(PRETRAINED_STEPS), min(most, PRETRAINED_SHARE * costs.ledger.left))
    passes, u = costs.passes(train_flops), 0.0
    if passes > PRETRAINED.full_data_max_passes:
        u = max(theta, PRETRAINED.min_steps * costs.step_flops)
    models = FineTuned(theta, u=u, passes=passes)
    taken = theta + u + 2 * costs.scoring_flops(len(costs.task.pool)) + (costs.measuring_flops if u else 0.0)
    return models if models.short_runs(costs, train_flops, costs.ledger.left - taken) else SignalModels()


def least_flops(costs: InnerLoopCosts) -> float:
    """What CADS-E takes at least where models are pretrained: theta, two passes over the pool, and two short runs."""
    n = len(costs.task.pool)
    run = PRETRAINED.min_steps * costs.step_flops + costs.measuring_flops + candidates_flops(n, 1)
    return costs.target_steps_flops(PRETRAINED_STEPS) + 2 * costs.scoring_flops(n) + 2 * run


def comparisons(
    costs: InnerLoopCosts,
    train_flops: float,
    *,
    lowest: float = FIDELITIES[0],
    least_runs: int = LEAST_RUNS,
    per_run: float = 0.0,
    reserve: float = 0.0,
) -> list[Rung]:
    """The short runs that what is left of the ledger buys: of candidates, and of the best one against the full pool.

    Args:
        lowest: share of C of the runs where the allowance is small.
        least_runs: of the full pool and of candidates; where fewer can be paid, there are none.
        per_run: FLOPs on top of training and measuring, for the policy. reserve: FLOPs that are not to be spent.
    """
    left = costs.ledger.left - reserve
    small, usual, confirmed = (shortest(costs, train_flops, f) for f in (lowest, *FIDELITIES[1:]))
    price = {f: f * train_flops + costs.measuring_flops + per_run for f in (small, usual, confirmed)}
    if (first := int((left - 2 * price[confirmed]) / price[usual])) >= LEAST_RUNS and usual < confirmed:
        runs = {usual: first, confirmed: 2}
    else:
        f = usual if left >= LEAST_RUNS * price[usual] else small
        runs = {f: int(left / price[f])}
    lowest_share, compared = next(iter(runs.items()))
    if lowest_share > 1 or compared < least_runs:
        return []
    return [costs.deciding_rung(f, train_flops, n) for f, n in runs.items()]


def shortest(costs: InnerLoopCosts, train_flops: float, fidelity: float) -> float:
    """`fidelity`, or more where that would be too few steps."""
    return max(fidelity, LEAST_STEPS * costs.step_flops / train_flops)


def affordable_steps(*, with_reach: bool) -> list[tuple[float, float]]:
    """Those of `CANDIDATE_STEPS` that can be taken: without l*, the ones that give it no weight."""
    return [(kept, weight) for kept, weight in CANDIDATE_STEPS if with_reach or not weight]
