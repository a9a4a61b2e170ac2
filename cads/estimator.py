"""Gradients of E_{m ~ p(.; s)} [ F(m) ] in s: score-function estimators, exact means, control variates.

`expected`, `expected_gradient` and `expected_mean` are exact: the references that the estimators are checked against,
and `expected_gradient` is that of the control variate where masks are few.

Letters, throughout: K draws, n items, F_k = F(m_k) the value of draw k (any unit; nats for losses), score_k
the gradient of log p(m_k; s) in s, shape (n,) (`cads.policy.Policy.score`), s the inclusion probabilities.
Gradients have shape (n,) and the unit of F.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from cads.errors import ConfigError
from cads.policy import Floats, finite_array

Baseline = Literal["loo", "mean", "none"]

MAX_ENUMERATED = 16
"""Items whose 2^n masks are still enumerated."""

LEGENDRE_NODES = 32
"""Nodes for integrands like exp(-40 x) on [0, 1], which 32 resolve to rounding."""

DECAYS = 40.0
"""An integrand that decays like exp(-x) is cut at x = 40: exp(-40) is below rounding."""

TRAPEZOID_STEP = 0.1
"""Step of the double-exponential rule: 0.3 leaves errors of 1e-13, and items are few where weights differ."""


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
    As a gradient of the validation loss after training it is biased by whatever the penalty does not see.

    Args:
        training_losses: R_k = L_tr(theta; m_k), shape (K,), nats.
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


def expected_mean(values: ArrayLike, s: ArrayLike, weights: ArrayLike | None = None, empty: float = 0.0) -> float:
    """Exact E_m[R(m)] of R(m) = sum_i m_i a_i l_i / sum_i m_i a_i, R(no item) = `empty`, m ~ Bernoulli(s).

    The reference for `rao_blackwell`, whose integral it is.

    From 1/x = int_0^inf exp(-x u) du, with e_i = exp(-a_i u), q_i = 1 - s_i + s_i e_i = E[exp(-a_i m_i u)]
    and Q = prod_i q_i: E[R] = int Q sum_i s_i a_i l_i e_i / q_i du + empty prod_i (1 - s_i).

    Args:
        values: l, the mean loss of each item, shape (n,), nats.
        s: inclusion probabilities, shape (n,).
        weights: a, examples in each item (sources of unequal size), shape (n,), > 0; None for all equal.
        empty: the value of the mask that selects nothing.

    Raises:
        ConfigError: if shapes disagree or a number is outside its range.
    """
    return _mean_and_gradient(values, s, weights, empty)[0]


def rao_blackwell(
    values: ArrayLike,
    s: ArrayLike,
    weights: ArrayLike | None = None,
    empty: float = 0.0,
    method: Literal["exact", "leading"] = "exact",
) -> Floats:
    """Gradient in s of E_m[R(m)], R as in `expected_mean`, without draws: shape (n,), nats.

    - "exact": E[R | m_i = 1] - E[R | m_i = 0], which with the letters of `expected_mean` is
      int Q/q_i [ a_i l_i e_i - (1 - e_i) sum_{j != i} s_j a_j l_j e_j / q_j ] du
      - empty prod_{j != i} (1 - s_j). For equal weights and t = exp(-u) that is
      l_i int P_{-i} dt - sum_{j != i} l_j s_j int (1 - t) P_{-ij} dt - empty P_{-i}(0), t in [0, 1], with
      P(t) = prod (1 - s + s t) the generating function of the number selected. No bias beyond rounding;
      O(n) memory, O(n) time a node.
    - "leading": a_i (l_i - R) / sum(a s), R = sum(a s l) / sum(a s): CADS-E's per-example signal (arXiv
      2510.16806). Its relative bias is O(1/sum(s)), and it ignores `empty`.

    Args:
        values: l, shape (n,), nats.
        s: shape (n,).
        weights: a, shape (n,), > 0; None for all equal.
        empty: the value of the mask that selects nothing.
        method: which of the two.

    Raises:
        ConfigError: as `expected_mean`; for "leading" also if all of s is 0.
    """
    if method == "exact":
        return _mean_and_gradient(values, s, weights, empty)[1]
    if method != "leading":
        raise ConfigError(f"method is 'exact' or 'leading', got {method!r}")
    losses, inclusion, a = _items(values, s, weights)
    total = (a * inclusion).sum()
    if total == 0:
        raise ConfigError("the leading order needs an expected size above 0, but s is 0 throughout")
    return a * (losses - (a * inclusion) @ losses / total) / total


def enumerate_masks(n: int) -> NDArray[np.bool_]:
    """All masks of n items, bool (2^n, n): item i is selected in row r if bit i of r is set.

    Raises:
        ConfigError: if n is not within 1..16.
    """
    if not 1 <= n <= MAX_ENUMERATED:
        raise ConfigError(f"enumeration is for 1 to {MAX_ENUMERATED} items, got {n}: sample masks instead")
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(np.bool_)


def expected(function_values: ArrayLike, s: ArrayLike) -> float:
    """Exact E_m[h(m)] = sum_m h(m) prod_i s_i^{m_i} (1 - s_i)^{1 - m_i}, the reference for all that samples masks.

    Args:
        function_values: h in the order of `enumerate_masks`, shape (2^n,).
        s: shape (n,).

    Raises:
        ConfigError: if shapes disagree, n > 16, or a number is outside its range.
    """
    h, factors, _ = _enumerated(function_values, s)
    return float(h @ factors.prod(axis=1))


def expected_gradient(values: ArrayLike, s: ArrayLike) -> Floats:
    """Exact gradient of `expected` in s: E[h | m_i = 1] - E[h | m_i = 0], shape (n,), also at s_i = 0 and 1.

    Args:
        values: h in the order of `enumerate_masks`, shape (2^n,).
        s: shape (n,).

    Raises:
        ConfigError: as `expected`.
    """
    h, factors, masks = _enumerated(values, s)
    gradient = np.empty(masks.shape[1])
    for i in range(gradient.size):
        others = np.delete(factors, i, axis=1).prod(axis=1)
        gradient[i] = h @ np.where(masks[:, i], others, -others)
    return gradient


def corrected(
    values: ArrayLike,
    control: ArrayLike,
    control_gradient: ArrayLike,
    scores: ArrayLike,
    baseline: Baseline = "loo",
) -> Floats:
    """Direct estimate with a control variate: 1/K sum_k (F_k - h_k - b_k) score_k + grad_s E[h].

    Unbiased for grad_s E[F] with baseline "loo" or "none", for any h fixed independently of these draws (with
    "mean", the first term alone shrinks by (K - 1)/K). Its variance is that of `direct` on F - h, so it falls
    as h = c1 R - c2 l* follows F: the penalty of CADS (arXiv 2510.16806) as a control variate of the true
    bilevel objective.

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


