"""Live penalty: the penalty form with a second model in place of l*, and a softmax over sources (ScaleBiO).

    min_{w, theta} max_u  L_val(theta) + alpha ( L_tr(theta; p) - L_tr(u; p) ),   p = softmax(w)

ScaleBiO (Pan et al., ACL 2025, arXiv 2406.19976): u is trained alongside theta on draws from p, theta on the target
and on such draws in the proportion 1 : alpha, and the weights follow
`d/dw_s = alpha p_s ( g_s - sum_j p_j g_j )`, g_s = l_s(theta) - l_s(u), l_s the mean loss in source s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import softmax
from torch import nn

from baselines.search.adam import FLOPS as ADAM_FLOPS
from baselines.search.adam import Adam
from baselines.search.source_search import SourceSearch
from cads.data.streams import WeightedStream
from cads.errors import ConfigError
from cads.policies.base import Policy
from cads.policies.mixture import MixturePolicy
from cads.scoring.pool_scores import reading_flops
from cads.search.inner_costs import InnerLoopCosts, PlannedInnerLoop
from cads.search.inner_runs import InnerLoop
from cads.search.space import SIGMA, MixtureSpace, SearchSpace
from cads.seeding import derive

RATE = 0.2
"""Adam's rate for w: over the turns a source can gain or lose a factor of exp(4) on another."""
PROBED = 32
"""Examples of each source on which l_s is measured, drawn anew in each turn: as a batch, an unbiased estimate."""
SOFTMAX_FLOPS = 10
"""Per source: exponential, sum and quotient 3, and the gradient of the weights 7."""


@dataclass
class LivePenalty(SourceSearch):
    """ScaleBiO: theta, u and the weights of the sources in turn; half of the allowance each for theta and u."""

    alpha: float = 1.0
    """Weight of the penalty."""
    rounds: int = 20
    """Turns of u, theta and w."""

    method: ClassVar[str] = "live-penalty"
    ranges_over: ClassVar[type[SearchSpace]] = MixtureSpace

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"alpha = {self.alpha}: it must be positive and finite")
        if self.rounds < 1:
            raise ConfigError(f"rounds = {self.rounds}: it must be at least 1")

    def plan_choose(self, costs: PlannedInnerLoop, space: SearchSpace, train_flops: float) -> bool:
        """Charge for all turns."""
        flops = self._turn(costs, space, train_flops)
        if not flops:
            return False
        for _ in range(self.rounds):
            for model in ("u", "theta"):
                costs.fit_target(flops, stage=model)
                costs.losses(_probed(space), stage=f"losses of {model}")
            costs.learn(self._learning(space))
        return True

    def choose(self, inner: InnerLoop, space: SearchSpace, train_flops: float, seed: int) -> tuple[np.ndarray, Policy]:
        """Turn by turn; the final ratios are the mixture."""
        most = self._turn(inner, space, train_flops)
        assert space.pool.sources is not None
        logits, adam = np.log(space.full), Adam(len(space.sizes))
        u: nn.Module | None = None
        theta: nn.Module | None = None
        for turn in range(self.rounds):
            p = softmax(logits)
            weights = space.weights(p[None])[0][space.pool.sources]
            models = []
            there = _probes(space, derive(seed, "probes", turn))
            flops = min(most, self._share(inner, space, train_flops, self.rounds - turn, there))
            for name, model, share in (("u", u, 0.0), ("theta", theta, 1 / (1 + self.alpha))):
                order = derive(seed, name, turn)
                stream = WeightedStream(weights, order)
                models.append(
                    inner.fit_target(flops, seed=order, stage=name, model=model, stream=stream, target_fraction=share)
                )
            u, theta = models
            codes = space.pool.sources[there]
            gaps = inner.losses(theta, there, stage="losses of theta") - inner.losses(u, there, stage="losses of u")
            gap = np.bincount(codes, weights=gaps) / np.bincount(codes)
            logits = logits - RATE * adam(weight_gradient(logits, gap, self.alpha))
            inner.learn(self._learning(space))
            inner.monitor.scalar("outer/gap", float(p @ gap), turn)
            inner.monitor.probabilities(space.pool.source_names, softmax(logits), turn)
        ratios = softmax(logits)
        return ratios, MixturePolicy(ratios, SIGMA)

    def _turn(self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float) -> float:
        """FLOPs for theta, and as many for u, in each turn; 0 if that is less than a step."""
        flops = self._share(costs, space, train_flops, self.rounds, _probes(space, 0))
        return flops if flops >= costs.step_flops * (1 + 1e-6) else 0.0

    def _share(
        self, costs: InnerLoopCosts, space: SearchSpace, train_flops: float, turns: int, there: np.ndarray
    ) -> float:
        """FLOPs for each of the two models in the next of `turns` turns, whose losses are measured `there`.

        Where examples differ in length so does what measuring costs, and training has to make room for it.
        """
        reading = reading_flops(costs.task.costs.forward, costs.task.pool, there)
        # Both are shares of one sum: what rounding has lost must not cost the last step of the last turn.
        return (self.available(costs, train_flops) / turns - 2 * reading - self._learning(space)) / 2 * (1 - 1e-9)

    def _learning(self, space: SearchSpace) -> float:
        return float(len(space.sizes) * (SOFTMAX_FLOPS + ADAM_FLOPS))


def _probed(space: SearchSpace) -> int:
    """How many examples l_s is measured on."""
    return int(np.minimum(space.sizes, PROBED).sum())


def _probes(space: SearchSpace, seed: int) -> np.ndarray:
    """Positions of `PROBED` random examples of each source, or of all if there are fewer; sorted."""
    order = np.random.default_rng(seed).permutation(len(space.pool))
    assert space.pool.sources is not None
    codes = space.pool.sources[order]
    return np.sort(np.concatenate([order[codes == s][:PROBED] for s in range(len(space.sizes))]))


def weight_gradient(logits: np.ndarray, gap: np.ndarray, alpha: float) -> np.ndarray:
    """Gradient of `alpha sum_s p_s g_s`, p = softmax(w), in w: shape (S,), for w (S,) and g (S,), nats."""
    p = softmax(logits)
    return np.asarray(alpha * p * (gap - p @ gap))
