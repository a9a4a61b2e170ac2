"""Results of a language experiment as Markdown: scores, learned probabilities, and some of the examples."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cads.selection import Selection
from cads.study.analysis.points import MethodPoint, by_group, half_width, points_of
from cads.study.analysis.verdicts import answers
from cads.study.grid import Grid
from cads.study.report.text_tables import intervals, markdown_table
from cads.study.tables import DONE, read_runs

N_EXAMPLES = 10
"""Number of the most probable examples that are shown, and of the least probable ones."""
MAX_CHARACTERS = 160
"""Characters of an example that are shown; longer ones are cut."""
CHOICES = "choices"
UNSELECTED = ("full", "random")
"""Reference methods; the others are compared with these."""


def report(
    grid: Grid, title: str, command: str, description: Sequence[str], out: Path, texts: Mapping[str, str]
) -> str:
    """The page of a finished experiment.

    Args:
        grid: that was run. title: of the page. command: that made it. description: sentences on data and models.
        out: folder of the study. texts: question and answer of pool examples, by id.
    """
    runs = [row for row in read_runs(out) if row["status"] == DONE]
    points = points_of(runs)
    covers = "covers selection and training" if grid.count_selection else "is that of training alone"
    parts = [
        f"# {title}: {intervals(points)}",
        f"    {command}",
        " ".join(description),
        f"The budget {covers}, but where a method says otherwise: `all in` pays for its selection from it, `on top` "
        "does not. Columns of selection and training are FLOPs; * marks the best of each budget.",
        f"## Test {points[0].metric}",
        markdown_table(points),
    ]
    if all(CHOICES in json.loads(row["metrics"]) for row in runs):
        parts += ["## Multiple choice: the likeliest of four answers", markdown_table(points_of(runs, CHOICES))]
    sentences = [f"- {a.sentence}" for group in by_group(points).values() for a in answers(group)]
    parts += ["## What to use", "\n".join(sentences)]
    better = "above" if points[0].maximised else "below"
    note = f"Of test {points[0].metric}, paired over seeds: {better} 0 the method is better than the one it is against."
    parts += ["## Differences", note, differences(points), "## Learned probabilities", probabilities(runs)]
    return "\n\n".join([*parts, *examples(runs, out, texts)]) + "\n"


def differences(points: Sequence[MethodPoint]) -> str:
    """Difference of each method that spends on selection to each method that does not, with paired intervals."""
    lines = ["| model | budget | method | against | difference | interval |", "| --- | --- | --- | --- | --- | --- |"]
    for group in by_group(points).values():
        for p in group:
            rivals = [q for q in group if q.budget == p.budget and q.selector in UNSELECTED]
            lines += [
                f"| {p.model} | {p.budget} | {p.method} | {q.method} | {_difference(p, q)} |"
                for q in rivals
                if p.selector not in UNSELECTED
            ]
    return "\n".join(lines)


def _difference(a: MethodPoint, b: MethodPoint) -> str:
    """Mean difference of two points over the seeds both have, and the half-width of its interval, as two cells."""
    first, second = dict(zip(a.seeds, a.scores, strict=True)), dict(zip(b.seeds, b.scores, strict=True))
    pairs = np.array([first[s] - second[s] for s in sorted(set(first) & set(second))])
    if not len(pairs):
        return "- | -"
    width = half_width(pairs)
    return f"{pairs.mean():+.4f} | {'-' if math.isnan(width) else f'± {width:.4f}'}"


def probabilities(runs: Sequence[Mapping[str, Any]]) -> str:
    """Probability of each source at the end of selection, mean over seeds, by model, budget and method."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in runs:
        if json.loads(row["probability_course"] or "[]"):
            groups.setdefault((row["model"], row["budget"], row["method"]), []).append(row)
    if not groups:
        return "No budget bought a search: nothing was learned."
    names = list(dict.fromkeys(n for rows in groups.values() for r in rows for n in _learned(r)))
    lines = [
        "| " + " | ".join(["model", "budget", "method", *names, "full pool returned"]) + " |",
        "| " + " | ".join(["---"] * (len(names) + 4)) + " |",
    ]
    for setting, rows in groups.items():
        means = [float(np.mean([_learned(r).get(n, np.nan) for r in rows])) for n in names]
        full_pools = sum("not beaten" in json.loads(r["notes"]).get("guard", "") for r in rows)
        lines.append("| " + " | ".join([*setting, *(f"{m:.2f}" for m in means), f"{full_pools} of {len(rows)}"]) + " |")
    return "\n".join(lines)


def _learned(row: Mapping[str, Any]) -> dict[str, float]:
    last: dict[str, float] = json.loads(row["probability_course"])[-1]
    return last


def examples(runs: Sequence[Mapping[str, Any]], out: Path, texts: Mapping[str, str]) -> list[str]:
    """Most and least probable examples of the costliest selection of single examples with the first seed.

    Selections that give all examples the same probability are passed over: a search that does not beat the full pool
    returns the full pool.
    """
    single = [r for r in runs if r["selector"] in ("cads", "cads-e") and json.loads(r["probability_course"] or "[]")]
    if not single:
        return []
    single.sort(key=lambda r: (r["seed"], -r["budget_flops"], -r["selection_flops_spent"]))
    for row in single:
        selection = Selection.load(out / "cells" / row["cell"])
        if np.ptp(selection.probability) > 0:
            break
    else:
        return ["## Examples", "The full pool was not beaten: all examples have the same probability."]
    order = np.argsort(selection.rank, kind="stable")
    parts = [f"## Examples ({row['method']}, {row['budget']}, seed {row['seed']})"]
    for name, positions in (("Most probable", order[:N_EXAMPLES]), ("Least probable", order[::-1][:N_EXAMPLES])):
        lines = ["| probability | id | example |", "| --- | --- | --- |"]
        for i in positions:
            example_id = selection.ids[int(i)].as_py()
            text = texts.get(example_id, "").replace("|", "\\|").replace("\n", " ")
            cut = text if len(text) <= MAX_CHARACTERS else text[:MAX_CHARACTERS] + " ..."
            lines.append(f"| {selection.probability[i]:.3f} | {example_id} | {cut} |")
        parts += [f"{name}:", "\n".join(lines)]
    return parts