def fit_control(
    values: ArrayLike, training_losses: ArrayLike, reachable: ArrayLike, ridge: float = 1.0
) -> tuple[float, float]:
    """Weights (c1, c2) of the control h = c1 R - c2 l*, from triples measured so far.

    c1, c2 >= 0 minimise sum_k (F_k - a - c1 R_k + c2 l*_k)^2 over a free intercept a, with F, R and l* scaled
    to unit variance and ridge (c1^2 + c2^2) added in that scale: shrinkage like ridge / K, so that few
    triples give a timid control. Triples with a number that is not finite are dropped; an input without
    variation has weight 0. `corrected` stays unbiased only with weights from triples other than the draws it
    is given.

    Args:
        values: F, shape (K,).
        training_losses: R, shape (K,).
        reachable: l*, shape (K,).
        ridge: >= 0, in units of triples.

    Returns:
        c1 and c2, in units of F per unit of loss.

    Raises:
        ConfigError: if shapes disagree or ridge is negative or not finite.
    """
    if not (np.isfinite(ridge) and ridge >= 0):
        raise ConfigError(f"ridge must be finite and >= 0, got {ridge}")
    f, r, floor = (np.asarray(column, dtype=np.float64) for column in (values, training_losses, reachable))
    if f.ndim != 1 or f.shape != r.shape or f.shape != floor.shape:
        raise ConfigError(f"triples need three equal lengths, got {f.shape}, {r.shape}, {floor.shape}")
    triples = np.column_stack([f, r, -floor])
    triples = triples[np.isfinite(triples).all(axis=1)]
    if len(triples) < 2:
        return 0.0, 0.0
    # By the largest entry first: the variance of very large losses would overflow.
    scale = np.maximum(np.abs(triples).max(axis=0), np.finfo(float).tiny)
    deviations = triples / scale
    deviations -= deviations.mean(axis=0)
    spread = deviations.std(axis=0)
    varies = spread > 1e-12
    unit = np.where(varies, deviations, 0.0) / np.where(varies, spread, 1.0)
    design = np.vstack([unit[:, 1:], np.sqrt(ridge) * np.eye(2)])
    weights, _ = nnls(design, np.concatenate([unit[:, 0], np.zeros(2)]))
    deviation = np.where(varies, spread * scale, 1.0)
    c1, c2 = weights * deviation[0] / deviation[1:]
    return float(c1), float(c2)


