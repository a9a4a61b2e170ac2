"""The page of the experiment on P3 with rankings and searches: `cads` less each method, over targets and by target."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from cads.study.analysis.points import MethodPoint, best_of, complete, half_width, points_of
from cads.study.analysis.verdicts import shown_name
from cads.study.report.text_tables import intervals, markdown_table
from cads.study.tables import DONE, OVER_BUDGET
from experiments.p3_data import CHOICES, data_set_of
from experiments.p3_report import CADS, Run, difference, draws, pairs, table

BEST = "best of the others"
"""The row of the best rival in each cell."""
ABOVE_CHANCE = 0.05
"""Accuracy above that of blind guesses from which a method is said to do more than guess."""
Questions = Mapping[str, tuple[str, float]]
"""By target: how many questions a seed has, in words, and the accuracy of blind guesses."""


def rivals_report(
    title: str,
    command: str,
    description: Sequence[str],
    runs: Sequence[Run],
    questions: Questions,
    figures: Mapping[str, str],
) -> str:
    """The page of the finished cells.

    Args:
        title: of the page. command: that made it. description: sentences on data and models.
        runs: rows of the table `runs`, those over their budget too; `seed` is the seed of the data.
        questions: of the targets whose answers are choices. figures: files beside the page, by caption.
    """
    points = points_of(runs)
    if not points:
        return f"# {title}: no cell is finished\n"
    budgets = list(dict.fromkeys(p.budget for p in points))
    parts = [
        f"# {title}: {intervals(points)}",
        f"    {command}",
        " ".join(description),
        "The budget covers selection and training: rankings and searches pay for their models and scores from it. "
        "Differences are in nats of test loss, paired over seeds, with 95 % t-intervals; below 0 `cads` is better. "
        "Each seed draws target, test set, templates and pool anew.",
        *_unaffordable(runs),
        "## Where `cads` stands",
        standing(points),
        *[f"![{caption}]({file})" for caption, file in figures.items()],
        "## `cads` less each method",
        "Means over targets and seeds, in brackets the number of pairs of the two; a dash: over budget, or not run. "
        "The last row is against the best of the others at each target and budget, by its mean over seeds, which is "
        "known only afterwards.",
        over_targets(points, budgets),
        *_by_target(points, budgets),
        *_accuracy(runs, budgets, questions),
        "## The target's own templates in what was trained on",
        "How many times its share of the pool is what a method drew of the templates of the target's own data set: "
        "means over targets and seeds. Without a choice it is 1.",
        own_templates(runs, budgets),
        "## What `cads` drew",
        "Shares of what it drew from the pool, and in brackets by how much they exceed shares of the pool: means "
        "over seeds. Where several seeds were run, what only one of them had in its pool is not shown.",
        draws(runs),
        "## Test loss",
        "Columns of selection and training are FLOPs; * marks the lowest loss of each budget.",
        markdown_table(points),
    ]
    return "\n\n".join(parts)


def standing(points: Sequence[MethodPoint]) -> str:
    """The best method of each target and budget, and the rank and the distance of `cads`."""
    rows, ranks = [], []
    for (target, budget), methods in _places(points).items():
        rivals = complete(list(methods.values()))
        if (ours := methods.get(CADS)) not in rivals:
            continue
        ranked = sorted(rivals, key=lambda p: p.mean)
        best = best_of([p for p in ranked if p is not ours])
        ranks.append(ranked.index(ours) + 1)
        rows.append([target, budget, str(len(ours.seeds)), f"{ranks[-1]} of {len(ranked)}", shown_name(best.method)])
        rows[-1].append(difference(ours, best))
    first = sum(rank == 1 for rank in ranks)
    sentence = (
        f"`cads` has the lowest mean test loss in {first} of {len(ranks)} pairs of target and budget. "
        "Methods that lack a seed that others have are not ranked."
    )
    head = ["target", "budget", "seeds", "rank of `cads`", "best of the others", "cads - best of the others"]
    return f"{sentence}\n\n{table(head, rows)}"


def over_targets(points: Sequence[MethodPoint], budgets: Sequence[str]) -> str:
    """`cads` less each other method: means over targets and seeds, by budget."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (_, budget), methods in _places(points).items():
        if (ours := methods.get(CADS)) is None:
            continue
        others = [p for p in methods.values() if p is not ours]
        for p in others:
            found[p.method][budget] += pairs(ours, p).tolist()
        if rivals := [p for p in complete([ours, *others]) if p is not ours]:
            found[BEST][budget] += pairs(ours, best_of(rivals)).tolist()
    names = [*_methods(points), BEST]
    rows = [[shown_name(name), *(_mean(found[name][budget]) for budget in budgets)] for name in names if name in found]
    return table(["method", *budgets], rows)


