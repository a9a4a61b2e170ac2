"""What an amortised policy may spend, and on what: how its allowance is divided, by the budget alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cads.data.token_batches import lengths
from cads.errors import ConfigError, NotAffordableError
from cads.scoring.features import Kind, free_names, read_names
from cads.search.base import NO_SEARCH_AFFORDABLE
from cads.search.constants import constants_of
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts
from cads.selectors.cads_e.schedule import REFERENCE_SHARE, THETA_PASSES, THETA_SHARE, comparisons, shortest

THETA_MOST = 0.4
"""theta is fitted as in CADS-E, but for no more than this share of what the allowance leaves beside `MIN_TRIALS`."""
REFERENCE_PASSES, REFERENCE_MOST = 4, 0.1
"""u is trained on the sample, for no more passes over it than this, and for no more than this share."""
SAMPLE_SHARE, LEAST_SAMPLE = 0.1, 512
"""Share of it that reading the sample may take, and examples below which nothing can be learned from it."""
PASS_SHARE = 0.4
"""Share of it that reading the rest may take."""
READ_PER_USAGE = 2.0
"""Examples that are read for one usage of the final training, at most: of two that are read one is kept, and seen."""
FRESH_PASSES = 4.0
"""Passes over the same examples up to which they are nearly as good as fresh ones (Muennighoff et al. 2023, arXiv
2305.16264). Where what is kept of those read would be seen more often, unread ones are added at random."""
STEPS = (
    (0.6, 0.0), (0.7, -1.0), (0.85, 0.0), (0.6, 1.0), (0.5, -1.0), (0.85, -1.0), (0.5, 0.0), (0.7, 1.0),
    (0.4, 1.0), (0.7, 0.0), (0.6, -1.0), (0.85, 1.0), (0.4, 0.0), (0.25, 1.0), (0.25, 0.0),
)  # fmt: skip
"""Steps that are tried, the widest spread first: the share of the sample that is kept, and the weight c2/c1 of l*; see
`cads.selectors.cads_e.selector`."""
LEAST_RUNS = 2
"""Short runs that are kept back, before the allowance is divided, to compare a policy with the full pool. They may be
shorter than those of CADS-E: of a pool that is large beside the budget an eighth is more than the allowance."""
PADDING = 1.1
"""What a part of a pool of texts may cost more than its share of the pool's price."""
EXPLORING = 7
"""Runs of the first rung from which on half of those beside the full pool's and the last explore policies around the
best candidate, and the last tries the one to which the corrected gradient leads."""
CONTROL_DRAWS, SLOPE_PASSES = 16, 3
"""Pairs of draws over which the slope of the control variate is averaged; for one draw and one loss it takes as much as
the probabilities this many times."""
COVARIANCE_FLOPS = 12
"""Per entry of the features: mean and deviation 4, standardised 2, product with the signal 2, and z 4."""
FLOPS_PER_COLUMN, FLOPS_PER_EXAMPLE = 4, 8
"""Of a probability: each column standardised, weighed and summed; the bias, the weight of the group and the logistic
function. One column in each group is 1 and the others are 0: that is a look-up."""


@dataclass(frozen=True)
class AmortisedBudget:
    """How the allowance is divided.

    Attributes:
        theta, u: FLOPs of their training; 0 for u where there is none.
        sample: examples that the policy is learned on. read: those that it is applied to, the sample among them.
        forward: whether the policy looks at features that take a forward pass.
        least: examples to train on at least, those that were not read among them.
        columns: P, features beside the groups.
    """

    theta: float
    u: float
    sample: int
    read: int
    forward: bool
    least: float
    columns: int

    @property
    def steps(self) -> list[tuple[float, float]]:
        """Those of `CANDIDATE_STEPS` that can be taken: without u, the ones that give l* no weight."""
        return [(kept, weight) for kept, weight in STEPS if self.u or not weight]

    @property
    def known(self) -> int:
        """Examples whose features are known before the policy is applied: all of them where they are free."""
        return self.sample if self.forward else self.read

    def visible(self, n: int, share: float) -> tuple[int, int]:
        """What a short run on a share of a pool of n sees: examples, and those of them to which a policy is applied.

        Of what the run sees it is applied to the same part as in the end, though to no more than are known.
        """
        part = self.read / n
        everything = max(1, round(min(share * n, self.known / part)))
        return everything, min(self.known, max(1, round(everything * part)))

    @property
    def learning_flops(self) -> float:
        """The steps of all candidates, and one policy on what is known: to look at it, and in the end."""
        return len(self.steps) * self.sample * COVARIANCE_FLOPS * self.columns + self.comparing_flops(1, self.known)

    def comparing_flops(self, policies: int, examples: int) -> float:
        """The probabilities of some examples by each of some policies."""
        return policies * examples * self.per_example

    def exploring_flops(self, tried: int) -> float:
        """The control variate of all policies that were tried, and its slope, on the sample."""
        n_losses = 2 if self.u else 1
        passes = n_losses * (len(self.steps) + tried + 2 * CONTROL_DRAWS * SLOPE_PASSES)
        return passes * self.sample * self.per_example

    @property
    def applying_flops(self) -> float:
        """The policy's probability of every example that it is applied to and that is not known yet."""
        return self.comparing_flops(1, self.read - self.known)

    @property
    def per_example(self) -> float:
        """The policy's probability of one example."""
        return float(FLOPS_PER_COLUMN * self.columns + FLOPS_PER_EXAMPLE)

    def describe_scope(self, n: int) -> str:
        """What the policy is applied to in a pool of n, for the notes."""
        if not self.forward:
            return "selected by features that are free from the whole pool"
        if self.read < n:
            return "the budget does not pay for reading the pool: selected within a random share of it"
        return "the whole pool was read"


