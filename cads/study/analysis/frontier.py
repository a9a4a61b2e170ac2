"""Which selection method pays at which budget: the analysis of Compute-Constrained Data Selection.

Source: Yin and Rush, "Compute-Constrained Data Selection" (CCDS), ICLR 2025, arXiv 2410.16208. Its letters:
`C` total FLOPs, `C_select` those of selection, `C_train` those of training, `C(D)` those of training on the whole
pool. All costs are FLOPs; scores are in the metric's unit and higher is better.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
from numpy.random import Generator
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq, least_squares

from cads.errors import BudgetError, CadsError, ConfigError, DataError

Floats = NDArray[np.float64]
Interval = tuple[float, float]
Piece = tuple[str, float, float]  # method, from, to
Form = Literal["shifted", "published"]

MIN_BUDGETS = 3  # two parameters fit two budgets exactly, even if the model is wrong
REFERENCE_FLOPS = 1e17  # where a frontier line states its score
N_GRID_RATIOS = 200


def _column(values: ArrayLike, name: str, n_expected: int | None = None) -> Floats:
    """Finite numbers of shape (n,).

    Raises:
        DataError: unless `values` are such numbers, `n_expected` of them if it is given.
    """
    try:
        column = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} must be one row of numbers ({error}): repair the table") from error
    if column.ndim != 1 or not np.isfinite(column).all():
        raise DataError(f"{name} must be one row of finite numbers, got {values!r}: drop the bad points")
    if n_expected is not None and column.size != n_expected:
        raise DataError(f"{name} has {column.size} values for {n_expected} costs: give one for each")
    return column


@dataclass(frozen=True)
class PerformanceCurve:
    """`P(C) = P0 + (Pbar - P0) * (1 - exp(-lambda * x / C(D)))`, the parametric model of CCDS.

    `x` is `C - C_select` (`form="shifted"`) or `C` (`form="published"`). `p0` is the score before training,
    `p_bar` that of training on the whole pool, `lam` (`lambda` >= 0) the rate of approach to `p_bar`, `c_full` is
    `C(D)` and `c_select` is `C_select`, paid before the first training step.
    """

    method: str
    p0: float
    p_bar: float
    lam: float
    c_full: float
    c_select: float = 0.0
    form: Form = "shifted"

    def __post_init__(self) -> None:
        numbers = (self.p0, self.p_bar, self.lam, self.c_full, self.c_select)
        if not all(map(math.isfinite, numbers)) or self.lam < 0 or self.c_full <= 0 or self.c_select < 0:
            rule = "all finite, lam and c_select >= 0, c_full > 0"
            raise DataError(f"{self.method!r}: p0, p_bar, lam, c_full, c_select are {numbers}: need {rule}")
        if self.form not in get_args(Form):
            raise ConfigError(f"{self.method!r}: form {self.form!r} is unknown: use one of {get_args(Form)}")

    @property
    def span(self) -> float:
        """`Pbar - P0`."""
        return self.p_bar - self.p0

    @property
    def shift(self) -> float:
        """Total FLOPs at which the exponent is zero."""
        return self.c_select if self.form == "shifted" else 0.0

    @property
    def decay(self) -> float:
        """`lambda / C(D)`, per FLOP."""
        return self.lam / self.c_full

    def predict(self, flops: ArrayLike) -> Floats:
        """Scores at total FLOPs, in the same shape; NaN where the selection is not affordable."""
        c = np.asarray(flops, dtype=np.float64)
        x = np.where(c >= self.c_select, c - self.shift, np.nan)
        return np.asarray(self.p_bar - self.span * np.exp(-self.decay * x))

    def flops_to_reach(self, score: float) -> float:
        """Fewest total FLOPs with that score, the inverse of `predict`; infinite if never reached."""
        start = self.p_bar - self.span * math.exp(-self.decay * (self.c_select - self.shift))
        if score <= start:
            return self.c_select
        if score >= self.p_bar or self.decay == 0:
            return math.inf
        return self.shift + math.log(self.span / (self.p_bar - score)) / self.decay


@dataclass(frozen=True)
class PerformanceFit(PerformanceCurve):
    """A curve with the points that it was fitted to, in order of cost. Residuals are observed minus predicted."""

    flops: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    residuals: tuple[float, ...] = ()
    p0_bounds: Interval = (0.0, math.inf)

    @property
    def degenerate(self) -> bool:
        """Whether the data did not determine the curve: `P0` on its bound, or no gain at all."""
        tolerance = 1e-6 * abs(self.p_bar)
        return self.lam < 1e-9 or any(abs(self.p0 - bound) <= tolerance for bound in self.p0_bounds)


def fit_performance(
    method: str,
    flops: ArrayLike,
    scores: ArrayLike,
    *,
    p_bar: float,
    c_full: float,
    c_select: float = 0.0,
    form: Form = "shifted",
    p0_bounds: Interval = (0.0, math.inf),
) -> PerformanceFit:
    """Fit `P0` and `lambda` by bounded least squares (trust-region reflective), from [first score, 1].

    `form="published"` counts the cost of selection in the exponent, as CCDS does. `P0` is then undetermined for a
    method that spends most of every budget on selection; see `PerformanceFit.degenerate`.

    `flops` (n,) are totals of at least 3 distinct budgets, each with `c_select` included. `p_bar` is the score of
    training on the whole pool, which costs `c_full`. Widen `p0_bounds` for metrics below zero.
    """
    c = _column(flops, f"flops of {method!r}")
    y = _column(scores, f"scores of {method!r}", c.size)
    n_budgets = np.unique(c).size
    if n_budgets < MIN_BUDGETS:
        raise DataError(f"{method!r} has {n_budgets} budgets, a fit needs {MIN_BUDGETS}: run more budgets")
    if not p0_bounds[0] < p0_bounds[1]:
        raise ConfigError(f"p0_bounds {p0_bounds} of {method!r}: give (low, high)")
    if c.min() <= 0 or c.min() < c_select:
        raise DataError(f"{method!r}: {c.min():.4g} FLOPs must be above 0 and include c_select {c_select:.4g}")
    order = np.lexsort((y, c))
    points = tuple(c[order].tolist()), tuple(y[order].tolist())
    start = points[1][0], p_bar, 1.0
    return _refit(PerformanceFit(method, *start, c_full, c_select, form, *points, (), p0_bounds))


def _refit(start: PerformanceFit) -> PerformanceFit:
    """The least-squares curve through the points of `start`; the search starts from its `p0` and `lam`."""
    p_bar, (low, high) = start.p_bar, start.p0_bounds
    x, y = (np.asarray(start.flops) - start.shift) / start.c_full, np.asarray(start.scores)

    def misfit(parameters: Floats) -> Floats:
        p0, lam = parameters
        return np.asarray(p_bar - (p_bar - p0) * np.exp(-lam * x) - y)

    initial, bounds = [min(max(start.p0, low), high), start.lam], ([low, 0.0], [high, np.inf])
    solution = least_squares(misfit, initial, bounds=bounds, method="trf", max_nfev=2000)
    if not solution.success:
        raise CadsError(f"the fit of {start.method!r} did not converge, {solution.message}: check its points")
    p0, lam = solution.x.tolist()
    return replace(start, p0=p0, lam=lam, residuals=tuple((-solution.fun).tolist()))


def bootstrap_fits(fit: PerformanceFit, rng: Generator, n_resamples: int = 500) -> list[PerformanceFit]:
    """Refits to the fitted curve plus resampled residuals, centred and scaled by `sqrt(n / (n - 2))`.

    A refit that does not converge is left out, so that there may be fewer than `n_resamples`.
    """
    # Residuals are resampled, not points: a few budgets drawn with replacement are often fewer than 3 distinct ones.
    residuals = np.asarray(fit.residuals)
    noise = (residuals - residuals.mean()) * math.sqrt(residuals.size / (residuals.size - 2))
    scores = fit.predict(fit.flops) + rng.choice(noise, size=(n_resamples, noise.size))
    refits = []
    for row in scores.tolist():
        with suppress(CadsError):
            refits.append(_refit(replace(fit, scores=tuple(row))))
    return refits


def bootstrap_intervals(refits: Sequence[PerformanceFit], confidence: float = 0.95) -> dict[str, Interval]:
    """Percentile intervals (low, high) of `p0` and `lam` over `bootstrap_fits`."""
    if not 0 < confidence < 1 or not refits:
        raise ConfigError(f"confidence {confidence} over {len(refits)} refits: use (0, 1) and at least one")
    samples = [(refit.p0, refit.lam) for refit in refits]
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0).tolist()
    return {"p0": (low[0], high[0]), "lam": (low[1], high[1])}


def non_dominated(costs: ArrayLike, scores: ArrayLike) -> NDArray[np.int64]:
    """Indices, cheapest first, of the points that no other point dominates. Of equal points only the first counts."""
    c = _column(costs, "costs")
    y = _column(scores, "scores", c.size)
    order = np.lexsort((np.arange(c.size), -y, c))
    best_before = np.concatenate([[-np.inf], np.maximum.accumulate(y[order])])[:-1]
    return order[y[order] > best_before]


@dataclass(frozen=True)
class FrontierLine:
    """`score = score_at_reference + slope_per_decade * log10(C / 1e17)`."""

    slope_per_decade: float
    score_at_reference: float

    def predict(self, flops: ArrayLike) -> Floats:
        """Scores of the line at total FLOPs."""
        decades = np.log10(np.asarray(flops, dtype=np.float64) / REFERENCE_FLOPS)
        return np.asarray(self.score_at_reference + self.slope_per_decade * decades)

    def flops_to_reach(self, score: float) -> float:
        """Total FLOPs at which a rising line has that score."""
        if self.slope_per_decade <= 0:
            raise DataError(f"the line falls by {-self.slope_per_decade:g} a decade: fit it to a frontier")
        return REFERENCE_FLOPS * 10 ** ((score - self.score_at_reference) / self.slope_per_decade)


def log_linear_frontier(costs: ArrayLike, scores: ArrayLike) -> FrontierLine:
    """Least-squares line of score on log10(FLOPs). Through `non_dominated` points it is the dashed line of CCDS."""
    c = _column(costs, "costs")
    y = _column(scores, "scores", c.size)
    if np.unique(c).size < 2 or c.min() <= 0:
        raise DataError(f"a frontier line needs 2 different costs above 0, got {c.tolist()}: add budgets")
    return FrontierLine(*np.polyfit(np.log10(c / REFERENCE_FLOPS), y, 1).tolist())


def amortised_flops(c_select: float, c_train: float, n_tasks: float) -> float:
    """`C_select / T + C_train`: FLOPs of one task if T tasks share one selection (T may be infinite)."""
    if not n_tasks >= 1:
        raise ConfigError(f"n_tasks {n_tasks}: at least one task must pay for the selection")
    return c_select / n_tasks + c_train


def break_even_tasks(c_select: float, c_train: float, c_rival: float) -> float:
    """The smallest real T >= 1 with `C_select / T + C_train <= c_rival`, a rival's cost of the same score."""
    if c_train + c_select <= c_rival:
        return 1.0
    return c_select / (c_rival - c_train) if c_rival > c_train else math.inf


