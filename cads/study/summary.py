"""From runs to points: one method at one budget, its scores over seeds, and which methods can be told apart."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from cads.errors import ConfigError
from cads.study.results import DONE, IMPORTED

CONFIDENCE = 0.95
LOWER_IS_BETTER = ("loss", "error", "perplexity", "ppl")
"""Metrics with one of these in their name are minimised."""
SHARES = ("accuracy", "error", "exact_match", "choices", "choices_per_character")
"""Metrics between 0 and 1, which are shown in percent."""
SLACK = 1 + 1e-3
"""Rounding allowed when a total is compared with a budget: published figures have three or four digits."""


@dataclass(frozen=True)
class Point:
    """One method at one budget on one task at one size: means over seeds.

    Attributes:
        task, model, method, selector, budget, budget_flops, metric: as in the table `runs`.
        seeds, scores: of the runs, in the metric's own unit.
        selection: FLOPs as charged. spent: FLOPs of the whole selection. training: FLOPs.
        full_flops: C(D). selected: share of the pool, or None if unknown.
        imported: whether it was published, not run.
    """

    task: str
    model: str
    method: str
    selector: str
    budget: str
    budget_flops: float
    metric: str
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    selection: float
    spent: float
    training: float
    full_flops: float
    selected: float | None
    imported: bool

    @property
    def total(self) -> float:
        """Selection as charged, and training, in FLOPs."""
        return self.selection + self.training

    @property
    def mean(self) -> float:
        """Of the scores."""
        return float(np.mean(self.scores))

    @property
    def half_width(self) -> float:
        """Of the t-interval of the mean over seeds; NaN for one seed."""
        n = len(self.scores)
        if n < 2:
            return math.nan
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(self.scores, ddof=1) / math.sqrt(n))

    @property
    def group(self) -> tuple[str, str]:
        """Points of one group are compared with each other: (task, model)."""
        return self.task, self.model


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric is better."""
    return not any(word in metric.lower() for word in LOWER_IS_BETTER)


def in_percent(metric: str) -> bool:
    """Whether a metric is a share, and shown as a percentage."""
    return metric in SHARES


def shown(value: float, metric: str) -> str:
    """A score as text."""
    return f"{100 * value:.2f}" if in_percent(metric) else f"{value:.4g}"


def points_of(runs: Iterable[Mapping[str, Any]], metric: str | None = None) -> list[Point]:
    """Means over seeds, in the order of the runs.

    Args:
        runs: rows of the table `runs`; those without a score are left out.
        metric: another one than the runs were made for.

    Raises:
        ConfigError: if runs have no such metric.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in runs:
        if row["status"] in (DONE, IMPORTED):
            groups.setdefault(tuple(row[k] for k in ("task", "model", "budget", "method")), []).append(row)
    return [_point(rows, metric) for rows in groups.values()]


def _point(rows: Sequence[Mapping[str, Any]], metric: str | None) -> Point:
    first, scores = rows[0], []
    for row in rows:
        values = json.loads(row["metrics"]) if metric else {row["metric"]: row["score"]}
        name = metric or row["metric"]
        if name not in values:
            raise ConfigError(f"metric {name!r} was not measured: choose from {sorted(values)}")
        scores.append(float(values[name]))
    sizes = [row["n_selected"] / row["n_pool"] for row in rows if row["n_selected"] is not None]

    def mean(column: str) -> float:
        return float(np.mean([row[column] for row in rows]))

    return Point(
        task=first["task"],
        model=first["model"],
        method=first["method"],
        selector=first["selector"],
        budget=first["budget"],
        budget_flops=first["budget_flops"],
        metric=metric or first["metric"],
        seeds=tuple(row["seed"] for row in rows),
        scores=tuple(scores),
        selection=mean("selection_flops"),
        spent=mean("selection_flops_spent"),
        training=mean("training_flops"),
        full_flops=mean("full_flops"),
        selected=float(np.mean(sizes)) if sizes else None,
        imported=first["status"] == IMPORTED,
    )


def by_group(points: Iterable[Point]) -> dict[tuple[str, str], list[Point]]:
    """Points by (task, model), in order."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for p in points:
        groups.setdefault(p.group, []).append(p)
    return groups


