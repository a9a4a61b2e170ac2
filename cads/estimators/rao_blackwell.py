"""Expected mean loss of the selected items and its gradient, without sampling (Rao-Blackwell)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from cads.errors import ConfigError
from cads.estimators.enumeration import _probabilities
from cads.estimators.score_function import _like
from cads.policies.simplex import Floats, finite_array

LEGENDRE_NODES = 32
"""Nodes of the Gauss-Legendre rule: 32 integrate exp(-40 x) on [0, 1] to rounding."""

DECAYS = 40.0
"""An integrand that decays like exp(-x) is cut at x = 40: exp(-40) is below rounding."""

TRAPEZOID_STEP = 0.1
"""Step of the double-exponential rule. Errors are 1e-13 already at 0.3; a finer step is cheap, since items are few
where weights differ."""


def expected_mean(values: ArrayLike, s: ArrayLike, weights: ArrayLike | None = None, empty: float = 0.0) -> float:
    """Exact E_m[R(m)] of R(m) = sum_i m_i a_i l_i / sum_i m_i a_i, R(no item) = `empty`, m ~ Bernoulli(s).

    The reference for `rao_blackwell`, which is its gradient.

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


def rao_blackwell(values: ArrayLike, s: ArrayLike, weights: ArrayLike | None = None, empty: float = 0.0) -> Floats:
    """Exact gradient in s of E_m[R(m)], R as in `expected_mean`, without draws: shape (n,), nats.

    It is E[R | m_i = 1] - E[R | m_i = 0], which with the letters of `expected_mean` is
    int Q/q_i [ a_i l_i e_i - (1 - e_i) sum_{j != i} s_j a_j l_j e_j / q_j ] du
    - empty prod_{j != i} (1 - s_j). For equal weights and t = exp(-u) that is
    l_i int P_{-i} dt - sum_{j != i} l_j s_j int (1 - t) P_{-ij} dt - empty P_{-i}(0), t in [0, 1], with
    P(t) = prod (1 - s + s t) the generating function of the number selected. No bias beyond rounding;
    O(n) memory, O(n) time per node.

    Args:
        values: l, the mean loss of each item, shape (n,), nats.
        s: inclusion probabilities, shape (n,).
        weights: a, examples in each item, shape (n,), > 0; None for all equal.
        empty: the value of the mask that selects nothing.

    Raises:
        ConfigError: as `expected_mean`.
    """
    return _mean_and_gradient(values, s, weights, empty)[1]


def rao_blackwell_leading(values: ArrayLike, s: ArrayLike, weights: ArrayLike | None = None) -> Floats:
    """Leading order of `rao_blackwell` for a large expected size sum(s): shape (n,), nats.

    It is a_i (l_i - R) / sum(a s) with R = sum(a s l) / sum(a s): CADS-E's per-example signal (arXiv 2510.16806).
    Its relative bias is O(1/sum(s)). The mask that selects nothing does not count.

    Args:
        values: l, the mean loss of each item, shape (n,), nats.
        s: inclusion probabilities, shape (n,).
        weights: a, examples in each item, shape (n,), > 0; None for all equal.

    Raises:
        ConfigError: as `expected_mean`, or if all of s is 0.
    """
    losses, inclusion, a = _items(values, s, weights)
    total = (a * inclusion).sum()
    if total == 0:
        raise ConfigError("the leading order needs an expected size above 0, but s is 0 throughout")
    return a * (losses - (a * inclusion) @ losses / total) / total


def rao_blackwell_draws(values: ArrayLike, total: float) -> Floats:
    """`rao_blackwell_leading` at each of B examples that were drawn in proportion to s: shape (B,), nats.

    It is (l_k - mean_{j != k} l_j) / sum(s), which needs the losses of the draws alone. The other draws have the mean
    R = sum(s l) / sum(s): given that draw k is example i, the expectation is the leading order at i, without bias.

    Args:
        values: l, the loss of each draw, shape (B,), nats.
        total: sum(s), the expected size.

    Raises:
        ConfigError: if a number is not finite, there are fewer than 2 draws, or the expected size is not above 0.
    """
    losses = finite_array("values", values, 1)
    if losses.size < 2:
        raise ConfigError("the mean over the other draws needs at least 2 draws, got 1")
    if not (np.isfinite(total) and total > 0):
        raise ConfigError(f"the expected size must be finite and above 0, got {total}")
    # l_k - mean_{j != k} l_j = B/(B - 1) (l_k - mean l).
    return (losses - losses.mean()) * (losses.size / (losses.size - 1)) / total