def _lead(a: PerformanceCurve, b: PerformanceCurve, c: float) -> float:
    """`P_a - P_b` at cost c. The order of the sum keeps small differences if both have the same `Pbar`."""
    z_a, z_b = a.decay * (c - a.shift), b.decay * (c - b.shift)
    return (a.p_bar - b.p_bar) + (b.span * math.exp(-z_b) - a.span * math.exp(-z_a))


def _turning_point(a: PerformanceCurve, b: PerformanceCurve) -> float:
    """The only `C` at which `P_a - P_b` has slope zero; NaN if there is none."""
    slope_a, slope_b = a.span * a.decay, b.span * b.decay
    if a.decay == b.decay or slope_a * slope_b <= 0:
        return math.nan
    return (math.log(slope_a / slope_b) + a.decay * a.shift - b.decay * b.shift) / (a.decay - b.decay)


def crossovers(a: PerformanceCurve, b: PerformanceCurve, low: float, high: float) -> tuple[float, ...]:
    """Every total cost in (low, high) at which the two curves cross, in rising order.

    Only costs at which both selections are affordable count. The difference of two exponentials turns at most once,
    so that there are at most two crossovers. Brent's method in log FLOPs finds them in the brackets on both sides of
    the turning point.
    """
    if not 0 < low < high < math.inf:
        raise ConfigError(f"range ({low}, {high}): give 0 < low < high in FLOPs")
    low = max(low, a.c_select, b.c_select)
    if low >= high:
        return ()
    turn = _turning_point(a, b)
    nodes = [low, turn, high] if low < turn < high else [low, high]
    roots = []

    def lead(u: float) -> float:  # u = log(C / low) is exact at low, where both curves may start
        return _lead(a, b, low * math.exp(u))

    for left, right in itertools.pairwise(math.log(node / low) for node in nodes):
        if min(lead(left), lead(right)) < 0 < max(lead(left), lead(right)):
            roots.append(low * math.exp(brentq(lead, left, right, xtol=1e-14)))
    return tuple(c for c in roots if low < c < high)  # a root within rounding of an end lies at the end


