"""Points: the runs of one method at one budget over all seeds, and which methods differ significantly."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from cads.errors import ConfigError, DataError
from cads.study.tables import DONE, IMPORTED

CONFIDENCE = 0.95
LOWER_IS_BETTER = ("loss", "error", "perplexity", "ppl", "bits_per_byte", "nll", "mae")
"""Metrics with one of these in their name are minimised, unless the run itself says whether they are."""
SHARES = ("accuracy", "error", "exact_match", "choices", "choices_per_character")
"""Metrics between 0 and 1. They are shown in percent."""
FREE = ("full", "joint", "random", "source", "target-only")
"""Selectors that compute nothing to select: what a method must beat."""
SLACK = 1 + 1e-3
"""Tolerance when a total is compared with a budget: published figures have three or four digits."""


@dataclass(frozen=True)
class MethodPoint:
    """One method at one budget on one task at one model size: means over seeds.

    Attributes:
        task, model, method, selector, budget, metric: as in the table `runs`.
        maximised: whether more of the metric is better.
        seeds, scores, budgets: of the runs; scores in the metric's own unit, budgets in FLOPs.
        selection: FLOPs as charged. spent: FLOPs of the whole selection. training: FLOPs.
        full_flops: C(D), FLOPs of training on the whole pool. selected: share of the pool, or None if unknown.
        imported: whether the point was published, not run.
    """

    task: str
    model: str
    method: str
    selector: str
    budget: str
    metric: str
    maximised: bool
    seeds: tuple[int, ...]
    scores: tuple[float, ...]
    budgets: tuple[float, ...]
    selection: float
    spent: float
    train_flops: float
    full_flops: float
    selected: float | None
    imported: bool

    @property
    def budget_flops(self) -> float:
        """FLOPs of the budget, mean over seeds. Seeds draw the data, so that costs of examples may differ."""
        return float(np.mean(self.budgets))

    @property
    def total(self) -> float:
        """Selection as charged, and training, in FLOPs."""
        return self.selection + self.train_flops

    @property
    def free(self) -> bool:
        """Whether its selection computes nothing."""
        return self.selector in FREE and not self.spent

    @property
    def mean(self) -> float:
        """Mean of the scores."""
        return float(np.mean(self.scores))

    @property
    def half_width(self) -> float:
        """Half-width of the t-interval of the mean over seeds; NaN for one seed."""
        return half_width(self.scores)

    @property
    def group(self) -> tuple[str, str]:
        """(task, model). Points of one group are compared with each other."""
        return self.task, self.model


def place_name(task: str, model: str) -> str:
    """The name of a group of points: task and model size, unless the name of the task ends in the size."""
    return task if model and task.endswith(model) else " ".join(filter(None, [task, model]))


def half_width(values: Sequence[float] | np.ndarray) -> float:
    """Half-width of the t-interval (`CONFIDENCE`) of the mean of values (shape (n,)); NaN for fewer than two."""
    n = len(values)
    if n < 2:
        return math.nan
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric is better, by its name; for published points and metrics that no task has."""
    return not any(word in metric.lower() for word in LOWER_IS_BETTER)


def in_percent(metric: str) -> bool:
    """Whether a metric is a share, which is shown in percent."""
    return metric in SHARES


def score_text(value: float, metric: str) -> str:
    """A score as text."""
    return f"{100 * value:.2f}" if in_percent(metric) else f"{value:.4g}"


def interval_text(p: MethodPoint) -> str:
    """The mean with its interval, if it has one, and the unit: "93.20 ± 1.10 %"."""
    text = score_text(p.mean, p.metric)
    if not math.isnan(p.half_width):
        text += f" ± {score_text(p.half_width, p.metric)}"
    return text + (" %" if in_percent(p.metric) else "")


def points_of(runs: Iterable[Mapping[str, Any]], metric: str | None = None) -> list[MethodPoint]:
    """Means over seeds, in the order of the runs.

    Args:
        runs: rows of the table `runs`; rows without a score are skipped.
        metric: to use instead of the metric of the runs. Published points with another metric are skipped.

    Raises:
        ConfigError: if `metric` was not measured, or if runs that are compared were scored by different metrics.
        DataError: if a score is not finite.
    """
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in runs:
        if row["status"] == DONE or (row["status"] == IMPORTED and metric in (None, row["metric"])):
            groups.setdefault(tuple(row[k] for k in ("task", "model", "budget", "method")), []).append(row)
    points = [_point(rows, metric) for rows in groups.values()]
    for group, members in by_group(points).items():
        if len(metrics := sorted({p.metric for p in members})) > 1:
            name = place_name(*group) or "this study"
            raise ConfigError(f"runs of {name} were scored by {metrics}: give --metric, or run `cads compare` again")
    return points


