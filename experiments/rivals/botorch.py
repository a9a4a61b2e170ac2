"""BoTorch: multi-fidelity Bayesian optimisation of the weights of sources, aware of what a trial costs.

A Gaussian process over ratios and fidelity (`SingleTaskMultiFidelityGP`) is fitted to all trials so far. The next trial
is the one that tells most, for its FLOPs, about the best objective at full fidelity: max-value entropy search (Takeno
et al., ICML 2020, arXiv 1901.08275). The best mixture by the posterior mean is returned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from baselines.mixture_regression import sample_mixtures
from baselines.search.source_search import fidelity
from cads.data.subsample import subsample
from cads.data.token_batches import in_id_order
from cads.policies.base import Policy
from cads.policies.mixture import MixturePolicy
from cads.search.fidelity import Rung
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop
from cads.search.space import SIGMA, SearchSpace
from cads.seeding import derive
from experiments.rivals.mixtures import TRIAL_SHARE, MixtureRival
from experiments.rivals.packages import import_package, reproducible

FIDELITIES = (1 / 4, 1 / 2, 1.0)
"""Lengths of trials as parts of C/8, or of the shortest that has 40 steps."""
FIRST = 4
"""Trials at the lowest fidelity before the first model: the natural mixture, and random ones."""
CANDIDATES = 256
"""Random mixtures among which the next trial and the result are chosen."""


@dataclass
class BoTorch(MixtureRival):
    """Trials on mixtures, each at the fidelity that tells most for its FLOPs, until the allowance is spent."""

    method: ClassVar[str] = "botorch"
    package: ClassVar[tuple[str, str] | None] = ("botorch", "botorch")

    def schedule(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float, allowance: float) -> list[Rung]:
        """The first trials, and then as many at full fidelity as the allowance buys; others are shorter, and more."""
        shares = _shares(costs, train_flops)
        first, last = (share * train_flops + costs.measuring_flops for share in (shares[0], shares[-1]))
        count = int((allowance - FIRST * first) / last)
        if count < 1:
            return []
        return [_rung(shares[0], train_flops, FIRST), _rung(shares[-1], train_flops, count)]

    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """Trial after trial; then the candidate with the least expected objective at full fidelity."""
        shares = _shares(inner, train_flops)
        random = sample_mixtures(space.full, CANDIDATES + FIRST - 1, derive(seed, "candidates"))
        mixtures = np.vstack([space.full, random[FIRST - 1 :]])
        trials = _Trials(inner, space, train_flops, derive(seed, "trials"))
        for mixture in np.vstack([space.full, random[: FIRST - 1]]):
            trials.run(mixture, shares[0])
        with reproducible(derive(seed, "surrogate")):
            while affordable := [share for share in shares if trials.price(share) <= inner.ledger.left]:
                model = _surrogate(trials)
                options = _points(mixtures, affordable, shares)
                gains = _information(model, _points(mixtures, shares[-1:], shares), options)
                prices = np.repeat([trials.price(share) for share in affordable], len(mixtures))
                chosen = int(np.argmax(gains / prices))
                trials.run(mixtures[chosen % len(mixtures)], affordable[chosen // len(mixtures)])
            model = _surrogate(trials)
            with torch.no_grad():
                expected = model.posterior(_points(mixtures, shares[-1:], shares)).mean[:, 0].numpy()
        best = np.asarray(mixtures[int(np.argmax(expected))])
        return best, MixturePolicy(best, SIGMA)


class _Trials:
    """Trials so far.

    Attributes:
        points: ratios and fidelity of each, shape (n, S + 1). values: minus the objective, shape (n,).
    """

    def __init__(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> None:
        self._inner, self._space, self._train_flops, self._seed = inner, space, train_flops, seed
        self._full = _shares(inner, train_flops)[-1]
        self.points: list[np.ndarray] = []
        self.values: list[float] = []

    def price(self, share: float) -> float:
        """FLOPs of a trial for a share of the training budget."""
        return share * self._train_flops + self._inner.measuring_flops

    def run(self, mixture: np.ndarray, share: float) -> None:
        """Train on a mixture and measure; one that diverges counts as the worst so far."""
        pool, seed, rung = self._inner.task.pool, self._seed, _rung(share, self._train_flops, 1)
        positions = in_id_order(pool, subsample(pool, rung.data_fraction, derive(seed, "subsample")))
        stream = self._space.stream(mixture, positions, seed)
        objective = float(self._inner.run([stream], rung.flops, seed=seed, stage=rung.stage).objective[0])
        self.points.append(np.append(mixture, share / self._full))
        self.values.append(-objective if np.isfinite(objective) else min(self.values, default=0.0))


def _shares(costs: InnerLoopCosts, train_flops: float) -> list[float]:
    """The lengths of trials as shares of the training budget, shortest first."""
    full = fidelity(costs, train_flops, TRIAL_SHARE)
    return sorted({fidelity(costs, train_flops, part * full) for part in FIDELITIES})


def _rung(share: float, train_flops: float, n_trials: int) -> Rung:
    return Rung(share, share * train_flops, share, n_trials)


def _points(mixtures: np.ndarray, wanted: list[float], shares: list[float]) -> torch.Tensor:
    """All mixtures at the first wanted share, then at the next, each with its fidelity; shape (K * M, S + 1)."""
    fidelities = np.repeat(np.array(wanted) / shares[-1], len(mixtures))
    return torch.from_numpy(np.column_stack([np.tile(mixtures, (len(wanted), 1)), fidelities]))


def _surrogate(trials: _Trials) -> Any:
    """The Gaussian process of all trials."""
    botorch, gpytorch = import_package("botorch", "botorch"), import_package("gpytorch", "gpytorch")
    points = torch.from_numpy(np.array(trials.points))
    values = torch.tensor(trials.values, dtype=torch.float64)[:, None]
    model = botorch.models.SingleTaskMultiFidelityGP(points, values, data_fidelities=[points.shape[1] - 1])
    mll = gpytorch.mlls.ExactMarginalLogLikelihood(model.likelihood, model)
    botorch.fit.fit_gpytorch_mll(mll)
    return model


def _information(model: Any, at_full: torch.Tensor, options: torch.Tensor) -> np.ndarray:
    """What a trial at each option tells about the best value at full fidelity, nats, shape (n,)."""
    search = import_package("botorch.acquisition.max_value_entropy_search", "botorch")

    def project(points: torch.Tensor) -> torch.Tensor:
        return torch.cat([points[..., :-1], torch.ones_like(points[..., -1:])], dim=-1)

    with torch.no_grad():
        acquisition = search.qMultiFidelityMaxValueEntropy(model, at_full, project=project)
        return np.asarray(acquisition(options[:, None]).numpy())