def compute_optimal_method(curves: Iterable[PerformanceCurve], budget: float) -> str | None:
    """The best method whose selection leaves FLOPs to train with; None if there is none.

    Of equally good methods it is the one with the cheaper selection, then the first by name.
    """
    best: PerformanceCurve | None = None
    for curve in sorted(curves, key=lambda curve: (curve.c_select, curve.method)):
        if curve.c_select < budget and (best is None or _lead(curve, best, budget) > 0):
            best = curve
    return best.method if best else None


def compute_optimal(curves: Sequence[PerformanceCurve], low: float, high: float) -> list[Piece]:
    """The best method of each range of total FLOPs within [low, high], cheapest first: (method, from, to)."""
    names = [curve.method for curve in curves]
    if len(set(names)) != len(names):
        raise DataError(f"curves of {names}: every method may appear once")
    cuts = {low, high, *(curve.c_select for curve in curves if low < curve.c_select < high)}
    for a, b in itertools.combinations(sorted(curves, key=lambda curve: curve.method), 2):
        cuts.update(crossovers(a, b, low, high))
    pieces: list[Piece] = []
    for left, right in itertools.pairwise(sorted(cuts)):
        # No two curves cross inside a piece, so that its middle decides.
        winner = compute_optimal_method(curves, math.sqrt(left) * math.sqrt(right))
        if pieces and pieces[-1][0] == winner:
            pieces[-1] = (winner, pieces[-1][1], right)
        elif winner is not None:
            pieces.append((winner, left, right))
    return pieces


