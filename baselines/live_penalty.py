"""Live penalty: the penalty form with a reference model u in place of l*, and a softmax over sources (ScaleBiO).

    min_{w, theta} max_u  L_val(theta) + alpha ( L_tr(theta; p) - L_tr(u; p) ),   p = softmax(w)

This is ScaleBiO (Pan et al., ACL 2025, arXiv 2406.19976); l* is the training loss within reach of the budget. Each
model trains once, with one warm-up, one optimizer and one decay, while the weights move after each round. The reference
model u is trained on draws from p. The target model theta is trained on the target and on draws from p in
the proportion 1 : alpha. The weights follow `d/dw_s = alpha p_s ( g_s - sum_j p_j g_j )`, where
g_s = l_s(theta) - l_s(u) and l_s is the mean loss in source s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import softmax

from baselines.search.adam import FLOPS as ADAM_FLOPS
from baselines.search.adam import Adam
from baselines.search.source_search import SourceSearch
from cads.accounting.ledger import ROUNDING
from cads.data.streams import WeightedStream
from cads.data.token_batches import by_id
from cads.errors import ConfigError, NotAffordableError
from cads.policies.base import Policy
from cads.policies.mixture import MixturePolicy
from cads.scoring.pool_scores import reading_flops
from cads.search.base import NO_SEARCH_AFFORDABLE
from cads.search.inner_costs import InnerLoopCosts
from cads.search.inner_runs import InnerLoop
from cads.search.space import SIGMA, MixtureSpace, SearchSpace
from cads.search.stages import FitTarget, ScorePool, Stages, UpdatePolicy
from cads.seeding import derive
from cads.training.result import TrainResult

RATE = 0.2
"""Adam's learning rate for w: over the default rounds a source can gain or lose a factor of exp(4) on another."""
PROBES_PER_SOURCE = 32
"""Examples of each source on which l_s is measured, drawn anew in each round: an unbiased estimate, like a batch."""
SOFTMAX_FLOPS = 10
"""FLOPs per source: 3 for exponential, sum and quotient, and 7 for the gradient of the weights."""


@dataclass
class LivePenalty(SourceSearch):
    """ScaleBiO: each round trains the reference model and the target model, for half of the allowance each, and updates
    the weights w of the sources."""

    alpha: float = 1.0
    """Weight of the penalty."""
    rounds: int = 20
    """Number of rounds, each of which updates both models and the weights."""

    method: ClassVar[str] = "live-penalty"
    ranges_over: ClassVar[type[SearchSpace]] = MixtureSpace

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"alpha = {self.alpha}: it must be positive and finite")
        if self.rounds < 1:
            raise ConfigError(f"rounds = {self.rounds}: it must be at least 1")

    def search_stages(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float) -> Stages:
        """All rounds; see `SourceSearch`."""
        flops = self._model_flops(costs, space, train_flops)
        if not flops:
            raise NotAffordableError(NO_SEARCH_AFFORDABLE)
        for _ in range(self.rounds):
            for model in ("u", "theta"):
                yield FitTarget(flops, model)
                yield ScorePool(_n_probes(space), f"losses of {model}")
            yield UpdatePolicy(self._weight_update_flops(space))

    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """Run all rounds; the final softmax of w is the mixture."""
        max_flops = self._model_flops(inner, space, train_flops)
        assert space.pool.sources is not None
        logits, adam, visited = np.log(space.full), Adam(len(space.sizes)), by_id(space.pool)
        fits: dict[str, TrainResult] = {}
        # A round has whole steps: the learning rate is at its end with the last of them.
        horizon = self.rounds * int(max_flops / inner.step_flops * ROUNDING) * inner.step_flops
        for round_index in range(self.rounds):
            p = softmax(logits)
            weights = space.weights(p[None])[0][space.pool.sources[visited]]
            probes = _probes(space, derive(seed, "probes", round_index))
            flops = min(
                max_flops, self._remaining_model_flops(inner, space, train_flops, self.rounds - round_index, probes)
            )
            for name, target_fraction in (("u", 0.0), ("theta", 1 / (1 + self.alpha))):
                order = derive(seed, name)
                fits[name] = inner.fit_on(
                    flops,
                    horizon=horizon,
                    before=fits.get(name),
                    seed=order,
                    stage=name,
                    stream=WeightedStream(weights, order, visited),
                    target_fraction=target_fraction,
                )
            source_codes = space.pool.sources[probes]
            losses = {name: inner.losses(fits[name].models[0], probes, stage=f"losses of {name}") for name in fits}
            gaps = losses["theta"] - losses["u"]
            gap = np.bincount(source_codes, weights=gaps) / np.bincount(source_codes)
            logits = logits - RATE * adam(weight_gradient(logits, gap, self.alpha))
            inner.learn(self._weight_update_flops(space))
            inner.monitor.scalar("outer/gap", float(p @ gap), round_index)
            inner.monitor.probabilities(space.pool.source_names, softmax(logits), round_index)
        ratios = softmax(logits)
        return ratios, MixturePolicy(ratios, SIGMA)

    def _model_flops(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float) -> float:
        """Planned FLOPs for each of theta and u in a round; 0 if that is less than a step."""
        flops = self._remaining_model_flops(costs, space, train_flops, self.rounds, _probes(space, 0))
        return flops if flops >= costs.step_flops * (1 + 1e-6) else 0.0

    def _remaining_model_flops(
        self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float, remaining_rounds: int, probes: np.ndarray
    ) -> float:
        """FLOPs for each of theta and u in the next of `remaining_rounds` rounds; losses are measured on `probes`.

        The cost of measuring varies with the lengths of the probes, so it is subtracted from what training may spend.
        """
        reading = reading_flops(costs.task.costs.forward, costs.task.pool, probes)
        # The last factor keeps rounding errors from costing the last step of the last round.
        round_flops = self.available(costs, train_flops) / remaining_rounds
        return (round_flops - 2 * reading - self._weight_update_flops(space)) / 2 * (1 - 1e-9)

    def _weight_update_flops(self, space: SearchSpace) -> float:
        return float(len(space.sizes) * (SOFTMAX_FLOPS + ADAM_FLOPS))


def _n_probes(space: SearchSpace) -> int:
    """How many examples the losses l_s are measured on, over all sources."""
    return int(np.minimum(space.sizes, PROBES_PER_SOURCE).sum())


def _probes(space: SearchSpace, seed: int) -> np.ndarray:
    """Positions of `PROBES_PER_SOURCE` random examples of each source, or of all if there are fewer; by id."""
    ids, order = by_id(space.pool), np.random.default_rng(seed).permutation(len(space.pool))
    assert space.pool.sources is not None
    source_codes = space.pool.sources[ids][order]
    rows = np.concatenate([order[source_codes == s][:PROBES_PER_SOURCE] for s in range(len(space.sizes))])
    return ids[np.sort(rows)]


def weight_gradient(logits: np.ndarray, gap: np.ndarray, alpha: float) -> np.ndarray:
    """Gradient of `alpha sum_s p_s g_s`, p = softmax(w), in w: shape (S,), for w (S,) and g (S,), nats."""
    p = softmax(logits)
    return np.asarray(alpha * p * (gap - p @ gap))
