"""Gradients of E_{m ~ p(.; s)} [ F(m) ] in s: score-function estimators, with and without a control variate.

The estimators are checked against exact references: `expected` and `expected_gradient` of
`cads.estimators.enumeration`, and `expected_mean` of `cads.estimators.rao_blackwell`. Where masks are few,
`expected_gradient` is also the gradient of the control variate.

Notation: K draws, n items, and s the inclusion probabilities. F_k = F(m_k) is the value of draw k (any unit; nats for
losses). score_k is the gradient of log p(m_k; s) in s, shape (n,) (`cads.policies.base.Policy.score`). Gradients have
shape (n,) and the unit of F.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from cads.errors import ConfigError
from cads.policies.simplex import Floats, finite_array

Baseline = Literal["loo", "mean", "none"]


def direct(values: ArrayLike, scores: ArrayLike, baseline: Baseline = "loo") -> Floats:
    """Score-function estimate of grad_s E[F]: 1/K sum_k (F_k - b_k) score_k.

    - "none": b_k = 0. Unbiased (REINFORCE, Williams 1992).
    - "loo": b_k = mean_{j != k} F_j. Unbiased, K >= 2 (Kool et al. 2019); the direct estimator of CADS
      (arXiv 2510.16806) and PBCS with its factor 1/(K - 1).
    - "mean": b_k = mean_j F_j. Biased: its expectation is (K - 1)/K times the gradient, exactly.

    Args:
        values: F, shape (K,).
        scores: shape (K, n).
        baseline: what is subtracted from each value.

    Raises:
        ConfigError: if shapes disagree, a number is not finite, or there are too few draws.
    """
    f = finite_array("values", values, 1)
    score = finite_array("scores", scores, 2)
    if f.size != len(score):
        raise ConfigError(f"{f.size} values but {len(score)} rows of scores: one value a draw is needed")
    if baseline == "none":
        return f @ score / f.size
    if baseline == "mean":
        return (f - f.mean()) @ score / f.size
    if baseline != "loo":
        raise ConfigError(f"baseline is 'loo', 'mean' or 'none', got {baseline!r}")
    if f.size < 2:
        raise ConfigError("the leave-one-out baseline needs at least 2 draws, got 1: draw more or use 'none'")
    # F_k - mean_{j != k} F_j = K/(K - 1) (F_k - mean F).
    return (f - f.mean()) @ score / (f.size - 1)


def penalty(
    training_losses: ArrayLike,
    reachable: ArrayLike,
    scores: ArrayLike,
    alpha: float,
    baseline: Baseline = "loo",
) -> Floats:
    """Gradient of the penalty in s: alpha E[ (R(m) - l*_C(m)) score ] (CADS, arXiv 2510.16806).

    Unbiased for the gradient of alpha E[R - l*] at fixed model parameters, up to the baseline (see `direct`).
    As a gradient of the validation loss after training it is biased by all that the penalty does not measure.

    Args:
        training_losses: R_k = L_tr(theta; m_k), the training loss at parameters theta, shape (K,), nats.
        reachable: l*_C(m_k), the training loss that the budget can reach, shape (K,), nats.
        scores: shape (K, n).
        alpha: weight of the penalty.
        baseline: see `direct`.

    Raises:
        ConfigError: as `direct`, or if `alpha` is not finite.
    """
    r = finite_array("training_losses", training_losses, 1)
    if not np.isfinite(alpha):
        raise ConfigError(f"alpha must be finite, got {alpha}")
    return alpha * direct(r - _like("reachable", reachable, r), scores, baseline)


def corrected(
    values: ArrayLike,
    control: ArrayLike,
    control_gradient: ArrayLike,
    scores: ArrayLike,
    baseline: Baseline = "loo",
) -> Floats:
    """Direct estimate with a control variate: 1/K sum_k (F_k - h_k - b_k) score_k + grad_s E[h].

    Unbiased for grad_s E[F] with baseline "loo" or "none" if the draws are independent draws from the policy, for any
    h fixed independently of them, such as one fitted to other draws (with "mean", the first term alone shrinks by
    (K - 1)/K). Draws that are chosen, or an h that is fitted to these draws, make it biased. Its variance is that of
    `direct` on F - h, so it falls as h = c1 R - c2 l* follows F: the penalty of CADS (arXiv 2510.16806) as a control
    variate of the true bilevel objective.

    Args:
        values: F, shape (K,).
        control: h(m_k), shape (K,).
        control_gradient: grad_s E[h], shape (n,), from `rao_blackwell` or `expected_gradient`.
        scores: shape (K, n).
        baseline: see `direct`.

    Raises:
        ConfigError: if shapes disagree, a number is not finite, or there are too few draws.
    """
    f = finite_array("values", values, 1)
    estimate = direct(f - _like("control", control, f), scores, baseline)
    return estimate + _like("control_gradient", control_gradient, estimate)


def _like(name: str, values: ArrayLike, reference: Floats) -> Floats:
    """`values` as a finite float64 array, checked to have the shape of `reference`."""
    array = finite_array(name, values, reference.ndim)
    if array.shape != reference.shape:
        raise ConfigError(f"{name} has shape {array.shape}, expected {reference.shape}")
    return array
