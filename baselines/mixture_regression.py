"""Mixture regression: trials on random mixtures, a regression on their ratios, and the best predicted mixture.

RegMix (Liu et al., ICLR 2025, arXiv 2407.01492) trains many small models on mixtures from Dirichlet distributions
around the sizes of the sources, regresses the objective on the ratios, predicts the objective of many more mixtures
and averages the best of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from baselines.search.ridge import Ridge, n_paired_columns, predict, with_pairs
from baselines.search.source_search import RungSearch, fidelity, train_draws
from cads.accounting.operations import regression_flops
from cads.errors import ConfigError
from cads.policies.base import Policy
from cads.policies.mixture import MixturePolicy
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop
from cads.search.space import SIGMA, MixtureSpace, SearchSpace
from cads.seeding import derive

SHARE = 1 / 16
"""Share of the training budget C, and of each source, that every trial uses."""
STRENGTHS = (0.1, 5.0)
"""Range of the Dirichlet's total concentration, as in RegMix: from nearly one source alone to nearly uniform."""
CANDIDATES, AVERAGED = 8192, 32
"""Mixtures whose objective is predicted, and how many of the best are averaged into the result."""
MIN_RUNS = 3
"""Fewest trials that a regression is fitted to."""


@dataclass
class MixtureRegression(RungSearch):
    """RegMix: as many trials at C/16 on random mixtures as the allowance buys."""

    regression: Literal["linear", "pairs"] = "pairs"
    """linear: on the ratios; pairs: on the ratios and their pairwise products, up to 128 sources."""

    method: ClassVar[str] = "mixture-regression"
    ranges_over: ClassVar[type[SearchSpace]] = MixtureSpace

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.regression not in ("linear", "pairs"):
            raise ConfigError(f"regression = {self.regression!r}: choose from ['linear', 'pairs']")

    def schedule(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float, allowance: float) -> list[Rung]:
        """One rung of mixtures."""
        share = fidelity(costs, train_flops, SHARE)
        runs = int(allowance / (share * train_flops + costs.measuring_flops))
        return [Rung(share, share * train_flops, share, runs)] if runs >= MIN_RUNS else []

    def learning(self, space: SearchSpace, runs: int) -> float:
        """FLOPs of the regression and of its predictions for all candidates."""
        n = len(space.sizes)
        columns = float(n if self.regression == "linear" else n_paired_columns(n))
        return regression_flops(runs, columns) + 3 * CANDIDATES * columns

    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """Train on the mixtures, regress, predict."""
        (rung,) = self.rungs(inner, space, train_flops)
        mixtures = sample_mixtures(space.full, rung.n_trials, derive(seed, "mixtures"))
        runs = train_draws(inner, space, mixtures, rung, derive(seed, "runs"), rung.stage)
        inner.learn(self.learning(space, rung.n_trials))
        best = space.full
        if np.isfinite(runs.objective).sum() >= MIN_RUNS:
            candidates = sample_mixtures(space.full, CANDIDATES, derive(seed, "candidates"))
            best = self.best_predicted(mixtures, runs.objective, candidates)
        return best, MixturePolicy(best, SIGMA)

    def best_predicted(self, mixtures: np.ndarray, objective: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """The mean of the candidates with the least predicted objective, shape (S,).

        Args:
            mixtures: ratios that were trained on, shape (K, S). objective: their measured objectives, shape (K,).
            candidates: ratios, shape (M, S).
        """
        features = with_pairs if self.regression == "pairs" else np.asarray
        predicted = predict(Ridge(features(mixtures), objective), candidates, features)
        return np.asarray(candidates[np.argsort(predicted, kind="stable")[:AVERAGED]].mean(axis=0))


def sample_mixtures(proportions: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Ratios from Dirichlet distributions with mean `proportions` (S,) and log-uniform strength, shape (count, S)."""
    rng = np.random.default_rng(seed)
    min_strength, max_strength = STRENGTHS
    strengths = np.exp(rng.uniform(math.log(min_strength), math.log(max_strength), count))
    # Gamma draws with small shape parameters underflow to 0: the tiny constant keeps their sum above 0.
    gammas = rng.gamma(strengths[:, None] * proportions) + np.finfo(float).tiny
    return np.asarray(gammas / gammas.sum(axis=1, keepdims=True))