def budgets_of(points: Sequence[Point]) -> list[tuple[str, float]]:
    """The distinct budgets of a group, as given and in FLOPs, rising."""
    found = {p.budget_flops: p.budget for p in reversed(points)}
    return [(found[flops], flops) for flops in sorted(found)]


def affordable(points: Iterable[Point], budget_flops: float) -> list[Point]:
    """Of each method the costliest run whose total is within the budget: the cost-aware utility of CCDS."""
    best: dict[str, Point] = {}
    for p in points:
        before = best.get(p.method)
        if p.total <= budget_flops * SLACK and (before is None or p.total > before.total):
            best[p.method] = p
    return list(best.values())


def better(a: Point, b: Point) -> bool:
    """Whether the mean of `a` is strictly better than that of `b`."""
    return a.mean > b.mean if higher_is_better(a.metric) else a.mean < b.mean


def best_of(points: Sequence[Point]) -> Point:
    """The best mean; of equals the cheaper selection, then the first."""
    ordered = sorted(points, key=lambda p: p.selection)
    best = ordered[0]
    for p in ordered[1:]:
        if better(p, best):
            best = p
    return best


def told_apart(a: Point, b: Point) -> bool | None:
    """Whether the difference of two means is beyond chance, by a paired t-test over the seeds both have.

    Seeds draw the data too, so that pairs share it. None where fewer than two seeds are shared.
    """
    left, right = dict(zip(a.seeds, a.scores, strict=True)), dict(zip(b.seeds, b.scores, strict=True))
    seeds = sorted(set(left) & set(right))
    if len(seeds) < 2:
        return None
    difference = np.array([left[s] - right[s] for s in seeds])
    width = stats.t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1) * difference.std(ddof=1) / math.sqrt(len(seeds))
    return bool(abs(difference.mean()) > width)


@dataclass(frozen=True)
class Answer:
    """What to do with one budget.

    Attributes:
        budget, flops: as given, and in FLOPs. best: the best that is affordable. level: other affordable methods
            that cannot be told apart from it. sentence: the same in words.
    """

    budget: str
    flops: float
    best: Point
    level: tuple[str, ...]
    sentence: str


def answers(points: Sequence[Point]) -> list[Answer]:
    """For each budget of a group, what its points say is best at that total cost."""
    made = []
    for budget, flops in budgets_of(points):
        rivals = affordable(points, flops)
        if not rivals:
            continue
        best = best_of(rivals)
        others = sorted(rivals, key=lambda p: -p.mean if higher_is_better(p.metric) else p.mean)
        level = tuple(p.method for p in others if p is not best and told_apart(best, p) is False)
        made.append(Answer(budget, flops, best, level, _sentence(budget, flops, best, level)))
    return made


def _sentence(budget: str, flops: float, best: Point, level: Sequence[str]) -> str:
    unit = " %" if in_percent(best.metric) else ""
    score = shown(best.mean, best.metric)
    if not math.isnan(best.half_width):
        score += f" ± {shown(best.half_width, best.metric)}"
    given = "" if budget.endswith("FLOPs") else f" ({budget})"
    # A run whose selection came on top belongs to a smaller budget than the one it fits into.
    smaller = f" of {best.budget}" if best.budget_flops < flops / SLACK else ""
    text = f"At {flops:.3g} FLOPs in all{given}: {best.method}{smaller}, {best.metric} {score}{unit}"
    if level:
        text += f"; not told apart from {', '.join(level)} by {len(best.seeds)} seeds"
    return f"{text}."


def regrets(points: Sequence[Point]) -> dict[str, list[tuple[float, float]]]:
    """By method, (budget in FLOPs, how much worse than the best affordable mean of the grid), at each budget.

    The best of many noisy means flatters itself: regrets are upper estimates.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for _, flops in budgets_of(points):
        rivals = affordable(points, flops)
        if not rivals:
            continue
        best = best_of(rivals).mean
        for p in rivals:
            found.setdefault(p.method, []).append((flops, abs(best - p.mean)))
    return found
