"""From a policy over sources to the choice of what to train on."""

from __future__ import annotations

import numpy as np

from cads.errors import ConfigError
from cads.policies.base import Policy
from cads.policies.bernoulli import BernoulliPolicy
from cads.policies.mixture import MixturePolicy
from cads.search.choice import Choice
from cads.search.space import SearchSpace

WEIGHT_DIGITS = 12
"""Decimals in which relative weights of examples must differ for training to draw by them."""


def nonempty(draws: np.ndarray) -> np.ndarray:
    """The draws that select at least one source: the policy is conditioned on that."""
    return draws[draws.any(axis=1)]


def source_marginals(policy: Policy) -> np.ndarray:
    """The probability, or mean ratio, of each source, shape (S,)."""
    if isinstance(policy, BernoulliPolicy):
        return policy.probabilities
    if isinstance(policy, MixturePolicy):
        return policy.means
    raise ConfigError(f"{type(policy).__name__} is no policy over sources")


def source_choice(space: SearchSpace, draw: np.ndarray, policy: Policy, notes: dict[str, object]) -> Choice:
    """The choice to train on `draw` (shape (S,)); the score of an example is the probability of its source."""
    pool = space.pool
    assert pool.sources is not None
    marginals = source_marginals(policy)
    weights = space.weights(draw[None])[0]
    # Equal weights may differ in their last bits, as quotients of ratios and sizes.
    relative = np.round(weights / weights.max(), WEIGHT_DIGITS)
    return Choice(
        selected=(relative > 0)[pool.sources],
        score=marginals[pool.sources],
        probability=(weights / weights.max())[pool.sources],
        weighted=not np.isin(relative, (0, 1)).all(),
        source_probability=dict(zip(pool.source_names, marginals.tolist(), strict=True)),
        notes=notes,
    )