def _point(rows: Sequence[Mapping[str, Any]], metric: str | None) -> MethodPoint:
    """The point of the runs of one method at one budget, one row for each seed."""
    first, scores = rows[0], []
    for row in rows:
        values = json.loads(row["metrics"]) if metric else {row["metric"]: row["score"]}
        name = metric or row["metric"]
        if name not in values:
            raise ConfigError(f"metric {name!r} was not measured: choose from {sorted(values)}")
        scores.append(float(values[name]))
        if not math.isfinite(scores[-1]):
            raise DataError(f"{row['cell']} has {name} {scores[-1]}: remove it from the tables, and run it again")
    if len({row["metric"] for row in rows}) > 1 and metric is None:
        raise ConfigError(f"runs of {first['method']} were scored by different metrics: give --metric")
    shares = [row["n_selected"] / row["n_pool"] for row in rows if row["n_selected"] is not None]

    def mean(column: str) -> float:
        return float(np.mean([row[column] for row in rows]))

    maximised = first["maximised"] if metric in (None, first["metric"]) else None

    return MethodPoint(
        task=first["task"],
        model=first["model"],
        method=first["method"],
        selector=first["selector"],
        budget=first["budget"],
        metric=metric or first["metric"],
        maximised=higher_is_better(metric or first["metric"]) if maximised is None else maximised,
        seeds=tuple(row["seed"] for row in rows),
        scores=tuple(scores),
        budgets=tuple(row["budget_flops"] for row in rows),
        selection=mean("selection_flops"),
        spent=mean("selection_flops_spent"),
        train_flops=mean("training_flops"),
        full_flops=mean("full_flops"),
        selected=float(np.mean(shares)) if shares else None,
        imported=first["status"] == IMPORTED,
    )


def by_group(points: Iterable[MethodPoint]) -> dict[tuple[str, str], list[MethodPoint]]:
    """Points by (task, model), in order."""
    groups: dict[tuple[str, str], list[MethodPoint]] = {}
    for p in points:
        groups.setdefault(p.group, []).append(p)
    return groups


@dataclass(frozen=True)
class BudgetLevel:
    """One budget of a group, as given and in FLOPs.

    Attributes:
        budget: as given. flops: mean over all seeds of the group. by_seed: FLOPs of each seed.
    """

    budget: str
    flops: float
    by_seed: Mapping[int, float]

    def on(self, seeds: Sequence[int]) -> float:
        """FLOPs, mean over `seeds`; mean over all seeds of the group if one of `seeds` has no such budget."""
        if not all(seed in self.by_seed for seed in seeds):
            return self.flops
        return float(np.mean([self.by_seed[seed] for seed in seeds]))

    def allows(self, p: MethodPoint) -> bool:
        """Whether a point is within the budget: its mean total against the mean budget of the same seeds."""
        return p.total <= self.on(p.seeds) * SLACK


def budgets_of(points: Sequence[MethodPoint]) -> list[BudgetLevel]:
    """The distinct budgets of a group, rising. Two budgets with the same FLOPs count once."""
    by_seed: dict[str, dict[int, float]] = {}
    for p in points:
        for seed, flops in zip(p.seeds, p.budgets, strict=True):
            by_seed.setdefault(p.budget, {}).setdefault(seed, flops)
    levels: dict[float, BudgetLevel] = {}
    for budget, flops_by_seed in by_seed.items():
        # Sorted, so that the last digit of the mean does not depend on the order of the seeds.
        mean = float(np.mean([flops_by_seed[seed] for seed in sorted(flops_by_seed)]))
        levels.setdefault(mean, BudgetLevel(budget, mean, flops_by_seed))
    return [levels[flops] for flops in sorted(levels)]


def within_budget(points: Iterable[MethodPoint], limit: BudgetLevel) -> list[MethodPoint]:
    """The most expensive point of each method whose total is within the budget: the cost-aware utility of CCDS."""
    best: dict[str, MethodPoint] = {}
    for p in points:
        previous = best.get(p.method)
        if limit.allows(p) and (previous is None or p.total > previous.total):
            best[p.method] = p
    return list(best.values())


def better(a: MethodPoint, b: MethodPoint) -> bool:
    """Whether the mean of `a` is strictly better than that of `b`."""
    return a.mean > b.mean if a.maximised else a.mean < b.mean


def best_of(points: Sequence[MethodPoint]) -> MethodPoint:
    """The point with the best mean. Of equal means it is that with the cheaper selection, then the first."""
    ordered = sorted(points, key=lambda p: p.selection)
    best = ordered[0]
    for p in ordered[1:]:
        if better(p, best):
            best = p
    return best


def differs_significantly(a: MethodPoint, b: MethodPoint) -> bool | None:
    """Whether two means differ significantly, by a paired t-test over the seeds that both points have.

    The scores of a pair are of the same data, because seeds draw the data too. None if fewer than two seeds are shared.
    """
    first, second = dict(zip(a.seeds, a.scores, strict=True)), dict(zip(b.seeds, b.scores, strict=True))
    seeds = sorted(set(first) & set(second))
    if len(seeds) < 2:
        return None
    difference = np.array([first[s] - second[s] for s in seeds])
    return bool(abs(difference.mean()) > half_width(difference))


def complete(rivals: Sequence[MethodPoint]) -> list[MethodPoint]:
    """The points with the largest number of seeds. Seeds draw the data, so that points with fewer saw other data."""
    max_seeds = max(len(p.seeds) for p in rivals)
    return [p for p in rivals if len(p.seeds) == max_seeds]


def regrets(points: Sequence[MethodPoint]) -> dict[str, list[tuple[float, float]]]:
    """By method: (budget in FLOPs, difference to the best affordable mean of the grid) for each budget.

    The best of many noisy means is biased upwards, so that regrets are upper estimates.
    """
    result: dict[str, list[tuple[float, float]]] = {}
    for limit in budgets_of(points):
        rivals = within_budget(points, limit)
        if not rivals:
            continue
        ranked = complete(rivals)
        best = best_of(ranked).mean
        for p in ranked:
            result.setdefault(p.method, []).append((limit.flops, abs(best - p.mean)))
    return result