def _by_target(points: Sequence[MethodPoint], budgets: Sequence[str]) -> list[str]:
    """`cads` less each other method, a table for each target where there are several."""
    places, targets = _places(points), list(dict.fromkeys(p.task for p in points))
    blocks = ["## By target"]
    for target in targets if len(targets) > 1 else []:
        rows = []
        for name in _methods(p for p in points if p.task == target):
            at = [places.get((target, budget), {}) for budget in budgets]
            rows.append([shown_name(name), *(_less(methods.get(CADS), methods.get(name)) for methods in at)])
        blocks.append(f"### {target}\n\n{table(['method', *budgets], rows)}")
    return blocks if len(targets) > 1 else []


def own_templates(runs: Sequence[Run], budgets: Sequence[str]) -> str:
    """How many times its share of the pool each method drew of the target's own data set."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in runs:
        # A run that bought the target alone draws nothing from the pool.
        if row["status"] != DONE or not row["n_selected"] or not row["shares"]:
            continue
        shares: Mapping[str, float] = json.loads(row["shares"])
        own = [value for template, value in shares.items() if data_set_of(template) == row["task"]]
        if own:
            found[row["method"]][row["budget"]].append(float(np.mean(own)) * len(shares))
    rows = [
        [shown_name(name), *(f"{np.mean(by[budget]):.1f}" if by[budget] else "-" for budget in budgets)]
        for name, by in found.items()
    ]
    return table(["method", *budgets], rows)


def _accuracy(runs: Sequence[Run], budgets: Sequence[str], questions: Questions) -> list[str]:
    """Accuracy of the targets whose answers are choices; of a target at which all methods guess, a sentence."""
    blocks = []
    for target, (n_questions, chance) in questions.items():
        members = [row for row in runs if row["task"] == target and row["status"] == DONE]
        if not members or not all(CHOICES in json.loads(row["metrics"]) for row in members):
            continue
        points = points_of(members, CHOICES)
        by_method: dict[str, list[float]] = defaultdict(list)
        for p in points:
            by_method[p.method].append(p.mean)
        means = {name: float(np.mean(values)) for name, values in by_method.items()}
        said = f"{n_questions} questions a seed; blind guesses are right in {chance:.1%}."
        if max(means.values()) < chance + ABOVE_CHANCE:
            low, high = min(means.values()), max(means.values())
            said += f" No method does more than guess: {low:.1%} to {high:.1%}, by its mean over budgets."
            blocks.append(f"{target}: {said}")
            continue
        places = _places(points)
        rows = []
        for name in by_method:
            at = [places.get((target, budget), {}).get(name) for budget in budgets]
            rows.append([shown_name(name), *("-" if p is None else _percent(p) for p in at)])
        blocks.append(f"{target}: {said}\n\n{table(['method', *budgets], rows)}")
    if not blocks:
        return []
    note = (
        "Share of questions of the test set, in percent, whose right answer is the likeliest of the options that a "
        "template of the same row lists; means over seeds with 95 % t-intervals. Options are cut at the length of all "
        "texts."
    )
    return ["## Accuracy", note, *blocks]


def _unaffordable(runs: Sequence[Run]) -> list[str]:
    """In how many runs the budget did not buy the selection, by method and budget."""
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for row in runs:
        counts[row["method"], row["budget"]] += row["status"] == OVER_BUDGET
    named = [f"{shown_name(name)} at {budget} ({n})" for (name, budget), n in counts.items() if n]
    return [f"Over budget, the scores alone, in numbers of runs: {', '.join(named)}."] if named else []


def _places(points: Iterable[MethodPoint]) -> dict[tuple[str, str], dict[str, MethodPoint]]:
    """The points by target and budget, then by method."""
    found: dict[tuple[str, str], dict[str, MethodPoint]] = defaultdict(dict)
    for p in points:
        found[p.task, p.budget][p.method] = p
    return dict(found)


def _methods(points: Iterable[MethodPoint]) -> list[str]:
    """All methods but `cads`, in order."""
    return [name for name in dict.fromkeys(p.method for p in points) if name != CADS]


def _less(ours: MethodPoint | None, other: MethodPoint | None) -> str:
    return "-" if ours is None or other is None or not len(pairs(ours, other)) else difference(ours, other)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    width = half_width(values)
    return f"{np.mean(values):+.3f}" + ("" if math.isnan(width) else f" ± {width:.3f}") + f" ({len(values)})"


def _percent(p: MethodPoint) -> str:
    return f"{100 * p.mean:.1f}" + ("" if math.isnan(p.half_width) else f" ± {100 * p.half_width:.1f}")