def divide_allowance(
    costs: InnerLoopCosts, train_flops: float, kinds: Sequence[Kind], share: float | None
) -> AmortisedBudget:
    """How the allowance is divided.

    Where a pass over the pool is too dear, features that are free select from all of it, if there are any: while
    examples are seen a few times, many doubtful ones are worth more than a few good ones.

    Args:
        training: C, FLOPs of the final training. kinds: of features.
        share: of the pool that is to be read; None for what is affordable.

    Raises:
        ConfigError: if this task has no feature of these kinds.
        NotAffordableError: if the allowance does not buy what is needed.
    """
    task, n = costs.task, len(costs.task.pool)
    free, forward = len(free_names(task.pool, kinds)), len(read_names(task, kinds))
    if not free + forward:
        raise ConfigError(
            f"features = {list(kinds)}: examples of {task.name} have none of these that tells them apart: add 'loss'"
        )
    scan, per_usage = costs.scoring_flops(1), costs.step_flops / task.recipe.batch_size
    usages, short = train_flops / per_usage, shortest(costs, train_flops, constants_of(task).min_fidelity) * train_flops
    left = costs.ledger.left - LEAST_RUNS * (short + costs.measuring_flops)
    if left <= 0:
        raise NotAffordableError(NO_SEARCH_AFFORDABLE)
    theta = min(costs.target_flops(THETA_SHARE, THETA_PASSES, train_flops), THETA_MOST * left)
    sample = min(n, max(LEAST_SAMPLE, int(SAMPLE_SHARE * left / (2 * scan))))
    u = min(REFERENCE_SHARE * train_flops, REFERENCE_MOST * left, REFERENCE_PASSES * sample * per_usage)
    u = u if u >= costs.step_flops else 0.0
    least = min(n, usages / FRESH_PASSES)
    for reference in (u, 0.0) if u else (u,):
        parts = AmortisedBudget(theta, reference, sample, n, False, least, free + forward)
        scoring = sample * scan * (2 if reference else 1) + (costs.measuring_flops if reference else 0.0)
        over = left - theta - reference - scoring
        own = replace(parts, read=sample, forward=True)
        rest = min(over - own.learning_flops - own.comparing_flops(LEAST_RUNS, sample), PASS_SHARE * left)
        affordable_read = sample + max(0, int(rest / (scan * padding(costs) + parts.per_example)))
        read = min(n, max(sample, min(affordable_read, int(READ_PER_USAGE * usages))))
        if share is not None:
            read = max(1, round(share * n))
            parts = replace(parts, sample=min(sample, read))
        if forward and not (share is None and read < n and free):
            parts = replace(parts, read=read, forward=True)
        kept = parts.learning_flops + parts.comparing_flops(LEAST_RUNS, parts.known) + reserve(costs, parts)
        if theta >= costs.target_step_flops and kept <= over:
            return parts
    raise NotAffordableError(NO_SEARCH_AFFORDABLE)


def reserve(costs: InnerLoopCosts, parts: AmortisedBudget) -> float:
    """What is kept back for applying the policy."""
    reading = costs.scoring_flops(parts.read - parts.sample) if parts.forward else 0.0
    return padding(costs) * reading + parts.applying_flops


def padding(costs: InnerLoopCosts) -> float:
    """What a part of the pool may cost, in units of its share of the pool's price."""
    return 1.0 if lengths(costs.task.pool) is None else PADDING


def affordable(costs: InnerLoopCosts, parts: AmortisedBudget, train_flops: float) -> list[Rung]:
    """The short runs that what is left buys beside the pass, with an update of the policy where they explore."""

    def bought(kept: float) -> list[Rung]:
        per_run = parts.comparing_flops(1, parts.known)
        return comparisons(
            costs,
            train_flops,
            lowest=constants_of(costs.task).min_fidelity,
            least_runs=LEAST_RUNS,
            per_run=per_run,
            reserve=kept,
        )

    kept = reserve(costs, parts)
    rungs = bought(kept)
    tried = exploring(rungs, 0) if rungs else 0
    return bought(kept + parts.exploring_flops(tried)) if tried else rungs


def exploring(rungs: Sequence[Rung], rung_index: int) -> int:
    """Draws that a rung tries around the best candidate: an even number; none where no rung follows.

    One more run of the rung belongs to them, that of the policy to which they lead.
    """
    runs = rungs[rung_index].n_trials
    return (runs - 2) // 4 * 2 if rung_index == 0 and len(rungs) > 1 and runs >= EXPLORING else 0