def _mean_and_gradient(
    values: ArrayLike, s: ArrayLike, weights: ArrayLike | None, empty: float
) -> tuple[float, Floats]:
    """E_m[R(m)] and its gradient in s, by the integrals of `expected_mean` and `rao_blackwell`."""
    losses, inclusion, a = _items(values, s, weights)
    if not np.isfinite(empty):
        raise ConfigError(f"empty must be finite, got {empty}")
    # R + c moves with its values, so both results can be computed about the mean, where they are small: the
    # error of the quadrature is then relative to the spread of the losses.
    total = (a * inclusion).sum()
    centre = float((a * inclusion) @ losses / total) if total > 0 else 0.0
    numerators = a * (losses - centre)
    none_of_others, none = _none_selected(inclusion)
    mean = centre + (empty - centre) * none
    gradient = -(empty - centre) * none_of_others
    for u, width in _legendre(inclusion) if weights is None else _double_exponential(a):
        rise = -np.expm1(-a * u)
        e = np.exp(-a * u)
        # A factor q = 0 of Q could not be divided out again; 2^-53 is as good as 0 and can.
        fall = np.minimum(inclusion * rise, 1 - 2.0**-53)
        q = 1 - fall
        product = width * np.exp(np.log1p(-fall).sum())
        terms = inclusion * numerators * e / q
        total_terms = terms.sum()
        mean += float(product * total_terms)
        gradient += product / q * (numerators * e - rise * (total_terms - terms))
    return mean, gradient


def _legendre(s: Floats) -> Iterator[tuple[float, float]]:
    """Nodes and widths of int_0^inf du for equal weights: Gauss-Legendre in v = 1 - exp(-u) on [0, V].

    There Q = prod_i (1 - s_i v) is a polynomial below exp(-sum(s) v), so V = min(1, 40/sum(s)) loses nothing,
    and for few items the rule is exact.
    """
    nodes, widths = np.polynomial.legendre.leggauss(min(LEGENDRE_NODES, s.size // 2 + 1))
    end = min(1.0, DECAYS / max(1.0, float(s.sum())))
    for node, width in zip(nodes, widths, strict=True):
        v = end * (node + 1) / 2
        yield float(-np.log1p(-v)), float(end * width / 2 / (1 - v))


def _double_exponential(a: Floats) -> Iterator[tuple[float, float]]:
    """Nodes and widths of int_0^inf du for any weights: trapezoids in x, u = exp(x - exp(-x)) / sum(a).

    The integrand is a sum of exponentials with rates from min(a) to sum(a), all of which the rule resolves
    alike since it steps through u by factors (Takahasi and Mori 1974).
    """
    slowest = float(np.log(DECAYS * a.sum() / a.min()))
    for x in np.arange(-4.0, slowest + TRAPEZOID_STEP, TRAPEZOID_STEP):
        u = float(np.exp(x - np.exp(-x)) / a.sum())
        yield u, TRAPEZOID_STEP * u * float(1 + np.exp(-x))


def _none_selected(s: Floats) -> tuple[Floats, float]:
    """Return prod_{j != i} (1 - s_j), shape (n,), and prod_j (1 - s_j)."""
    certain = s == 1
    logs = np.log1p(-np.where(certain, 0.0, s))
    others = np.exp(logs.sum() - logs)
    if certain.sum() > 1:
        return np.zeros_like(s), 0.0
    if certain.any():
        return np.where(certain, others, 0.0), 0.0
    return others, float(np.exp(logs.sum()))


def _items(values: ArrayLike, s: ArrayLike, weights: ArrayLike | None) -> tuple[Floats, Floats, Floats]:
    losses = finite_array("values", values, 1)
    inclusion = _probabilities(s)
    _like("s", s, losses)
    # One shared weight broadcasts: no (n,) vector of ones, and one exponential a node instead of n.
    if weights is None:
        return losses, inclusion, np.ones(1)
    a = _like("weights", weights, losses)
    if a.min() <= 0:
        raise ConfigError(f"weights must be > 0, got {a.min()}: leave out sources without examples")
    return losses, inclusion, a / a.mean()


def _enumerated(values: ArrayLike, s: ArrayLike) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Return h (2^n,), the factors s_i or 1 - s_i of each mask's probability (2^n, n), and the masks."""
    inclusion = _probabilities(s)
    masks = enumerate_masks(inclusion.size)
    h = finite_array("values", values, 1)
    if h.size != len(masks):
        raise ConfigError(f"{inclusion.size} items have {len(masks)} masks, got {h.size} values")
    return h, np.where(masks, inclusion, 1 - inclusion), masks


def _probabilities(s: ArrayLike) -> Floats:
    inclusion = finite_array("s", s, 1)
    if inclusion.min() < 0 or inclusion.max() > 1:
        raise ConfigError(f"s must be in [0, 1], got {inclusion.min()} to {inclusion.max()}")
    return inclusion


def _like(name: str, values: ArrayLike, reference: Floats) -> Floats:
    array = finite_array(name, values, reference.ndim)
    if array.shape != reference.shape:
        raise ConfigError(f"{name} has shape {array.shape}, expected {reference.shape}")
    return array
