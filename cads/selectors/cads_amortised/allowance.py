"""Dividing the allowance of an amortised policy, by the budget alone."""

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
"""theta, the target model, is trained as in CADS-E, but for at most this share of the allowance less `LEAST_RUNS`."""
REFERENCE_PASSES, REFERENCE_MOST = 4, 0.1
"""u, the reference model, is trained on the sample, for at most so many passes and this share of the same FLOPs."""
SAMPLE_SHARE, LEAST_SAMPLE = 0.1, 512
"""Share of the same FLOPs that reading the sample may take, and fewest examples of a sample."""
PASS_SHARE = 0.4
"""Share of the same FLOPs that reading the rest of the pool may take."""
READ_PER_USAGE = 2.0
"""Most examples that are read per usage of the final training: one of two is kept, and seen in the training."""
FRESH_PASSES = 4.0
"""Passes over the same examples up to which they are nearly as good as fresh ones (Muennighoff et al. 2023, arXiv
2305.16264). If the kept examples would be seen more often, unread ones are added at random."""
STEPS = (
    (0.6, 0.0), (0.7, -1.0), (0.85, 0.0), (0.6, 1.0), (0.5, -1.0), (0.85, -1.0), (0.5, 0.0), (0.7, 1.0),
    (0.4, 1.0), (0.7, 0.0), (0.6, -1.0), (0.85, 1.0), (0.4, 0.0), (0.25, 1.0), (0.25, 0.0),
)  # fmt: skip
"""Candidates, the widest spread first: the share of the sample that is kept, and the weight c2/c1 of l*; see
`cads.selectors.cads_e.selector`."""
LEAST_RUNS = 2
"""Trials that are reserved, before the allowance is divided, to compare a policy with the full pool. They may be
shorter than those of CADS-E: if the pool is large for the budget, C/8 exceeds the allowance."""
PADDING = 1.1
"""Largest cost of a part of a pool of texts, in units of its share of the cost of the pool."""
EXPLORING = 7
"""Fewest trials of the first rung with which it explores. One trial is on the full pool, and the last one tries the
policy to which the corrected gradient leads. Half of the others explore policies around the best candidate."""
CONTROL_DRAWS, SLOPE_PASSES = 16, 3
"""Pairs of draws over which the slope of the control variate is averaged; and the cost of a slope, for one draw and one
loss, in units of that of the probabilities."""
COVARIANCE_FLOPS = 12
"""FLOPs per entry of the features: mean and deviation 4, standardising 2, product with the signal 2, and z 4."""
FLOPS_PER_COLUMN, FLOPS_PER_EXAMPLE = 4, 8
"""FLOPs of a probability: standardising, weighing and summing each column; the bias, the weight of the group and the
logistic function. Of the group columns one is 1 and the others are 0, so that they take a look-up."""


