"""The policy over examples that theta and u share while they train, and the riders by which they move it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cads.data.batch import Batch
from cads.data.pool import Pool
from cads.data.streams import Stream
from cads.data.token_batches import by_id
from cads.data.training_batches import joined
from cads.estimators.rao_blackwell import rao_blackwell_draws
from cads.estimators.score_function import direct
from cads.policies.annealing import annealed_size, cosine
from cads.policies.bernoulli import BernoulliPolicy
from cads.policies.simplex import Floats
from cads.policies.sized import SizedPolicy
from cads.training.rider import Rider

TRAVEL = 2.0
"""How far the probability moves in a run, of an example whose gap is always one standard deviation from the mean, if
it is seen as often as the others."""
LONGEST_STEP = 0.5
"""Most by which one draw moves a probability, where a run sees each example once or less."""
STEP_FLOPS = 36
"""FLOPs of a step for each example: the cumulative sum to draw by (1), the step (2), and the projection: about eight
evaluations of the sum of the clipped probabilities (4 each)."""
MASK_FLOPS = 7
"""FLOPs for each entry of a mask: its draw (1), its score (4), and weighting and summing it (2)."""


class Estimator(ABC):
    """Draws examples by a policy, and estimates the gradient of the penalty in s from their gaps.

    The penalty is `alpha E_m[ R(m) - l*(m) ]`, the mean of the gaps `d_i = l_i(theta) - l_i(u)` over the mask m.
    """

    @abstractmethod
    def draw(self, policy: BernoulliPolicy, count: int, n_shared: int, rng: np.random.Generator) -> np.ndarray:
        """`count` items, int64, shape (count,). The gaps of the first `n_shared` will be known."""

    @abstractmethod
    def gradient(self, policy: BernoulliPolicy, gaps: np.ndarray, alpha: float) -> Floats:
        """The gradient in s, shape (n,), from the gaps of the last draw, nats, shape (n_shared,); NaN: not known."""

    @abstractmethod
    def visits(self, n_steps: int, n_shared: int, n: int) -> float:
        """In how many of `n_steps` steps the mean item moves."""

    @abstractmethod
    def flops(self, n: int) -> float:
        """FLOPs of a step of the policy over n items."""


class RaoBlackwellised(Estimator):
    """The exact derivative at the items that were drawn, and 0 elsewhere: a step of random coordinates.

    Items are drawn in proportion to s, with replacement, so that the other draws give the mean without bias
    (`rao_blackwell_draws`). An item is visited in proportion to its s.
    """

    def __init__(self) -> None:
        self._drawn = np.empty(0, dtype=np.int64)

    def draw(self, policy: BernoulliPolicy, count: int, n_shared: int, rng: np.random.Generator) -> np.ndarray:
        """See `Estimator`."""
        cumulative = np.cumsum(policy.probabilities)
        drawn = np.searchsorted(cumulative, rng.random(count) * cumulative[-1], side="right")
        items = np.minimum(drawn, policy.n - 1)
        self._drawn = items[:n_shared]
        return items

    def gradient(self, policy: BernoulliPolicy, gaps: np.ndarray, alpha: float) -> Floats:
        """alpha (d_i - mean_j d_j) / sum(s) at each draw; see `Estimator`."""
        gradient, known = np.zeros(policy.n), np.isfinite(gaps)
        if known.sum() > 1:
            entries = alpha * rao_blackwell_draws(gaps[known], float(policy.probabilities.sum()))
            np.add.at(gradient, self._drawn[known], entries)
        return gradient

    def visits(self, n_steps: int, n_shared: int, n: int) -> float:
        """See `Estimator`."""
        return n_steps * n_shared / n

    def flops(self, n: int) -> float:
        """See `Estimator`."""
        return float(STEP_FLOPS * n)


class KDraw(Estimator):
    """The score-function estimator of K masks with a leave-one-out baseline, as in PBCS: unbiased, and noisy.

    Each mask is drawn from the policy, and its share of the batch from the mask: the mean gap of these examples is an
    unbiased estimate of `R(m) - l*(m)`. A mask without items takes the most probable one.

    Args:
        draws: K, at least 2.
    """

    def __init__(self, draws: int) -> None:
        self._k = draws
        self._masks = np.empty((0, 0), dtype=np.bool_)

    def draw(self, policy: BernoulliPolicy, count: int, n_shared: int, rng: np.random.Generator) -> np.ndarray:
        """See `Estimator`: the items of each mask, first those whose gaps will be known, then the others."""
        self._masks = policy.sample(self._k, rng)
        members = [np.flatnonzero(mask) if mask.any() else self._likeliest(policy) for mask in self._masks]
        parts = [
            members[k][rng.integers(len(members[k]), size=size)]
            for total in (n_shared, count - n_shared)
            for k, size in enumerate(_parts(total, self._k))
        ]
        return np.concatenate(parts)

    def gradient(self, policy: BernoulliPolicy, gaps: np.ndarray, alpha: float) -> Floats:
        """alpha/(K-1) sum_k (F_k - mean F) score_k, F_k the mean gap of what mask k gave; see `Estimator`."""
        groups = np.split(gaps, np.cumsum(_parts(len(gaps), self._k))[:-1])
        values = np.array([x[np.isfinite(x)].mean() if np.isfinite(x).any() else np.nan for x in groups])
        known = np.isfinite(values)
        if known.sum() < 2:
            return np.zeros(policy.n)
        return alpha * direct(values[known], policy.score(self._masks[known]))

    def visits(self, n_steps: int, n_shared: int, n: int) -> float:
        """All items move in all steps; see `Estimator`."""
        return n_steps

    def flops(self, n: int) -> float:
        """See `Estimator`."""
        return float((STEP_FLOPS + MASK_FLOPS * self._k) * n)

    @staticmethod
    def _likeliest(policy: BernoulliPolicy) -> np.ndarray:
        return np.array([np.argmax(policy.probabilities)])


def _parts(total: int, count: int) -> list[int]:
    """`total` in `count` nearly equal parts."""
    return [total // count + (k < total % count) for k in range(count)]


class LiveGap:
    """The probabilities of all examples, and what moves them: draws, and the losses of theta and u on them.

    Items are the examples in the order of their ids, so that the order of the pool changes nothing.

    Args:
        pool: whose examples are drawn.
        size: K, the expected size at the end; at the start all examples take part.
        alpha: weight of the penalty.
        estimator: of the gradient in s.
        batch_size: draws of u in a step. n_shared: the first of them, which theta takes too.
        n_steps: planned steps. flops: of both models in all of them.
        price: what training on the batches of a step costs, FLOPs.
        seed: of the draws.

    Attributes:
        policy: over items.
        gaps: of the last step, nats, shape (n_shared,).
        losses: theta's and u's mean loss there, nats.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        size: int,
        alpha: float,
        estimator: Estimator,
        batch_size: int,
        n_shared: int,
        n_steps: int,
        flops: float,
        price: Callable[[list[Batch]], float],
        seed: int,
    ) -> None:
        n = len(pool)
        self.pool, self.n_shared, self.batch_size, self.seed = pool, n_shared, batch_size, seed
        self.policy = SizedPolicy(np.ones(n), n)
        self.gaps, self.losses = np.empty(0), (np.nan, np.nan)
        self._order = by_id(pool)
        self._size, self._alpha, self._estimator = size, alpha, estimator
        self._step_length = 2 * TRAVEL / estimator.visits(n_steps, n_shared, n)
        self._flops, self._price = flops, price
        self._spent = 0.0
        self._reached = np.empty(0)

    @property
    def progress(self) -> float:
        """The share of the run that is over, from 0 to 1."""
        return min(1.0, self._spent / self._flops)

    def probabilities(self) -> Floats:
        """s in the order of the pool, shape (N,)."""
        s = np.empty(self.policy.n)
        s[self._order] = self.policy.probabilities
        return s

    def draw(self, step: int) -> np.ndarray:
        """Positions in the pool for a step, int64, shape (batch_size,)."""
        rng = np.random.default_rng((self.seed, step))
        return self._order[self._estimator.draw(self.policy, self.batch_size, self.n_shared, rng)]

    def pay(self, batches: list[Batch]) -> list[Batch]:
        """Count what training on `batches` costs; returns them."""
        self._spent += self._price(batches)
        return batches

    def reach(self, losses: np.ndarray) -> None:
        """The losses of u on the last draw, nats, shape (batch_size,)."""
        self._reached = losses[: self.n_shared]

    def learn(self, losses: np.ndarray) -> None:
        """Move the policy by the losses of theta on the first examples of the last draw, nats, shape (n_shared,)."""
        self.gaps = losses - self._reached
        self.losses = (float(losses.mean()), float(self._reached.mean()))
        gradient = self._estimator.gradient(self.policy, self.gaps, self._alpha)
        moved = gradient[gradient != 0]
        size = annealed_size(self.policy.n, self._size, self.progress)
        if not len(moved):
            self.policy.resize(size)
            return
        # The unit is the standard deviation of the gaps: their size falls as both models learn.
        gradient /= np.sqrt(np.mean(moved**2))
        self.policy.size = size
        self.policy.step(gradient, min(LONGEST_STEP, self._step_length * cosine(self.progress)))

    def settings(self) -> str:
        """What draws depend on, beside the losses."""
        settings = [self.seed, self.policy.n, self._size, self.batch_size, self.n_shared, self._alpha, self._flops]
        return f"{settings} {type(self._estimator).__name__} {self._step_length}"

    def state(self) -> dict[str, Tensor]:
        """What later draws depend on."""
        numbers = torch.tensor([self._spent, self.policy.size], dtype=torch.float64)
        return {"probabilities": torch.from_numpy(self.policy.probabilities), "numbers": numbers}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`."""
        self._spent, size = state["numbers"].tolist()
        # Projecting again could change the last bits.
        self.policy = SizedPolicy.at(state["probabilities"].numpy().copy(), size)


class ReferenceRider(Rider):
    """The batches of u: draws from the policy. Its losses stand for l*."""

    def __init__(self, live: LiveGap) -> None:
        super().__init__(live.pool, live.batch_size)
        self._live = live
        self.drawn = np.empty(0, dtype=np.int64)

    def step(self, step: int) -> list[Batch]:
        """See `Rider`."""
        self.drawn = self._live.draw(step)
        return self._live.pay([self.pool.batch(self.drawn)])

    def observe(self, losses: np.ndarray) -> None:
        """See `Rider`."""
        self._live.reach(losses)

    def ids(self, batches: list[Batch]) -> list[str]:
        """See `Rider`."""
        ids: list[str] = self.pool.ids.take(self.drawn).to_pylist()
        return ids

    def fingerprint(self) -> str:
        """See `Rider`."""
        return hashlib.sha256(self._live.settings().encode()).hexdigest()

    def state(self) -> dict[str, Tensor]:
        """See `Rider`: what both models share."""
        return self._live.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `Rider`."""
        self._live.restore(state)


class TargetRider(Rider):
    """The batches of theta: the first draws of u in the same step, and examples of the target.

    Args:
        live: shared with u. reference: u's rider.
        target: the target, of which `target_stream` gives positions.
        observed: called after each step of the policy with the number of steps so far.
    """

    def __init__(
        self,
        live: LiveGap,
        reference: ReferenceRider,
        target: Pool,
        target_stream: Stream,
        observed: Callable[[int], None],
    ) -> None:
        super().__init__(live.pool, live.batch_size)
        self._live, self._reference, self._observed = live, reference, observed
        self._targets, self._stream, self._n_target = target, target_stream, live.batch_size - live.n_shared
        self._step, self._rows = 0, np.empty(0, dtype=np.int64)

    def step(self, step: int) -> list[Batch]:
        """See `Rider`: examples of the pool come before those of the target."""
        self._step = step
        self._rows = self._stream.take(step * self._n_target, self._n_target)
        parts = [self.pool.batch(self._reference.drawn[: self._live.n_shared]), self._targets.batch(self._rows)]
        return self._live.pay(joined(parts, 1))

    def observe(self, losses: np.ndarray) -> None:
        """See `Rider`."""
        self._live.learn(losses[: self._live.n_shared])
        self._observed(self._step + 1)

    def ids(self, batches: list[Batch]) -> list[str]:
        """See `Rider`."""
        shared = self._reference.drawn[: self._live.n_shared]
        ids: list[str] = self.pool.ids.take(shared).to_pylist() + self._targets.ids.take(self._rows).to_pylist()
        return ids

    def fingerprint(self) -> str:
        """See `Rider`."""
        settings = f"{self._live.settings()} {self._stream.take(0, self._n_target).tolist()}"
        return hashlib.sha256(settings.encode()).hexdigest()

    def state(self) -> dict[str, Tensor]:
        """See `Rider`: what both models share is in the state of u's rider."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """See `Rider`."""
