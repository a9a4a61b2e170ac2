"""What a report shows beside scores: compute by stage, sources and examples selected, and overlap of selections."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from cads.accounting.ledger import EVALUATE, TRAIN
from cads.accounting.stage_labels import stage_label
from cads.study.analysis.frontier import expected_jaccard, jaccard
from cads.study.analysis.points import FREE
from cads.study.analysis.verdicts import shown_name
from cads.study.cells import N_SHOWN
from cads.study.tables import DONE, read_rows, read_table_file

MAX_BUDGETS = 3
"""Budgets at which selections and ledgers are shown: the smallest, one in the middle, the largest."""
MAX_STAGES = 6
"""Stages of selection that a ledger shows by name; the cheaper ones are summed."""
LONGEST_TEXT = 400
"""Characters of an example that are shown."""

Row = Mapping[str, Any]
Place = tuple[str, str, str]
"""Task, model and budget."""


@dataclass(frozen=True)
class Overlap:
    """Jaccard overlap of the selections of M methods, shape (M, M); `expected`: of random ones of the same sizes."""

    place: Place
    methods: list[str]
    matrix: np.ndarray
    expected: np.ndarray


@dataclass(frozen=True)
class ExampleGallery:
    """A few examples that one method selected, and that it rejected: id, label, text and image (a data URI) each.

    `drawn_least`: of a method that keeps everything and draws by weight, those of the least weight.
    """

    place: Place
    method: str
    kept: list[dict[str, Any]]
    drawn_least: list[dict[str, Any]]
    left_out: list[dict[str, Any]]


def by_place(runs: Iterable[Row], max_budgets: int | None = None) -> dict[Place, dict[str, list[Row]]]:
    """Finished runs by task, model and budget, then by method.

    Args:
        max_budgets: of each task and model: the smallest, the largest, and some between. If 1, the middle one. None:
            `MAX_BUDGETS`.
    """
    max_budgets = MAX_BUDGETS if max_budgets is None else max_budgets
    runs_by_place: dict[Place, dict[str, list[Row]]] = {}
    for row in runs:
        if row["status"] == DONE:
            place = row["task"], row["model"], row["budget"]
            runs_by_place.setdefault(place, {}).setdefault(row["method"], []).append(row)
    result: dict[Place, dict[str, list[Row]]] = {}
    for group in dict.fromkeys(place[:2] for place in runs_by_place):
        budgets = [place for place in runs_by_place if place[:2] == group]
        budgets.sort(key=lambda place: next(iter(runs_by_place[place].values()))[0]["budget_flops"])
        even_positions = np.unique(
            np.linspace(0, len(budgets) - 1, min(max_budgets, len(budgets))).round().astype(int)
        ).tolist()
        result |= {
            budgets[i]: runs_by_place[budgets[i]] for i in ([len(budgets) // 2] if max_budgets == 1 else even_positions)
        }
    return result


def ledgers(methods: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, float]]:
    """FLOPs by stage, in words, of each method: means over seeds, without evaluation."""
    spent: dict[str, dict[str, float]] = {}
    for method, rows in methods.items():
        stages: dict[str, float] = {}
        for row in rows:
            for entry in json.loads(row["ledger"]):
                if entry["phase"] != EVALUATE:
                    name = "final training" if entry["phase"] == TRAIN else _merged_trials(stage_label(entry["stage"]))
                    stages[name] = stages.get(name, 0.0) + entry["flops"] / len(rows)
        spent[method] = stages
    totals: dict[str, float] = {}
    for stages in spent.values():
        for name, flops in stages.items():
            totals[name] = totals.get(name, 0.0) + flops
    named = ["final training", *sorted(set(totals) - {"final training"}, key=lambda s: -totals[s])[:MAX_STAGES]]
    return {method: _merged(stages, named) for method, stages in spent.items()}


def _merged_trials(label: str) -> str:
    """Trials of all lengths have one name in a figure."""
    return re.sub(r"^trials, [^,]*", "trials", label)


def _merged(stages: Mapping[str, float], named: Sequence[str]) -> dict[str, float]:
    """FLOPs of the stages in `named`, and the sum of the others."""
    merged = {name: stages[name] for name in named if name in stages}
    rest = sum(flops for name, flops in stages.items() if name not in named)
    return {**merged, "other selection": rest} if rest else merged


def source_shares(folder: Path, methods: Mapping[str, Sequence[Row]]) -> dict[str, dict[str, float]]:
    """Share of each source in what training draws from the pool, of each method, in percent, mean over seeds.

    Methods that draw nothing from the pool, and those whose examples have no source, are left out. Rows of older
    versions do not know the weights of examples: there, the selected examples count equally.
    """
    shares: dict[str, dict[str, float]] = {}
    for method, rows in methods.items():
        sums: dict[str, float] = {}
        for row in rows:
            for source, share in _row_shares(folder, row).items():
                sums[source] = sums.get(source, 0.0) + share
        drawn = {source: share for source, share in sums.items() if share}
        if drawn:
            total = sum(drawn.values())
            shares[method] = {source: 100 * drawn[source] / total for source in sorted(drawn)}
    return shares


def _row_shares(folder: Path, row: Row) -> dict[str, float]:
    """Share of each source in what the training of a run draws from the pool."""
    if (stored := row.get("shares")) is not None:
        return {name: float(share) for name, share in json.loads(stored).items()}
    counts = pc.value_counts(_selection(folder, row["cell"])["source"].drop_null()).to_pylist()
    total = sum(item["counts"] for item in counts)
    return {item["values"]: item["counts"] / total for item in counts}


def course(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """The probability of each source at each step of the policy, means over seeds, shape (steps,)."""
    courses = [json.loads(row["probability_course"] or "[]") for row in rows]
    steps = max(map(len, courses))
    sources = list(dict.fromkeys(source for c in courses for step in c for source in step))
    values: dict[str, np.ndarray] = {}
    for source in sources:
        table = np.full((len(courses), steps), np.nan)
        for i, single in enumerate(courses):
            table[i, : len(single)] = [step.get(source, np.nan) for step in single]
        present = ~np.isnan(table)
        values[source] = np.where(present, table, 0).sum(axis=0) / np.maximum(1, present.sum(axis=0))
    return values


def overlap(folder: Path, place: Place, methods: Mapping[str, Sequence[Row]]) -> Overlap | None:
    """The overlap of the selections of the first seed; None if fewer than two methods leave something out."""
    first = {method: min(rows, key=lambda row: row["seed"]) for method, rows in methods.items()}
    # What keeps everything overlaps with everything.
    partial = {m: row for m, row in first.items() if row["n_selected"] and row["n_selected"] < row["n_pool"]}
    ids = {m: _selection(folder, row["cell"])["id"].to_pylist() for m, row in partial.items()}
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
    """Examples that each method selected and rejected, of its first seed; of methods that tell examples apart."""
    galleries = []
    for method, rows in methods.items():
        first = min(rows, key=lambda row: row["seed"])
        examples = [_visible(row) for row in read_rows(folder, "examples", [first["cell"]])]
        kept, left_out = [e for e in examples if e["kept"]], [e for e in examples if not e["kept"]]
        told_apart = len({e["score"] for e in examples}) > 1
        if first["selector"] in FREE or not any(e["image"] or e["text"] for e in examples):
            continue
        kept, least = (kept[:N_SHOWN], kept[N_SHOWN:]) if told_apart else (kept, [])
        galleries.append(ExampleGallery(place, shown_name(method), kept, least, left_out))
    return galleries


def _visible(row: Row) -> dict[str, Any]:
    """An example with its text cut to `LONGEST_TEXT` and its image as a data URI."""
    text = row["text"]
    if text and len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]}…"
    image = row["image"] and f"data:image/png;base64,{base64.b64encode(row['image']).decode()}"
    return {**row, "text": text, "image": image}


def _selection(folder: Path, key: str) -> Any:
    """The rows of `selections` of one cell."""
    return read_table_file(folder / "tables" / "selections" / f"{key}.parquet", "selections")