@dataclass(frozen=True)
class AmortisedBudget:
    """How the allowance is divided.

    Attributes:
        theta, u: FLOPs of training the target model and the reference model; 0 for u if there is none.
        sample: examples on which the policy is learned. read: those to which it is applied, the sample among them.
        forward: whether the policy uses features that take a forward pass.
        least: fewest examples to train on, unread ones among them.
        columns: P, the features other than groups.
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
        """The `STEPS` that are available: without u, only those that give l* no weight."""
        return [(kept, weight) for kept, weight in STEPS if self.u or not weight]

    @property
    def known(self) -> int:
        """Examples whose features are known before the policy is applied: all of `read` if features are free."""
        return self.sample if self.forward else self.read

    def visible(self, n: int, share: float) -> tuple[int, int]:
        """What a trial on a share of a pool of n sees: examples, and how many of them a policy is applied to.

        The policy is applied to the same part of the examples as in the end, but to at most those that are known.
        """
        read_share = self.read / n
        n_examples = max(1, round(min(share * n, self.known / read_share)))
        return n_examples, min(self.known, max(1, round(n_examples * read_share)))

    @property
    def learning_flops(self) -> float:
        """FLOPs of the steps of all candidates, and of one policy on the known examples, to monitor and apply it."""
        return len(self.steps) * self.sample * COVARIANCE_FLOPS * self.columns + self.comparing_flops(1, self.known)

    def comparing_flops(self, policies: int, examples: int) -> float:
        """FLOPs of the probabilities of so many examples under so many policies."""
        return policies * examples * self.per_example

    def exploring_flops(self, tried: int) -> float:
        """FLOPs of the control variate of all policies that were tried, and of its slope, on the sample."""
        n_losses = 2 if self.u else 1
        passes = n_losses * (len(self.steps) + tried + 2 * CONTROL_DRAWS * SLOPE_PASSES)
        return passes * self.sample * self.per_example

    @property
    def applying_flops(self) -> float:
        """FLOPs of the probabilities of the examples that the policy is applied to and that are not known yet."""
        return self.comparing_flops(1, self.read - self.known)

    @property
    def per_example(self) -> float:
        """FLOPs of the probability of one example."""
        return float(FLOPS_PER_COLUMN * self.columns + FLOPS_PER_EXAMPLE)

    def describe_scope(self, n: int) -> str:
        """The part of a pool of n to which the policy is applied, in words for the notes."""
        if not self.forward:
            return "selected by features that are free from the whole pool"
        if self.read < n:
            return "the budget does not pay for reading the pool: selected within a random share of it"
        return "the whole pool was read"


def divide_allowance(
    costs: InnerLoopCosts, train_flops: float, kinds: Sequence[Kind], share: float | None
) -> AmortisedBudget:
    """Divide the allowance.

    If a pass over the pool is not affordable, features that are free select from all of it, if there are any. While
    examples are seen only a few times, many doubtful ones are worth more than a few good ones.

    Args:
        train_flops: C, FLOPs of the final training. kinds: of features.
        share: of the pool that is to be read; None for what is affordable.

    Raises:
        ConfigError: if this task has no feature of these kinds.
        NotAffordableError: if the allowance does not buy a search.
    """
    task, n = costs.task, len(costs.task.pool)
    free, forward = len(free_names(task.pool, kinds)), len(read_names(task, kinds))
    if not free + forward:
        raise ConfigError(
            f"features = {list(kinds)}: examples of {task.name} have none of these that tells them apart: add 'loss'"
        )
    scan, per_usage = costs.scoring_flops(1), costs.step_flops / task.recipe.batch_size
    usages = train_flops / per_usage
    shortest_trial = shortest(costs, train_flops, constants_of(task).min_fidelity) * train_flops
    remaining = costs.ledger.left - LEAST_RUNS * (shortest_trial + costs.measuring_flops)
    if remaining <= 0:
        raise NotAffordableError(NO_SEARCH_AFFORDABLE)
    theta = min(costs.target_flops(THETA_SHARE, THETA_PASSES, train_flops), THETA_MOST * remaining)
    sample = min(n, max(LEAST_SAMPLE, int(SAMPLE_SHARE * remaining / (2 * scan))))
    u = min(REFERENCE_SHARE * train_flops, REFERENCE_MOST * remaining, REFERENCE_PASSES * sample * per_usage)
    u = u if u >= costs.step_flops else 0.0
    min_examples = min(n, usages / FRESH_PASSES)
    for reference in (u, 0.0) if u else (u,):
        parts = AmortisedBudget(theta, reference, sample, n, False, min_examples, free + forward)
        scoring = sample * scan * (2 if reference else 1) + (costs.measuring_flops if reference else 0.0)
        available = remaining - theta - reference - scoring
        with_reading = replace(parts, read=sample, forward=True)
        reading_flops = min(
            available - with_reading.learning_flops - with_reading.comparing_flops(LEAST_RUNS, sample),
            PASS_SHARE * remaining,
        )
        affordable_read = sample + max(0, int(reading_flops / (scan * padding(costs) + parts.per_example)))
        read = min(n, max(sample, min(affordable_read, int(READ_PER_USAGE * usages))))
        if share is not None:
            read = max(1, round(share * n))
            parts = replace(parts, sample=min(sample, read))
        if forward and not (share is None and read < n and free):
            parts = replace(parts, read=read, forward=True)
        required = parts.learning_flops + parts.comparing_flops(LEAST_RUNS, parts.known) + reserve(costs, parts)
        if theta >= costs.target_step_flops and required <= available:
            return parts
    raise NotAffordableError(NO_SEARCH_AFFORDABLE)


def reserve(costs: InnerLoopCosts, parts: AmortisedBudget) -> float:
    """FLOPs that are reserved for applying the policy."""
    reading = costs.scoring_flops(parts.read - parts.sample) if parts.forward else 0.0
    return padding(costs) * reading + parts.applying_flops


def padding(costs: InnerLoopCosts) -> float:
    """Largest cost of a part of the pool, in units of its share of the cost of the pool."""
    return 1.0 if lengths(costs.task.pool) is None else PADDING


def affordable(costs: InnerLoopCosts, parts: AmortisedBudget, train_flops: float) -> list[Rung]:
    """The trials that the ledger's limit buys beside the pass, with an update of the policy if they explore."""

    def rungs_with(reserved: float) -> list[Rung]:
        per_run = parts.comparing_flops(1, parts.known)
        return comparisons(
            costs,
            train_flops,
            lowest=constants_of(costs.task).min_fidelity,
            least_runs=LEAST_RUNS,
            per_run=per_run,
            reserve=reserved,
        )

    reserved = reserve(costs, parts)
    rungs = rungs_with(reserved)
    tried = exploring(rungs, 0) if rungs else 0
    return rungs_with(reserved + parts.exploring_flops(tried)) if tried else rungs


def exploring(rungs: Sequence[Rung], rung_index: int) -> int:
    """Draws that a rung tries around the best candidate: an even number; 0 if no rung follows.

    One more trial of the rung is for the policy to which the draws lead.
    """
    n_trials = rungs[rung_index].n_trials
    return (n_trials - 2) // 4 * 2 if rung_index == 0 and len(rungs) > 1 and n_trials >= EXPLORING else 0