def smallest_optimal_ratio(
    method: str, curves: Sequence[PerformanceCurve], *, margin: float = 0.0, max_ratio: float = 1000.0
) -> float:
    """Smallest size ratio >= 1 of trained model to selector at which a method is compute-optimal; infinite if none.

    The curves are those of ratio 1. The selector is fixed and the trained model grows: `C(D)` scales with the ratio,
    `P0`, `Pbar` and `lambda` do not. A method is optimal if it leads by more than `margin` at a cost below `C(D)`, at
    which training on the whole pool becomes affordable.
    """
    candidate = next((curve for curve in curves if curve.method == method), None)
    if candidate is None:
        raise DataError(f"{method!r} is not among {[curve.method for curve in curves]}: add its fit")
    lowered = replace(candidate, p0=candidate.p0 - margin, p_bar=candidate.p_bar - margin)
    contest = [lowered if curve is candidate else curve for curve in curves]

    def optimal_somewhere(ratio: float) -> bool:
        scaled = [replace(curve, c_full=curve.c_full * ratio) for curve in contest]
        high = max(curve.c_full for curve in scaled)
        return any(name == method for name, _, _ in compute_optimal(scaled, high * 1e-6, high))

    grid = np.geomspace(1.0, max_ratio, N_GRID_RATIOS).tolist()
    optimal_ratio = next((ratio for ratio in grid if optimal_somewhere(ratio)), math.inf)
    other_ratio = max((ratio for ratio in grid if ratio < optimal_ratio), default=optimal_ratio)
    while math.isfinite(optimal_ratio) and optimal_ratio / other_ratio > 1 + 1e-9:
        middle = math.sqrt(other_ratio * optimal_ratio)
        other_ratio, optimal_ratio = (other_ratio, middle) if optimal_somewhere(middle) else (middle, optimal_ratio)
    return float(optimal_ratio)


