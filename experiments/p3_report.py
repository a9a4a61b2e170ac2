"""The page of the experiment on P3: bars, test loss, paired differences, and what `cads` drew."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cads.study.analysis.points import MethodPoint, by_group, half_width, points_of
from cads.study.report.text_tables import intervals, markdown_table
from experiments.p3_data import data_set_of

CADS, JOINT, TARGET_ONLY = "cads", "joint", "target-only"
REFERENCES = ("joint", "joint .5", "joint, stop", "full")
"""Methods of which `cads` may not be above the best by more than `ABOVE_BEST`."""
ABOVE_BEST, ABOVE_TARGET_ONLY = 0.02, 0.05
"""Nats."""
AGAINST = ("joint", "joint .5", "joint, stop", "target-only", "target-only, stop", "full", "bm25 and target")
ALL = "all"
"""What stands for the target in rows over all of them."""
MOST_DATA_SETS, MOST_TEMPLATES = 6, 4
"""Data sets, and templates, that are named as drawn most."""

Run = Mapping[str, Any]


def report(title: str, command: str, description: Sequence[str], runs: Sequence[Run], *, figure: bool) -> str:
    """The page of the finished cells.

    Args:
        title: of the page. command: that made it. description: sentences on data and models.
        runs: rows of the table `runs`; `seed` is the seed of the data.
        figure: whether one of what was drawn stands beside the page.
    """
    points = points_of(runs)
    if not points:
        return f"# {title}: no cell is finished\n"
    return "\n\n".join(
        [
            f"# {title}: {intervals(points)}",
            f"    {command}",
            " ".join(description),
            "The budget covers selection and training. Columns of selection and training are FLOPs; * marks the lowest "
            "loss of each budget. Differences are in nats, paired over seeds, with 95 % t-intervals; below 0 `cads` is "
            "better. Each seed draws target, test set, templates and pool anew.",
            "## Bars",
            f"`cads` is at most {ABOVE_BEST} nats above the best of {', '.join(REFERENCES)} (the lowest mean), at most "
            f"{ABOVE_TARGET_ONLY} above {TARGET_ONLY}, and below {JOINT}.",
            bars(points),
            "## Differences",
            differences(points),
            "## Test loss",
            markdown_table(points),
            "## What `cads` drew",
            "Shares of what it drew from the pool, and in brackets by how much they exceed shares of the pool: means "
            "over seeds. Where several seeds were run, what only one of them had in its pool is not shown.",
            draws(runs),
            *([f"![What was drawn of each data set]({title}.png)"] if figure else []),
        ]
    )


def bars(points: Sequence[MethodPoint]) -> str:
    """Each bar in each cell, and whether it is held."""
    rows = []
    for group in by_group(points).values():
        for budget, methods in _by_budget(group).items():
            ours, references = methods.get(CADS), [methods[name] for name in REFERENCES if name in methods]
            if ours is None or not {JOINT, TARGET_ONLY} <= set(methods):
                continue
            best = min(references, key=lambda p: p.mean)
            target_only, joint = (pairs(ours, methods[name]) for name in (TARGET_ONLY, JOINT))
            rows.append(
                [
                    ours.task,
                    budget,
                    str(len(ours.seeds)),
                    best.method,
                    f"{difference(ours, best)} {_held(pairs(ours, best).mean() <= ABOVE_BEST)}",
                    f"{difference(ours, methods[TARGET_ONLY])} {_held(target_only.mean() <= ABOVE_TARGET_ONLY)}",
                    f"{difference(ours, methods[JOINT])} {_below(joint)}",
                ]
            )
    head = ["target", "budget", "seeds", "best", "cads - best", f"cads - {TARGET_ONLY}", f"cads - {JOINT}"]
    return table(head, rows)


def differences(points: Sequence[MethodPoint]) -> str:
    """`cads` less each other method, in each cell, and over all targets: their seeds are independent draws."""
    rows = []
    pooled: dict[str, dict[str, list[np.ndarray]]] = defaultdict(lambda: defaultdict(list))
    for group in by_group(points).values():
        for budget, methods in _by_budget(group).items():
            if ours := methods.get(CADS):
                found = {name: pairs(ours, methods[name]) for name in AGAINST if name in methods}
                for name, values in found.items():
                    pooled[budget][name].append(values)
                cells = [_interval(found[name]) if name in found else "-" for name in AGAINST]
                rows.append([ours.task, budget, str(len(ours.seeds)), *cells])
    for budget, methods_of in pooled.items():
        joined = {name: np.concatenate(parts) for name, parts in methods_of.items()}
        cells = [_interval(joined[name]) if name in joined else "-" for name in AGAINST]
        rows.append([ALL, budget, str(max(map(len, joined.values()))), *cells])
    return table(["target", "budget", "seeds", *AGAINST], rows)


def draws(runs: Sequence[Run]) -> str:
    """What `cads` drew most and least often for its size, in each cell."""
    groups: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for row in runs:
        # A run that bought the target alone draws nothing from the pool.
        if row["method"] == CADS and row["n_selected"]:
            groups[row["task"], row["budget"]].append(row)
    rows, tasks = [], list(dict.fromkeys(task for task, _ in groups))
    for (task, budget), members in sorted(groups.items(), key=lambda x: (tasks.index(x[0][0]), _passes(x[0][1]))):
        shares = [json.loads(row["shares"]) for row in members]
        by_set, by_template = ratios(shares, data_set_of), ratios(shares, str)
        own = next((ratio for name, _, _, ratio in by_set if name == task), math.nan)
        rows.append(
            [
                task,
                budget,
                "-" if math.isnan(own) else f"{own:.1f}",
                ", ".join(_drawn(x) for x in by_set[:MOST_DATA_SETS]),
                ", ".join(_drawn(x) for x in by_set[::-1][: MOST_DATA_SETS // 2]),
                ", ".join(f"{name} {ratio:.1f}" for name, _, _, ratio in by_template[:MOST_TEMPLATES]),
            ]
        )
    head = ["target", "budget", "target's own templates, times", "data sets drawn most: share (times its size)"]
    return table([*head, "least", "templates drawn most, times"], rows)


def ratios(shares: Sequence[Mapping[str, float]], name_of: Any) -> list[tuple[str, float, float, float]]:
    """(name, share drawn, share of the pool, their ratio), the highest ratio first; means over the seeds with it."""
    drawn, sizes = defaultdict(list), defaultdict(list)
    for share in shares:
        by_name: dict[str, float] = defaultdict(float)
        size_of: dict[str, float] = defaultdict(float)
        for template, value in share.items():
            by_name[name_of(template)] += value
            size_of[name_of(template)] += 1 / len(share)
        for name, value in by_name.items():
            drawn[name].append(value)
            sizes[name].append(size_of[name])
    least = min(2, len(shares))
    found = [
        (name, float(np.mean(values)), float(np.mean(sizes[name])), float(np.mean(values) / np.mean(sizes[name])))
        for name, values in drawn.items()
        if len(values) >= least
    ]
    return sorted(found, key=lambda x: -x[3])


def _passes(budget: str) -> float:
    """The number of a budget such as "2 epochs"."""
    return float(budget.split(maxsplit=1)[0])


def _drawn(entry: tuple[str, float, float, float]) -> str:
    name, share, _, ratio = entry
    return f"{name} {share:.0%} ({ratio:.1f})"


def _by_budget(points: Sequence[MethodPoint]) -> dict[str, dict[str, MethodPoint]]:
    result: dict[str, dict[str, MethodPoint]] = {}
    for p in points:
        result.setdefault(p.budget, {})[p.method] = p
    return result


def pairs(a: MethodPoint, b: MethodPoint) -> np.ndarray:
    """Differences over the seeds that both have."""
    left, right = dict(zip(a.seeds, a.scores, strict=True)), dict(zip(b.seeds, b.scores, strict=True))
    return np.array([left[seed] - right[seed] for seed in sorted(set(left) & set(right))])


def difference(a: MethodPoint, b: MethodPoint) -> str:
    """The mean of `a` less that of `b` over the seeds that both have, with its interval."""
    return _interval(pairs(a, b))


def _interval(found: np.ndarray) -> str:
    """The mean of paired differences, with its interval; one pair has none."""
    width = half_width(found)
    return f"{found.mean():+.3f}" + ("" if math.isnan(width) else f" ± {width:.3f}")


def _held(holds: bool) -> str:
    return "yes" if holds else "**no**"


def _below(found: np.ndarray) -> str:
    """Whether the interval of the mean is below 0; one pair has none."""
    return "one seed" if len(found) < 2 else _held(bool(found.mean() + half_width(found) < 0))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
