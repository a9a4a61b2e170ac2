"""Every fit, line and crossover of a study: a pure function of its points, written as `fits.json`.

The analysis is that of CCDS (Yin and Rush, ICLR 2025, arXiv 2410.16208), implemented in
`cads.study.analysis.frontier`.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cads.errors import CadsError
from cads.study.analysis.fixed_cost import FixedCost
from cads.study.analysis.frontier import (
    Form,
    FrontierLine,
    PerformanceFit,
    advice,
    amortised_flops,
    bootstrap_fits,
    bootstrap_intervals,
    break_even_tasks,
    compute_optimal,
    compute_optimal_method,
    crossovers,
    fit_performance,
    log_linear_frontier,
    non_dominated,
    simulate_figure1,
    smallest_optimal_ratio,
)
from cads.study.analysis.points import MethodPoint, budgets_of, by_group, in_percent, place_name, regrets
from cads.study.analysis.verdicts import answers, quoted_name

log = logging.getLogger(__name__)

FITS_VERSION = 1
FORMS: tuple[Form, ...] = ("shifted", "published")
SHARED_TASKS = (1, 5, 10, 20)
"""Tasks that share one selection, in the break-even analysis of CCDS."""
SAME_COST = 0.01
"""Training within this share of C(D) counts as training on the whole pool."""
EXPLAINED = 0.5
"""Share of the variance of its points that a curve must explain to be compared with other curves."""
N_RESAMPLES, BOOTSTRAP_SEED = 200, 0
SIMULATED_SIZES = (7.5e9, 7.5e10, 1.5e12)
"""Parameters of the trained model in the panels of CCDS figure 1."""


@dataclass(frozen=True)
class GroupFits:
    """The analysis of one task at one model size. Scores are oriented so that higher is better; shares are in percent.

    Attributes:
        task, model, metric: of the points. maximised: whether more of the metric is better. points: all of the group.
        p_bar: published score of training on the whole pool, else the best mean of the grid.
        complete: whether `p_bar` is the published score.
        c_full: C(D), FLOPs of training on the whole pool.
        fits: shifted and published form, by method. not_fitted: why a method has no fit, by method.
        doubtful_costs: what does not fit in the costs of a method's selection, by method.
        frontier: the points that no other point dominates, cheapest first.
        line: the frontier line through them; None unless they have two different costs.
    """

    task: str
    model: str
    metric: str
    maximised: bool
    points: list[MethodPoint]
    p_bar: float
    complete: bool
    c_full: float
    fits: dict[str, dict[Form, PerformanceFit]]
    not_fitted: dict[str, str]
    doubtful_costs: dict[str, str]
    frontier: list[MethodPoint]
    line: FrontierLine | None

    @property
    def curves(self) -> list[PerformanceFit]:
        """The shifted fits that are usable: neither degenerate nor far from their points (`is_telling`)."""
        return [forms["shifted"] for forms in self.fits.values() if is_telling(forms["shifted"])]

    @property
    def unused(self) -> list[str]:
        """Methods whose shifted fit is not usable. It enters no crossover and no advice."""
        return [method for method, forms in self.fits.items() if not is_telling(forms["shifted"])]

    @property
    def span(self) -> tuple[float, float]:
        """Lowest and highest total FLOPs of the points."""
        totals = [p.total for p in self.points]
        return min(totals), max(totals)

    @property
    def imported(self) -> bool:
        """Whether the points were published."""
        return all(p.imported for p in self.points)


def is_telling(fit: PerformanceFit) -> bool:
    """Whether a curve is determined by its points and explains at least `EXPLAINED` of their variance."""
    variance = float(np.var(fit.scores))
    return not fit.degenerate and float(np.mean(np.square(fit.residuals))) <= (1 - EXPLAINED) * variance


def turned(p: MethodPoint) -> float:
    """The mean of a point, higher is better, shares in percent."""
    value = 100 * p.mean if in_percent(p.metric) else p.mean
    return value if p.maximised else -value


def fixed_selection(points: Sequence[MethodPoint]) -> float:
    """FLOPs that a method pays before any training at every budget; 0 if its selection grows with the budget."""
    return FixedCost.of(points).flops


def analyse(points: Sequence[MethodPoint]) -> list[GroupFits]:
    """Fit every group of points."""
    return [_analyse(group) for group in by_group(points).values()]


def _analyse(points: list[MethodPoint]) -> GroupFits:
    """The analysis of the points of one group."""
    first = points[0]
    complete = [
        p for p in points if p.imported and p.selection == 0 and p.train_flops >= (1 - SAME_COST) * p.full_flops
    ]
    p_bar = float(np.mean([turned(p) for p in complete])) if complete else max(turned(p) for p in points)
    # A minimised metric changes its sign, so that its scores may be negative.
    bounds = (0.0, math.inf) if first.maximised else (-math.inf, math.inf)
    fits: dict[str, dict[Form, PerformanceFit]] = {}
    not_fitted, doubtful_costs = {}, {}
    for method in dict.fromkeys(p.method for p in points):
        rows = [p for p in points if p.method == method]
        cost = FixedCost.of(rows)
        if cost.doubt:
            doubtful_costs[method] = cost.doubt
            log.warning("%s: %s: %s", place_name(*first.group) or "this study", method, cost.doubt)
        totals, scores = cost.totals(rows), [turned(p) for p in rows]
        c_select = min(cost.flops, *totals)
        try:
            fits[method] = {
                form: fit_performance(
                    method,
                    totals,
                    scores,
                    p_bar=p_bar,
                    c_full=first.full_flops,
                    c_select=c_select,
                    form=form,
                    p0_bounds=bounds,
                )
                for form in FORMS
            }
        except CadsError as error:
            not_fitted[method] = str(error)
    costs, scores = [p.total for p in points], [turned(p) for p in points]
    frontier = [points[i] for i in non_dominated(costs, scores)]
    line = None
    if len({p.total for p in frontier}) >= 2:
        line = log_linear_frontier([p.total for p in frontier], [turned(p) for p in frontier])
    return GroupFits(
        task=first.task,
        model=first.model,
        metric=first.metric,
        maximised=first.maximised,
        points=points,
        p_bar=p_bar,
        complete=bool(complete),
        c_full=first.full_flops,
        fits=fits,
        not_fitted=not_fitted,
        doubtful_costs=doubtful_costs,
        frontier=frontier,
        line=line,
    )


def break_even(group: GroupFits) -> list[dict[str, Any]]:
    """For each point that pays for selection: the FLOPs of one task if T tasks share it, and the break-even T.

    At the break-even T (`tasks`) the point reaches the frontier line. It is None where no number of tasks makes up for
    the cost, or where there is no rising line.
    """
    rows = []
    for p in group.points:
        if p.selection <= 0:
            continue
        tasks: float | None = None
        if group.line is not None and group.line.slope_per_decade > 0:
            tasks = break_even_tasks(p.spent, p.train_flops, group.line.flops_to_reach(turned(p)))
        shared = {str(t): amortised_flops(p.spent, p.train_flops, t) for t in SHARED_TASKS}
        finite = tasks if tasks is not None and math.isfinite(tasks) else None
        rows.append(
            {"method": p.method, "budget": p.budget, "score": turned(p), "flops_by_tasks": shared, "tasks": finite}
        )
    return rows


def recommendations(group: GroupFits) -> list[str]:
    """The advice of the fitted curves, one sentence for each budget, with the measured best where it differs."""
    if not group.curves:
        return []
    horizon = None if group.imported else group.span[1]
    measured = {a.flops: a for a in answers(group.points)}
    fitted = {c.method for c in group.curves}
    sentences = []
    for level in budgets_of(group.points):
        sentence = advice(group.curves, level.flops, horizon=horizon)
        verdict, predicted = measured.get(level.flops), compute_optimal_method(group.curves, level.flops)
        if verdict is not None and predicted not in (None, verdict.best.method, *verdict.level):
            reason = "" if verdict.best.method in fitted else ", which no curve describes"
            sentence += f" (measured there: {quoted_name(verdict.best.method)}{reason})"
        sentences.append(sentence)
    return sentences


def size_ratios(group: GroupFits) -> dict[str, float | None]:
    """For each method that pays before training, the smallest size ratio at which it is compute-optimal somewhere.

    The ratio is that of the trained model to the scorer, which is as large as the trained model of `group`. None if
    there is no such ratio.
    """
    curves = group.curves
    ratios = {c.method: smallest_optimal_ratio(c.method, curves) for c in curves if c.c_select > 0}
    return {method: ratio if math.isfinite(ratio) else None for method, ratio in ratios.items()}


def to_json(groups: Sequence[GroupFits], smallest: Mapping[str, str]) -> dict[str, Any]:
    """The content of `fits.json`. Costs are FLOPs; scores are oriented so that higher is better.

    Args:
        smallest: by task, the smallest model without a proxy. Size ratios are computed for it alone.
    """
    return {
        "version": FITS_VERSION,
        "groups": [_group_json(g, ratios=smallest.get(g.task) == g.model) for g in groups],
        "simulation": [_simulation(n) for n in SIMULATED_SIZES],
    }


def _group_json(group: GroupFits, *, ratios: bool) -> dict[str, Any]:
    """One group of `fits.json`; `ratios`: with size ratios."""
    low, high = group.span
    pairs = itertools.combinations(group.curves, 2)
    crossed = [{"methods": [a.method, b.method], "flops": list(crossovers(a, b, low, high))} for a, b in pairs]
    pieces = compute_optimal(group.curves, low, high) if group.curves and low < high else []
    return {
        "task": group.task,
        "model": group.model,
        "metric": group.metric,
        "p_bar": group.p_bar,
        "c_full": group.c_full,
        "fits": {m: {form: _fit_json(fit) for form, fit in forms.items()} for m, forms in group.fits.items()},
        "not_fitted": group.not_fitted,
        "doubtful_costs": group.doubtful_costs,
        "unused": group.unused,
        "frontier": [{"method": p.method, "flops": p.total, "score": turned(p)} for p in group.frontier],
        "line": group.line
        and {"slope_per_decade": group.line.slope_per_decade, "score_at_1e17": group.line.score_at_reference},
        "crossovers": [c for c in crossed if c["flops"]],
        "compute_optimal": [{"method": m, "from": a, "to": b} for m, a, b in pieces],
        "break_even": break_even(group),
        "size_ratios": size_ratios(group) if ratios else {},
        "advice": recommendations(group),
        "answers": [
            {
                "budget": a.budget,
                "flops": a.flops,
                "best": a.best.method,
                "level": list(a.level),
                "sentence": a.sentence,
            }
            for a in answers(group.points)
        ],
        "regret": {m: [{"flops": c, "regret": r} for c, r in rows] for m, rows in regrets(group.points).items()},
    }


def _fit_json(fit: PerformanceFit) -> dict[str, Any]:
    """One fit of `fits.json`; of the shifted form with bootstrap intervals."""
    record: dict[str, Any] = {
        "p0": fit.p0,
        "lambda": fit.lam,
        "c_select": fit.c_select,
        "degenerate": fit.degenerate,
        "used": is_telling(fit),
        "residuals": list(fit.residuals),
        "rmse": float(np.sqrt(np.mean(np.square(fit.residuals)))),
    }
    if fit.form == "shifted" and not fit.degenerate:
        refits = bootstrap_fits(fit, np.random.default_rng(BOOTSTRAP_SEED), N_RESAMPLES)
        record["failed_refits"] = N_RESAMPLES - len(refits)
        if refits:
            record["intervals"] = {"lambda" if k == "lam" else k: v for k, v in bootstrap_intervals(refits).items()}
    return record


def _simulation(n_parameters: float) -> dict[str, Any]:
    """Crossovers of the simulated curves of CCDS figure 1, and the best method of every range of FLOPs.

    The range ends at the cost of training on the whole pool, or at twice the most expensive selection.
    """
    curves = simulate_figure1(n_parameters)
    by_name = {c.method: c for c in curves}
    low, high = curves[0].c_full * 1e-6, max(curves[0].c_full, 2 * curves[-1].c_select)
    pairs = [("bm25", "ppl"), ("ppl", "gradient")]
    return {
        "n_parameters": n_parameters,
        "crossovers": {f"{a}/{b}": list(crossovers(by_name[a], by_name[b], low, high)) for a, b in pairs},
        "compute_optimal": [{"method": m, "from": a, "to": b} for m, a, b in compute_optimal(curves, low, high)],
    }