def jaccard(a: Iterable[object], b: Iterable[object]) -> float:
    """`|A & B| / |A | B|` of two selections of ids."""
    ids_a, ids_b = list(a), list(b)
    set_a, set_b = set(ids_a), set(ids_b)
    if len(set_a) != len(ids_a) or len(set_b) != len(ids_b) or not set_a | set_b:
        raise DataError("the overlap of selections needs unique ids, and at least one: remove the duplicates")
    return len(set_a & set_b) / len(set_a | set_b)


def expected_jaccard(p: float, q: float | None = None) -> float:
    """`p q / (p + q - p q)`, the overlap of two independent random selections of fractions p and q of a large pool.

    For one fraction, q = p: `p / (2 - p)`.
    """
    q = p if q is None else q
    if not (0 < p <= 1 and 0 < q <= 1):
        raise ConfigError(f"fractions {p} and {q}: a share of the pool lies in (0, 1]")
    return p * q / (p + q - p * q)


def _short(flops: float) -> str:
    """FLOPs with at most two digits, such as 3e17."""
    mantissa, exponent = f"{flops:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def advice(curves: Sequence[PerformanceCurve], budget: float, *, horizon: float | None = None) -> str:
    """The best method at a budget in a sentence: "at 3e17 FLOPs: embedding; LESS pays from 2e18".

    It names the methods that become the best up to `horizon`, by default the largest `C(D)`, at which training on the
    whole pool is affordable. It also names the methods that charge for selection and are the best nowhere up to there.
    """
    if not curves or not 0 < budget < math.inf:
        raise BudgetError(f"advice on {len(curves)} curves at {budget} FLOPs: give fits and a budget above 0")
    now = compute_optimal_method(curves, budget)
    end = max(curve.c_full for curve in curves) if horizon is None else horizon
    clauses = [f"at {_short(budget)} FLOPs: {now or 'no selection is affordable'}"]
    if budget >= end:
        return clauses[0] + (f"; training on everything costs {_short(end)}" if horizon is None else "")
    pays = {method: low for method, low, _ in reversed(compute_optimal(curves, budget, end))}
    later = sorted((low, method) for method, low in pays.items() if method != now)
    clauses += [f"{method} pays from {_short(low)}" for low, method in later]
    never = [c.method for c in curves if c.c_select > 0 and c.method != now and c.method not in pays]
    clauses += [f"{method} does not pay up to {_short(end)}" for method in never]
    return "; ".join(clauses)


def simulate_figure1(n_parameters: float) -> tuple[PerformanceCurve, ...]:
    """The four curves of CCDS figure 1 (`P0 = 0`, `Pbar = 100`); its panels are N = 7.5e9, 7.5e10 and 1.5e12.

    `C(D) = 6 N |D|`, |D| = 1e8 tokens. On a selector of 7.5e9 parameters perplexity costs a forward pass over
    the pool (`2 N |D|` = 1.5e18), gradients a training pass (4.5e18).
    """
    c_full, forward = 6 * n_parameters * 1e8, 2 * 7.5e9 * 1e8
    # Lambdas are read off the figure. For gradients it is "about 77"; with 76.5 to 76.9 the curve meets that of
    # perplexity at 7.8e18, as in the figure.
    methods = [("random", 5, 0), ("bm25", 10, 0), ("ppl", 40, forward), ("gradient", 76.7, 3 * forward)]
    return tuple(PerformanceCurve(name, 0.0, 100.0, lam, c_full, c_select) for name, lam, c_select in methods)
