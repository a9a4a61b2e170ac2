"""Groups of the pool by how much examples look like the target: a prior of the policy, where sources do not tell.

Numbers describe each example (`Task.descriptors`); no model computes them. Those of images are centred within the group
of the example (its class), standardised and clipped. The direction that tells target from pool best is that of Fisher's
linear discriminant (1936), here for descriptors and their squares, with a ridge:

    d = ( Sigma + ridge I )^-1 ( mean_T x - mean_P x )

Those of texts are the shares x_v of their tokens. There d is that of naive Bayes, as in data selection by importance
resampling (Xie et al. 2023), with both distributions smoothed towards that of target and pool together:

    d_v = log( p_T(v) / p_P(v) )

The pool is cut along d into B = `N_GROUPS` groups of equal size. Of n examples of the target t_b fall into group b,
each by a direction that was fitted without it. A direction of texts has thousands of entries, and so it fits the pool,
too: there the pool is divided as the target is, and each text is ranked among those of its fold, by a direction that
was fitted without them. If the target looks like the pool, that is n / B for each group, but for
chance. So the ratio is shrunk towards 1, as by the positive-part rule of James and Stein (1961), but twice as wary:

    r_b = 1 + max( 0, 1 - 2 (B - 1) / chi^2 ) ( t_b B / n - 1 ),     chi^2 = sum_b ( t_b - n / B )^2 / ( n / B )

r_b estimates how much likelier an example is in the target than in the pool. min(1, r_b) is the weight of the group:
what the target lacks is drawn less, and what it has much of is not repeated for that. Texts weigh at least `LEAST`:
they teach the language even where they are about something else. Classes count by their shares in what is drawn, so
that a class that the pool has little of does not count as unlike.

Texts of groups of weight 1 may be of the target's kind (`cads.selectors.online.nearest`). Those that are form one more
group, `NEAR`, of weight 1.

Examples of the target that score higher than the whole pool say that the pool has nothing like them, and nothing about
its groups. What is not such an example is a share c of the target. `min(1, c / COVERED)` is a further factor of the
trust in r_b: where the whole target lies beyond the pool, all of the pool weighs the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cads.data.draws import draw
from cads.data.pool import Pool
from cads.data.token_batches import by_id
from cads.runtime.checkpoint import State
from cads.runtime.processes import active_group
from cads.seeding import derive
from cads.selectors.online.nearest import MOST, Nearness, nearness_flops
from cads.selectors.online.strata import Strata
from cads.task import Task

LIKENESS = "likeness to the target"
"""Stage of the ledger."""
N_GROUPS = 6
NEAR = N_GROUPS
"""Code of texts of the target's kind, whatever their group."""
SAMPLE = 1000
"""Examples of the pool from which moments and the direction are computed."""
MOST_TARGET = 4096
"""Examples of the target that are compared, at most."""
FOLDS = 5
CAUTION = 2.0
"""By how much chi^2 must exceed what chance gives before any ratio is believed; 1 is the rule of James and Stein."""
RIDGE = 0.3
"""Relative to the mean variance of a descriptor."""
CLIP = 3.0
"""Standard deviations."""
PSEUDO = 5.0
"""Examples by which the mean of a group is shrunk to that of all."""
SMOOTHING = 25.0
"""Texts by which the tokens of target and pool are smoothed."""
LEAST = 0.3
"""The least weight of texts."""
COVERED = 0.95
"""Share of the target within the range of the pool from which the pool is taken to cover it."""
UNLIKE = 0.5
"""Weight of a group below which its texts are unlike the target."""
BEYOND = 0.5
"""Where less than this is covered, all of the pool is unlike the target."""
CHUNK = 4096
"""Examples that are described at once, at most."""
CHUNK_VALUES = 2**21
"""Descriptors that are computed at once, at most."""


@dataclass(frozen=True)
class Likeness:
    """Groups of the pool along the direction that tells it from the target.

    Attributes:
        codes: group of each example, uint8, shape (N,), from the least to the most like the target; then `NEAR`.
        weights: of the groups, in [0, 1], the largest 1; shape (B,), (B + 1,) with `NEAR`.
    """

    codes: np.ndarray
    weights: np.ndarray


def likeness(task: Task, strata: Strata, seed: int, *, near: bool = False) -> Likeness | None:
    """Groups of the pool of `task` and their weights; None if target and pool look alike. The same in all processes.

    Args:
        near: whether texts of the target's kind form a group.
    """
    state = active_group().broadcast(lambda: _fitted(task, strata, seed, near))
    if not state.tensors:
        return None
    return Likeness(*(state.tensors[name].numpy() for name in ("codes", "weights")))


