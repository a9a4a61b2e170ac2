"""The phases of a run: the target first, then target and pool together, in shares that follow from their sizes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cads.data.target_share import MAX_TARGET
from cads.recipe import TrainConfig


@dataclass(frozen=True)
class OnlineConstants:
    """The constants of a run.

    Attributes:
        first_passes: effective passes over the target before the pool is trained on; an effective pass is one at the
            peak learning rate.
        mixed_lead: passes by which the target leads where it has no phase of its own, see `mixture`.
        most_first: largest share of the budget for them. If they take more, the target alone is trained on.
        most_steering: largest share of the budget for a model of the target that steers and is not the final one.
        probes: most examples of each source whose losses are measured after the first phase.
        fewest_probes: fewest of them. If the budget buys fewer, sources are not told apart.
        most_probing: largest share of the budget for measuring them.
        most_comparing: largest share of the budget for comparing pool and target.
        sharpness: kappa of the tilt of source weights. most_excess: largest difference of the signal that counts.
        half_worth: visits of an example after which one more is worth half of the first, see `cads.policies.visits`;
            None: sources are drawn in proportion to their worth, however long the run.
        floor: smallest weight of a source, relative to the largest.
        most_target: largest share of the target in a batch after a first phase; see `mixture` for runs without one.
        learning_passes: passes over the pool after which probabilities no longer move.
        stop_passes: passes over what is kept of target and pool after which the run ends; None: never.
        drop: whether the signal is the fall of the loss over the first phase, and not the loss at its end.
    """

    first_passes: float
    mixed_lead: float
    most_first: float
    most_steering: float
    probes: int
    fewest_probes: int
    most_probing: float
    most_comparing: float
    sharpness: float
    most_excess: float
    half_worth: float | None
    floor: float
    most_target: float
    learning_passes: float
    stop_passes: float | None
    drop: bool


FROM_SCRATCH = OnlineConstants(
    first_passes=4,
    mixed_lead=0,
    most_first=0.75,
    most_steering=0.04,
    probes=8,
    fewest_probes=1,
    most_probing=0.03,
    most_comparing=0.02,
    sharpness=2,
    most_excess=np.inf,
    half_worth=2,
    floor=0.02,
    most_target=MAX_TARGET,
    learning_passes=8,
    stop_passes=None,
    drop=False,
)
"""For models whose weights begin at random."""
PRETRAINED = OnlineConstants(
    first_passes=3,
    mixed_lead=4,
    most_first=0.75,
    most_steering=0.04,
    probes=16,
    fewest_probes=8,
    most_probing=0.03,
    most_comparing=0.02,
    sharpness=2,
    most_excess=3,
    half_worth=None,
    floor=0.02,
    most_target=MAX_TARGET,
    learning_passes=8,
    stop_passes=8,
    drop=True,
)
"""For pretrained models. What is easy for them from the start teaches nothing: what counts is by how much training on
the target makes an example easier. They memorise what is repeated."""


def first_phase(
    constants: OnlineConstants, recipe: TrainConfig, *, n_target: int, usage_flops: float, total: float
) -> float:
    """FLOPs for the target alone: until `sum_t n_t lr_t / lr_peak` is `first_passes` times its size.

    Steps at a low rate, such as those of the warm-up, count for as little as they teach. If that takes more than
    `most_first` of the budget, it is all of it: the target is not learned well enough yet for anything else to pay.

    Args:
        n_target: examples of the target. usage_flops: of training on one of them. total: FLOPs of the run.
    """
    if not constants.first_passes:
        return 0.0
    step = recipe.batch_size * usage_flops
    steps = int(constants.most_first * total / step)
    middles = (np.arange(steps) + 0.5) * step / total
    rates = np.array([recipe.rate(progress) for progress in middles]) / recipe.learning_rate
    taught, needed = np.cumsum(rates) * recipe.batch_size, constants.first_passes * n_target
    if not steps or taught[-1] < needed:
        return total
    return (int(np.searchsorted(taught, needed)) + 1.5) * step


@dataclass(frozen=True)
class MixedPart:
    """Examples that come equally often, but for their weights.

    Attributes:
        n: different ones, weighed. usage: mean FLOPs of training on one of them.
    """

    n: float
    usage: float

    @classmethod
    def of(cls, counted: np.ndarray, usages: np.ndarray) -> MixedPart:
        """That of examples which count as much as `counted` says, with these FLOPs; both of shape (n,)."""
        n = float(counted.sum())
        return cls(n, float(counted @ usages) / n if n else 0.0)

    @property
    def flops(self) -> float:
        """Of one visit of each."""
        return self.n * self.usage


@dataclass(frozen=True)
class TargetMixture:
    """Target and pool together from the start.

    Attributes:
        target_share: of a batch; 1: the budget buys the target alone.
        rest: how often what is not of the target's kind is drawn, as a part of how often the target is.
        flops: of the run.
    """

    target_share: float
    rest: float
    flops: float


def mixture(
    constants: OnlineConstants, *, target: MixedPart, near: MixedPart, rest: MixedPart, flops: float
) -> TargetMixture:
    """Target and pool together from the start, for sources that are not told apart.

    An example is worth less each time it comes. So the target, and what of the pool is of its kind, come c times and
    the rest max(0, c - `mixed_lead`) times: the lead that a first phase would give the target is mixed in. c follows
    from the budget; the run ends at `stop_passes`.

    Args:
        target, near, rest: the target, what of the pool is of its kind, and what is not.
        flops: that can be spent.
    """
    lead, alike = constants.mixed_lead, target.flops + near.flops
    visits = flops / alike
    if visits > lead:
        visits = (flops + lead * rest.flops) / (alike + rest.flops)
    if constants.stop_passes is not None:
        visits = min(visits, constants.stop_passes)
    of_rest = max(0.0, visits - lead)
    drawn = (target.n + near.n) * visits + rest.n * of_rest
    spent = alike * visits + rest.flops * of_rest
    return TargetMixture(target.n * visits / drawn, of_rest / visits, min(flops, spent))
