"""The training data of an amortised policy: a random sample of the pool, read once, and the penalty on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cads.data.pool import Pool
from cads.data.streams import ShuffledStream
from cads.data.subsample import numbered_by_first, strata
from cads.data.token_batches import by_id
from cads.estimators.control_variate import fit_control
from cads.policies.simplex import Floats
from cads.scoring.features import GROUP, LOSS, FreeFeatures, Kind, ReadFeatures
from cads.search.base import check_reference
from cads.search.inner_runs import InnerLoop
from cads.seeding import derive
from cads.selectors.cads_amortised.allowance import AmortisedBudget
from cads.selectors.cads_amortised.policy import AmortisedPolicy, mean_loss, mean_loss_slope, penalty_direction
from cads.selectors.cads_e.candidates import SHARPNESS


@dataclass
class Proposal:
    """A policy, and the step that made it."""

    policy: AmortisedPolicy
    reach_weight: float
    kept: float
    origin: str = "candidate"


@dataclass(frozen=True)
class Sample:
    """The first examples in the order of the visit, n of them.

    Attributes:
        order: all positions of the pool as they are visited, shape (N,).
        features: of the sample, shape (n, P). names: of their columns.
        from_theta, from_u: losses of the sample under theta, the target model, and u, the reference model, nats, shape
            (n,); None without u.
        free: computes the features that cost nothing, of any example; None if only those of the sample are known.
        read: computes the features that take a forward pass; None if the policy uses none of them.
    """

    order: np.ndarray
    features: Floats
    names: tuple[str, ...]
    from_theta: Floats
    from_u: Floats | None
    free: FreeFeatures | None = None
    read: ReadFeatures | None = None

    def rows(self, part: slice) -> Floats:
        """The features of a part of the visit, which may extend beyond the sample if they are free."""
        if self.read is None and self.free is not None:
            return self.free.values(self.names, self.order[part])
        return self.features[part]

    @property
    def grouped(self) -> np.ndarray:
        """Mask of the columns that encode groups, bool, shape (P,)."""
        return np.array([name.startswith(GROUP) for name in self.names])


def visit_order(pool: Pool, seed: int) -> np.ndarray:
    """All positions in the order in which a pool is visited, int64, shape (N,).

    It is drawn over the ids, so that a permutation of the pool does not change it. Any prefix of it holds each source
    in proportion. Copies of one content are next to each other (see `cads.data.subsample`).
    """
    ids = by_id(pool)
    sources = strata(pool)[ids]
    # A content is numbered by its first position among the ids, not by its position in the pool.
    codes = numbered_by_first(pool.content_codes[ids])
    content_rank = np.random.default_rng(seed).permutation(int(codes.max()) + 1)[codes]
    rows = np.lexsort((content_rank, sources))
    is_first_copy = np.ones(len(ids), dtype=bool)
    is_first_copy[1:] = (np.diff(content_rank[rows]) != 0) | (np.diff(sources[rows]) != 0)
    distinct_rank = np.cumsum(is_first_copy) - 1
    source_start = distinct_rank[np.searchsorted(sources[rows], np.arange(int(sources.max()) + 1))]
    distinct = np.bincount(sources[rows], weights=is_first_copy, minlength=len(source_start))
    source_fraction = np.empty(len(ids))
    source_fraction[rows] = (distinct_rank - source_start[sources[rows]] + 0.5) / distinct[sources[rows]]
    return np.asarray(ids[np.argsort(source_fraction, kind="stable")])


def learn_from(inner: InnerLoop, parts: AmortisedBudget, kinds: Sequence[Kind], order: np.ndarray, seed: int) -> Sample:
    """Train theta on the target and u on the sample, and compute the losses of the sample under both."""
    task, positions = inner.task, order[: parts.sample]
    theta = inner.fit_target(parts.theta, seed=derive(seed, "theta"), stage="theta")
    device = inner.trainer.accelerator.device
    theta.to(device).eval()
    # The loss is the signal, whether or not it is a feature of the policy.
    signals = ReadFeatures(task, theta, device, (*kinds, "loss"))
    columns = signals.of(task.pool, positions, ledger=inner.ledger, stage="R")
    from_u = None
    if parts.u:
        order_seed = derive(seed, "reference")
        runs = inner.run([ShuffledStream(positions, order_seed)], parts.u, seed=order_seed, stage="u")
        check_reference(float(runs.objective[0]), "u", "a sample of the pool")
        from_u = inner.losses(runs.models[0], positions, stage="l*")
    free = FreeFeatures(task, task.pool, kinds)
    features, names, read = free.values(free.names, positions), tuple(free.names), None
    if parts.forward:
        read = ReadFeatures(task, theta, device, kinds)
        read_columns = columns[:, [signals.names.index(name) for name in read.names]]
        features, names = np.hstack([read_columns, features]), (*read.names, *names)
    return Sample(order, features, names, columns[:, signals.names.index(LOSS)], from_u, free, read)


def candidates(sample: Sample, steps: Sequence[tuple[float, float]]) -> list[Proposal]:
    """Policies one step along the penalty's gradient away from the uniform one, for each of `steps`.

    As in CADS-E, the length of the step leaves a share `kept` of each group with s > 1/2. The weights of the group
    columns serve for this alone. A direction in which the sample does not vary gives no policy.
    """
    proposals: list[Proposal] = []
    grouped = sample.grouped
    if grouped.all():
        return proposals
    for kept, weight in steps:
        signal = sample.from_theta if sample.from_u is None else sample.from_theta - weight * sample.from_u
        centre, scale, direction = penalty_direction(sample.features, signal)
        centre[grouped], scale[grouped], direction[grouped] = 0.0, 1.0, 0.0
        z = (sample.features - centre) / scale @ direction
        if not (deviation := float(z.std())) > 1e-9:
            continue
        slope = SHARPNESS / deviation
        weights, bias = -slope * direction, slope * float(np.quantile(z, kept))
        for i in np.flatnonzero(grouped):
            members = z[sample.features[:, i] > 0]
            weights[i] = slope * float(np.quantile(members, kept)) - bias if len(members) else 0.0
        proposals.append(Proposal(AmortisedPolicy(sample.names, centre, scale, weights, bias), weight, kept))
    return proposals


@dataclass(frozen=True)
class Penalty:
    """h(v) = c1 R(v) - c2 l*(v) on a sample, the control variate of the corrected gradient."""

    sample: Sample
    c1: float
    c2: float

    @classmethod
    def fitted(cls, sample: Sample, policies: Sequence[AmortisedPolicy], delta_objective: np.ndarray) -> Penalty:
        """The penalty with c1 and c2 fitted to `delta_objective` (shape (K,)) of policies that were tried."""
        risk = [mean_loss(p, sample.features, sample.from_theta) for p in policies]
        reach = np.zeros(len(policies))
        if sample.from_u is not None:
            reach = np.array([mean_loss(p, sample.features, sample.from_u) for p in policies])
        return cls(sample, *fit_control(delta_objective, risk, reach))

    def value(self, policy: AmortisedPolicy) -> float:
        """h, in the unit of `delta_objective`."""
        value = self.c1 * mean_loss(policy, self.sample.features, self.sample.from_theta)
        if self.sample.from_u is not None:
            value -= self.c2 * mean_loss(policy, self.sample.features, self.sample.from_u)
        return value

    def slope(self, policy: AmortisedPolicy) -> Floats:
        """The gradient of h in v, shape (P + 1,)."""
        gradient = self.c1 * mean_loss_slope(policy, self.sample.features, self.sample.from_theta)
        if self.sample.from_u is not None:
            gradient = gradient - self.c2 * mean_loss_slope(policy, self.sample.features, self.sample.from_u)
        return gradient