def likeness_flops(task: Task, *, near: bool = False) -> float:
    """FLOPs of `likeness`: descriptors, and two for each multiplication with a direction; 0 without descriptors."""
    if not task.descriptor_flops:
        return 0.0
    n, n_target, sample = len(task.pool), min(MOST_TARGET, len(task.target)), min(SAMPLE, len(task.pool))
    width = _features(task).width(task)
    # The sample is described twice.
    prepared = (n + sample + n_target) * task.descriptor_flops
    fitted = _features(task).fitting_flops(width, n, n_target, sample)
    of_near = 0.0
    if near:
        of_near = min(MOST, n_target) * task.descriptor_flops
        of_near += nearness_flops(n + sample, n_target, task.costs.tokens_per_example(task.pool))
    return prepared + fitted + of_near + 2 * width * (n + n_target)


def _fitted(task: Task, strata: Strata, seed: int, near: bool) -> State:
    """Codes and weights; nothing if all examples weigh the same and none is `NEAR`."""
    pool, target = task.pool, task.target
    sample = np.sort(draw(pool, SAMPLE, derive(seed, "likeness")))
    groups, importance = strata.groups[sample], strata.importance[sample]
    if len(target) < 2 or not importance.any():
        return State({}, {})
    raw = task.descriptors(pool, sample)
    features = _features(task)(raw, groups, strata.n_groups, importance)
    x, compared = features(raw, groups), np.sort(draw(target, MOST_TARGET, derive(seed, "likeness target")))
    target_groups = task.loss_groups(target)
    y = features(task.descriptors(target, compared), compared * 0 if target_groups is None else target_groups[compared])
    rng = np.random.default_rng((seed, len(compared)))
    folds = rng.permutation(len(compared)) % FOLDS
    # The fold of each example of the pool; `FOLDS`: it is ranked by the direction that is fitted to all.
    pool_folds = _folds_of_contents(pool, rng) if features.divides else np.full(len(pool), FOLDS, dtype=np.uint8)
    ours = pool_folds[sample]
    if features.divides and len(np.unique(ours)) < FOLDS:
        return State({}, {})
    parts = [folds != k for k in range(FOLDS)] + [folds >= 0] * (not features.divides)
    directions = features.directions(x, importance, ours, y, parts)
    ranking = _Ranking(x, importance, directions, ours if features.divides else None)
    ranks = ranking.ranks(y, folds)
    covered = min(1.0, float((ranks < 1).mean()) / COVERED)
    counts = np.bincount(_codes(ranks), minlength=N_GROUPS)
    weights = shrunk_ratios(counts, covered).clip(min=features.least)
    # Copies would be near to each other.
    nearest = _distinct(target, np.sort(draw(target, MOST, derive(seed, "nearest")))) if near else compared[:0]
    if (weights == 1).all() and len(nearest) < 2:
        return State({}, {})
    nearness = None
    if len(nearest) > 1:
        unlike = (weights[_codes(ranking.ranks(x, ours))] < UNLIKE) | (covered < BEYOND)
        nearness, weights = Nearness(task.descriptors(target, nearest), raw, unlike), np.append(weights, 1.0)
    codes = np.empty(len(pool), dtype=np.uint8)
    chunk = max(1, min(CHUNK, CHUNK_VALUES // task.n_descriptors))
    for start in range(0, len(pool), chunk):
        rows = np.arange(start, min(start + chunk, len(pool)))
        described = task.descriptors(pool, rows)
        codes[rows] = _codes(ranking.ranks(features(described, strata.groups[rows]), pool_folds[rows]))
        if nearness is not None:
            candidates = weights[codes[rows]] == 1
            codes[rows[candidates][nearness.passes(described[candidates])]] = NEAR
    if (weights == 1).all() and not (codes == NEAR).any():
        return State({}, {})
    return State({}, {"codes": torch.from_numpy(codes), "weights": torch.from_numpy(weights)})


def _distinct(pool: Pool, positions: np.ndarray) -> np.ndarray:
    """One of each set of copies among these positions (ascending), shape (m,)."""
    _, first = np.unique(pool.code_contents()[positions], return_index=True)
    return np.sort(positions[first])


def _folds_of_contents(pool: Pool, rng: np.random.Generator) -> np.ndarray:
    """A fold for each example, the same for copies and whatever the order of the files; uint8, shape (N,)."""
    codes = pool.code_contents()
    _, first = np.unique(codes[by_id(pool)], return_index=True)
    folds = np.empty(len(first), dtype=np.uint8)
    folds[np.argsort(first)] = rng.permutation(len(first)) % FOLDS
    return folds[codes]


class _Looks:
    """Descriptors of images as they are compared: centred by group, standardised, clipped, and with their squares."""

    least, divides = 0.0, False

    def __init__(self, x: np.ndarray, groups: np.ndarray, n_groups: int, importance: np.ndarray) -> None:
        counts = np.bincount(groups, minlength=n_groups)
        sums = np.zeros((n_groups, x.shape[1]))
        np.add.at(sums, groups, x)
        self._means = (sums + PSEUDO * x.mean(axis=0)) / (counts + PSEUDO)[:, None]
        centred = x - self._means[groups]
        self._deviation = np.sqrt(np.average(centred**2, axis=0, weights=importance)) + 1e-6

    @staticmethod
    def width(task: Task) -> int:
        """Numbers that are compared."""
        return 2 * task.n_descriptors

    @staticmethod
    def fitting_flops(width: int, n: int, n_target: int, sample: int) -> float:
        """FLOPs of preparing all examples, of all directions and of ranking the `sample` by each."""
        fitted = 2 * sample * width**2 + 2 / 3 * width**3 + 2 * (FOLDS + 1) * width**2
        return 3 * (n + n_target) * width + fitted + 2 * FOLDS * sample * width

    def __call__(self, x: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Of examples with descriptors `x`, shape (n, D) -> (n, 2 D)."""
        z = np.clip((x - self._means[groups]) / self._deviation, -CLIP, CLIP)
        return np.concatenate([z, z**2], axis=1)

    def directions(
        self, x: np.ndarray, importance: np.ndarray, folds: np.ndarray, y: np.ndarray, parts: Sequence[np.ndarray]
    ) -> np.ndarray:
        """Fisher's discriminant for each part of the target `y` (masks) and all of `x`, shape (K, 2 D)."""
        mean = np.average(x, axis=0, weights=importance)
        covariance = np.atleast_2d(np.cov(x.T, aweights=importance, bias=True))
        scale = float(np.trace(covariance)) / len(covariance)
        ridged = covariance + (RIDGE * scale + 1e-12) * np.eye(len(covariance))
        means = np.stack([y[part].mean(axis=0) for part in parts])
        return np.asarray(np.linalg.solve(ridged, (means - mean).T).T)


class _Tokens:
    """Shares of tokens, which are compared as they are."""

    least, divides = LEAST, True

    def __init__(self, *_: object) -> None: ...

    @staticmethod
    def width(task: Task) -> int:
        """Numbers that are compared."""
        return task.n_descriptors

    @staticmethod
    def fitting_flops(width: int, n: int, n_target: int, sample: int) -> float:
        """FLOPs of all directions, sums, then 12 a number; and of ranking the `sample`, for scales and once more."""
        return width * (FOLDS * (n_target + sample + 12) + 4 * sample)

    def __call__(self, x: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Of examples with descriptors `x`, shape (n, D) -> (n, D)."""
        return x

    @staticmethod
    def directions(
        x: np.ndarray, importance: np.ndarray, folds: np.ndarray, y: np.ndarray, parts: Sequence[np.ndarray]
    ) -> np.ndarray:
        """The log ratios of naive Bayes, shape (K, D): number k for part k of the target `y` (masks), without fold k
        of the pool."""
        rows = []
        for k, part in enumerate(parts):
            others = folds != k
            n = int(others.sum())
            of_pool = np.average(x[others], axis=0, weights=importance[others]) * n
            of_target, n_target = y[part].sum(axis=0, dtype=np.float64), int(part.sum())
            # A token that neither has is as likely in both.
            both = of_pool + of_target + SMOOTHING / x.shape[1]
            prior = SMOOTHING * both / both.sum()
            shares = [(sums + prior) / (size + SMOOTHING) for sums, size in ((of_target, n_target), (of_pool, n))]
            rows.append(np.log(shares[0] / shares[1]))
        return np.stack(rows)


def _features(task: Task) -> type[_Looks | _Tokens]:
    return _Tokens if task.bags else _Looks


class _Ranking:
    """The share of the pool with a lower score, as a sample of it has it, in [0, 1], by each of some directions.

    Args:
        x: the sample, shape (n, D). importance: of each, shape (n,). directions: shape (K, D).
        folds: of the sample, shape (n,): direction k ranks among fold k; None: each ranks among all.
    """

    def __init__(self, x: np.ndarray, importance: np.ndarray, directions: np.ndarray, folds: np.ndarray | None) -> None:
        self._directions = directions
        self._scales: list[tuple[np.ndarray, np.ndarray]] = []
        for k, direction in enumerate(directions):
            among = slice(None) if folds is None else folds == k
            scores = x[among] @ direction
            order = np.argsort(scores, kind="stable")
            below = np.cumsum(importance[among][order])
            self._scales.append((scores[order], below / below[-1]))

    def ranks(self, x: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Of examples, shape (n, D), each by the direction of this number, shape (n,)."""
        ranks = np.empty(len(x))
        for k in np.unique(which).tolist():
            ranks[which == k] = np.interp(x[which == k] @ self._directions[k], *self._scales[k])
        return ranks


def _codes(ranks: np.ndarray) -> np.ndarray:
    return np.minimum((ranks * N_GROUPS).astype(np.int64), N_GROUPS - 1)


def shrunk_ratios(counts: np.ndarray, covered: float = 1.0) -> np.ndarray:
    """min(1, r_b) for t_b = `counts`, divided by the largest; shape (B,). covered: a further factor of the trust."""
    expected = counts.sum() / len(counts)
    chi2 = float(((counts - expected) ** 2).sum() / expected)
    trust = covered * max(0.0, 1 - CAUTION * (len(counts) - 1) / chi2) if chi2 else 0.0
    weights = np.clip(1 + trust * (counts / expected - 1), 0.0, 1.0)
    return np.asarray(weights / weights.max())
