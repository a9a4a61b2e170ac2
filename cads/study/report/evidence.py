"""What a report shows beside scores: where compute went, what was selected, and how selections overlap."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from cads.accounting.ledger import EVALUATE, TRAIN
from cads.study.analysis.frontier import expected_jaccard, jaccard
from cads.study.tables import DONE, read_file, read_rows

MOST_BUDGETS = 3
"""Budgets at which selections and ledgers are shown: the smallest, one in the middle, the largest."""
MOST_STAGES = 6
"""Stages of selection that a ledger shows by name; the smaller ones are put together."""
LONGEST_TEXT = 400
"""Characters of an example that are shown."""

Row = Mapping[str, Any]
Place = tuple[str, str, str]
"""Task, model and budget."""


@dataclass(frozen=True)
class Overlap:
    """Jaccard overlap of the selections at one place, shape (M, M), and of random ones of the same sizes, (M, M)."""

    place: Place
    methods: list[str]
    matrix: np.ndarray
    expected: np.ndarray


@dataclass(frozen=True)
class ExampleGallery:
    """A few examples that one method kept, and that it left out; each with id, label, text and image (a data URI)."""

    place: Place
    method: str
    kept: list[dict[str, Any]]
    left_out: list[dict[str, Any]]


def by_place(runs: Iterable[Row], most: int = MOST_BUDGETS) -> dict[Place, dict[str, list[Row]]]:
    """Finished runs by task, model and budget, and there by method.

    Args:
        most: budgets of each task and model: the smallest, the largest, and some between; or the middle one alone.
    """
    found: dict[Place, dict[str, list[Row]]] = {}
    for row in runs:
        if row["status"] == DONE:
            place = row["task"], row["model"], row["budget"]
            found.setdefault(place, {}).setdefault(row["method"], []).append(row)
    kept: dict[Place, dict[str, list[Row]]] = {}
    for group in dict.fromkeys(place[:2] for place in found):
        budgets = [place for place in found if place[:2] == group]
        budgets.sort(key=lambda place: next(iter(found[place].values()))[0]["budget_flops"])
        few = np.unique(np.linspace(0, len(budgets) - 1, min(most, len(budgets))).round().astype(int)).tolist()
        kept |= {budgets[i]: found[budgets[i]] for i in ([len(budgets) // 2] if most == 1 else few)}
    return kept


def ledgers(methods: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, float]]:
    """FLOPs by stage of each method, means over seeds; evaluation is left out."""
    spent: dict[str, dict[str, float]] = {}
    for method, rows in methods.items():
        stages: dict[str, float] = {}
        for row in rows:
            for entry in json.loads(row["ledger"]):
                if entry["phase"] != EVALUATE:
                    name = "final training" if entry["phase"] == TRAIN else entry["stage"]
                    stages[name] = stages.get(name, 0.0) + entry["flops"] / len(rows)
        spent[method] = stages
    totals: dict[str, float] = {}
    for stages in spent.values():
        for name, flops in stages.items():
            totals[name] = totals.get(name, 0.0) + flops
    named = ["final training", *sorted(set(totals) - {"final training"}, key=lambda s: -totals[s])[:MOST_STAGES]]
    return {method: _merged(stages, named) for method, stages in spent.items()}


def _merged(stages: Mapping[str, float], named: Sequence[str]) -> dict[str, float]:
    merged = {name: stages[name] for name in named if name in stages}
    rest = sum(flops for name, flops in stages.items() if name not in named)
    return {**merged, "other selection": rest} if rest else merged


def source_shares(folder: Path, methods: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, float]]:
    """Share of each source in what each method selected (percent), over all seeds together; none without sources."""
    shares: dict[str, dict[str, float]] = {}
    for method, rows in methods.items():
        counts: dict[str, float] = {}
        for row in rows:
            found = pc.value_counts(_selection(folder, row["cell"])["source"].drop_null())
            for item in found.to_pylist():
                counts[item["values"]] = counts.get(item["values"], 0.0) + item["counts"]
        if counts:
            total = sum(counts.values())
            shares[method] = {source: 100 * counts[source] / total for source in sorted(counts)}
    return shares


def course(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """The probability of each source at each step of the policy, means over seeds, shape (steps,)."""
    courses = [json.loads(row["probability_course"] or "[]") for row in rows]
    steps = max(map(len, courses))
    sources = list(dict.fromkeys(source for c in courses for step in c for source in step))
    values: dict[str, np.ndarray] = {}
    for source in sources:
        known = np.full((len(courses), steps), np.nan)
        for i, one in enumerate(courses):
            known[i, : len(one)] = [step.get(source, np.nan) for step in one]
        present = ~np.isnan(known)
        values[source] = np.where(present, known, 0).sum(axis=0) / np.maximum(1, present.sum(axis=0))
    return values


def overlap(folder: Path, place: Place, methods: Mapping[str, Sequence[Row]]) -> Overlap | None:
    """How much the selections of the first seed have in common; None if fewer than two methods select."""
    first = {method: min(rows, key=lambda row: row["seed"]) for method, rows in methods.items()}
    ids = {m: _selection(folder, row["cell"])["id"].to_pylist() for m, row in first.items() if row["n_selected"]}
    if len(ids) < 2:
        return None
    names = list(ids)
    matrix = np.eye(len(names))
    for i in range(len(names)):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = jaccard(ids[names[i]], ids[names[j]])
    shares = np.array([first[name]["n_selected"] / first[name]["n_pool"] for name in names])
    expected = np.array([[expected_jaccard(p, q) for q in shares] for p in shares])
    return Overlap(place, names, matrix, expected)


def exhibits(folder: Path, place: Place, methods: Mapping[str, Sequence[Row]]) -> list[ExampleGallery]:
    """What each method kept and left out, in its first seed."""
    made = []
    for method, rows in methods.items():
        key = min(rows, key=lambda row: row["seed"])["cell"]
        shown = [_visible(row) for row in read_rows(folder, "examples", [key])]
        kept, left = [e for e in shown if e["kept"]], [e for e in shown if not e["kept"]]
        if any(e["image"] or e["text"] for e in shown):
            made.append(ExampleGallery(place, method, kept, left))
    return made


def _visible(row: Row) -> dict[str, Any]:
    text = row["text"]
    if text and len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]}…"
    image = row["image"] and f"data:image/png;base64,{base64.b64encode(row['image']).decode()}"
    return {**row, "text": text, "image": image}


def _selection(folder: Path, key: str) -> Any:
    return read_file(folder / "tables" / "selections" / f"{key}.parquet", "selections")