def _mean_and_gradient(
    values: ArrayLike, s: ArrayLike, weights: ArrayLike | None, empty: float
) -> tuple[float, Floats]:
    """E_m[R(m)] and its gradient in s, by the integrals of `expected_mean` and `rao_blackwell`."""
    losses, inclusion, a = _items(values, s, weights)
    if not np.isfinite(empty):
        raise ConfigError(f"empty must be finite, got {empty}")
    # A constant added to the losses is added to R, so both results are computed from losses centred at their mean:
    # the error of the quadrature is then relative to the spread of the losses.
    total = (a * inclusion).sum()
    centre = float((a * inclusion) @ losses / total) if total > 0 else 0.0
    numerators = a * (losses - centre)
    p_no_others, p_none = _none_selected(inclusion)
    mean = centre + (empty - centre) * p_none
    gradient = -(empty - centre) * p_no_others
    for u, width in _legendre(inclusion) if weights is None else _double_exponential(a):
        one_minus_e = -np.expm1(-a * u)
        e = np.exp(-a * u)
        # Q / q_i needs q_i > 0: 2^-53 stands for 0, the same to rounding.
        one_minus_q = np.minimum(inclusion * one_minus_e, 1 - 2.0**-53)
        q = 1 - one_minus_q
        product = width * np.exp(np.log1p(-one_minus_q).sum())
        terms = inclusion * numerators * e / q
        total_terms = terms.sum()
        mean += float(product * total_terms)
        gradient += product / q * (numerators * e - one_minus_e * (total_terms - terms))
    return mean, gradient


def _legendre(s: Floats) -> Iterator[tuple[float, float]]:
    """Nodes and widths of int_0^inf du for equal weights: Gauss-Legendre in v = 1 - exp(-u) on [0, V].

    There Q = prod_i (1 - s_i v) is a polynomial below exp(-sum(s) v), so V = min(1, 40/sum(s)) loses nothing.
    For few items the rule is exact.
    """
    nodes, widths = np.polynomial.legendre.leggauss(min(LEGENDRE_NODES, s.size // 2 + 1))
    end = min(1.0, DECAYS / max(1.0, float(s.sum())))
    for node, width in zip(nodes, widths, strict=True):
        v = end * (node + 1) / 2
        yield float(-np.log1p(-v)), float(end * width / 2 / (1 - v))


def _double_exponential(a: Floats) -> Iterator[tuple[float, float]]:
    """Nodes and widths of int_0^inf du for any weights: trapezoids in x, u = exp(x - exp(-x)) / sum(a).

    The integrand is a sum of exponentials with rates from min(a) to sum(a). The rule resolves all of them equally
    well, since its nodes are spaced geometrically in u (Takahasi and Mori 1974).
    """
    x_end = float(np.log(DECAYS * a.sum() / a.min()))
    for x in np.arange(-4.0, x_end + TRAPEZOID_STEP, TRAPEZOID_STEP):
        u = float(np.exp(x - np.exp(-x)) / a.sum())
        yield u, TRAPEZOID_STEP * u * float(1 + np.exp(-x))


def _none_selected(s: Floats) -> tuple[Floats, float]:
    """Return prod_{j != i} (1 - s_j), shape (n,), and prod_j (1 - s_j)."""
    certain = s == 1
    logs = np.log1p(-np.where(certain, 0.0, s))
    no_others = np.exp(logs.sum() - logs)
    if certain.sum() > 1:
        return np.zeros_like(s), 0.0
    if certain.any():
        return np.where(certain, no_others, 0.0), 0.0
    return no_others, float(np.exp(logs.sum()))


def _items(values: ArrayLike, s: ArrayLike, weights: ArrayLike | None) -> tuple[Floats, Floats, Floats]:
    """Return l (n,), s (n,) and a, divided by its mean, (n,) or (1,) for equal weights; all checked."""
    losses = finite_array("values", values, 1)
    inclusion = _probabilities(s)
    _like("s", s, losses)
    # One shared weight broadcasts: no (n,) vector of ones, and one exponential per node instead of n.
    if weights is None:
        return losses, inclusion, np.ones(1)
    a = _like("weights", weights, losses)
    if a.min() <= 0:
        raise ConfigError(f"weights must be > 0, got {a.min()}: leave out sources without examples")
    return losses, inclusion, a / a.mean()
