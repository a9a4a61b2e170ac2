"""Successive halving over masks of sources: the baseline that a policy gradient has to beat.

The first rung trains random masks on a small share of the data and of the training budget C. After each rung a ridge
regression on sources and pairs of sources predicts the objective of all candidates. The next rung trains fewer masks,
those predicted best, on twice as much. The best mask of the last rung is returned. Every rung trains the full pool too,
and objectives are relative to it at the same fidelity. Halving is from Jamieson and Talwalkar, AISTATS 2016, arXiv
1502.07943.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.search.ridge import Ridge, pairs_flops, predict, with_pairs
from baselines.search.source_search import OVERSAMPLING, RungSearch, best_of_runs, fidelity, random_masks, train_draws
from cads.estimators.design import distinct_rows
from cads.estimators.enumeration import enumerate_masks
from cads.policies.base import Policy
from cads.policies.bernoulli import BernoulliPolicy
from cads.search.base import check_reference
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop
from cads.search.space import SearchSpace
from cads.seeding import derive

RUNGS = ((1 / 16, 16), (1 / 8, 7), (1 / 4, 4))
"""(share of C and of each source, number of masks) of each rung: 2.875 C in all."""
ENUMERATED, SAMPLED = 12, 4096
"""Up to `ENUMERATED` sources, all masks are candidates; with more sources, `SAMPLED` random masks of every size are."""


@dataclass
class Halving(RungSearch):
    """16 masks at C/16, 7 at C/8 and 4 at C/4, scaled to what the allowance buys.

    The first masks hold each source with probability 1/2. Of more than 12 sources that would be about half of them
    in every mask: there the sizes of the masks are spread from one source to all.
    """

    method: ClassVar[str] = "halving"
    default_allowance: ClassVar[float] = 3.0

    def schedule(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float, allowance: float) -> list[Rung]:
        """The rungs, each of at least two masks; the last rungs are left out if the allowance does not buy them.

        Shares that `fidelity` raises to the same minimum number of steps become one rung.
        """
        max_masks = _n_candidates(space)
        for n_rungs in range(len(RUNGS), 0, -1):
            levels = RUNGS[:n_rungs]
            total_share = sum(share * count for share, count in levels)
            rung_allowances: dict[float, float] = {}
            for share, count in levels:
                f = fidelity(costs, train_flops, share)
                rung_allowances[f] = rung_allowances.get(f, 0.0) + allowance * share * count / total_share
            rungs = [
                Rung(f, f * train_flops, f, min(max_masks, int(flops / (f * train_flops + costs.measuring_flops))))
                for f, flops in rung_allowances.items()
            ]
            if all(rung.n_trials >= 2 for rung in rungs):
                return rungs
        return []

    def learning(self, space: SearchSpace, runs: int) -> float:
        """FLOPs of the regression and of its predictions for all candidates."""
        return pairs_flops(len(space.sizes), runs, _n_candidates(space))

    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """Train rung by rung, with the full pool as the first mask of each rung."""
        candidates = _candidates(space)
        draws, delta_objective, trust = np.empty((0, len(space.sizes))), np.empty(0), np.empty(0)
        masks = rung_delta = np.empty((0, 0))
        predicted = np.empty(0)
        for rung_index, rung in enumerate(self.rungs(inner, space, train_flops)):
            if rung_index == 0:
                masks = _first_masks(space, rung.n_trials, derive(seed, "masks"))
            else:
                ranked = candidates[np.argsort(predicted, kind="stable")]
                masks = distinct_rows([space.full, *ranked])[: rung.n_trials]
            runs = train_draws(inner, space, masks, rung, derive(seed, "rung", rung_index), rung.stage)
            check_reference(float(runs.objective[0]), rung.stage)
            rung_delta = runs.objective - runs.objective[0]
            draws, delta_objective = np.concatenate([draws, masks]), np.concatenate([delta_objective, rung_delta])
            trust = np.concatenate([trust, np.full(len(masks), rung.fidelity)])
            predicted = predict(Ridge(with_pairs(draws), delta_objective, trust), candidates, with_pairs)
            inner.learn(self.learning(space, len(delta_objective)))
            inner.monitor.scalar(
                "outer/best_gain", float(np.min(rung_delta, initial=0.0, where=np.isfinite(rung_delta))), rung_index
            )
        best = masks[best_of_runs(rung_delta)]
        return best, BernoulliPolicy(best)


def _n_candidates(space: SearchSpace) -> int:
    """How many masks `_candidates` gives."""
    n = len(space.sizes)
    return 2**n - 1 if n <= ENUMERATED else SAMPLED


def _candidates(space: SearchSpace) -> np.ndarray:
    """The masks whose objective is predicted, float, shape (M, S); random ones may hold duplicates."""
    n = len(space.sizes)
    if n <= ENUMERATED:
        return enumerate_masks(n)[1:].astype(np.float64)
    return _sized_masks(n, 1 + np.arange(SAMPLED) % n, np.random.default_rng(0))


def _first_masks(space: SearchSpace, count: int, seed: int) -> np.ndarray:
    """The full pool and random masks, all distinct, float, shape (K, S), K <= count; see `Halving`."""
    n = len(space.sizes)
    if n <= ENUMERATED:
        return random_masks(space, count, seed, full_first=True)
    rng, spread = np.random.default_rng(seed), np.linspace(1, n - 1, max(1, count - 1)).round().astype(np.int64)
    # Masks that were drawn before are replaced by further ones of the same sizes.
    masks = _sized_masks(n, np.tile(spread, OVERSAMPLING), rng)
    return distinct_rows([space.full, *masks])[:count]


def _sized_masks(n_sources: int, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A uniform mask of each size, float, shape (len(sizes), S)."""
    ranks = rng.random((len(sizes), n_sources)).argsort(axis=1).argsort(axis=1)
    return np.asarray(ranks < sizes[:, None], dtype=np.float64)
