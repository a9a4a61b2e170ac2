"""Published points of other work, imported as rows of the table `runs`."""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cads.errors import DataError
from cads.study.run_row import run_row
from cads.study.tables import IMPORTED, write_rows

PUBLISHED_COLUMNS = ("task", "size", "method", "budget_pct", "total_flops", "score")
FREE_BELOW = 1e-3
"""Selection below this share of full training counts as free: it is the rounding of published figures."""
SIZES = {"m": 1e6, "b": 1e9, "t": 1e12}
"""Parameters that the letter after a model's size stands for."""


def import_points(path: Path | str, folder: Path) -> int:
    """Import published points into the tables of a study.

    The format is a CSV file with columns task, size, method, budget_pct (share of the pool trained on, percent),
    total_flops (selection and training) and score. The cost of training on the whole pool is that of the cheapest
    method at 100 percent. Training costs budget_pct of it; the rest of a point's total_flops is its selection.

    Returns:
        the number of points.

    Raises:
        DataError: if columns are missing, values are no numbers, a task and size has no point at 100 percent, or a
            point is given twice.
    """
    points = _read_points(Path(path))
    full: dict[tuple[str, str], float] = {}
    for p in points:
        if p["budget_pct"] == 100:
            key = p["task"], p["size"]
            full[key] = min(full.get(key, math.inf), p["total_flops"])
    rows, seen = [], set()
    for p in points:
        group = p["task"], p["size"]
        if group not in full:
            raise DataError(f"{path}: {' '.join(group)} has no point at budget_pct 100, the cost of training on all")
        name = f"{p['task']} {p['size']} {p['method']} {p['budget_pct']:g} %"
        if name in seen:
            raise DataError(f"{path}: {name} is given twice: keep one of the points")
        seen.add(name)
        rows.append(_published_row(p, full[group], name))
    for row in rows:
        # One file for each point, so that a point that is imported again, or corrected, replaces its old row.
        write_rows(folder, "runs", f"import-{hashlib.sha256(row['cell'].encode()).hexdigest()[:12]}", [row])
    return len(rows)


def _read_points(path: Path) -> list[dict[str, Any]]:
    """The rows of the CSV file, with checked numbers."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"points {path} cannot be read: {error}") from error
    reader = csv.DictReader(text.splitlines())
    missing = [c for c in PUBLISHED_COLUMNS if c not in (reader.fieldnames or [])]
    if missing:
        raise DataError(f"{path} has no columns {missing}: it needs {', '.join(PUBLISHED_COLUMNS)}")
    points = []
    for line, row in enumerate(reader, start=2):
        try:
            numbers = {name: float(row[name]) for name in PUBLISHED_COLUMNS[3:]}
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}, line {line}: {error}: budget_pct, total_flops and score are numbers") from error
        valid = all(map(math.isfinite, numbers.values())) and 0 < numbers["budget_pct"] <= 100
        if not valid or numbers["total_flops"] <= 0:
            raise DataError(f"{path}, line {line}: {numbers}: need 0 < budget_pct <= 100 and total_flops > 0")
        points.append({**row, **numbers})
    if not points:
        raise DataError(f"{path} has no points: it holds a header alone")
    return points


def _published_row(point: Mapping[str, Any], full_flops: float, name: str) -> dict[str, Any]:
    """The row of `runs` of a point; `full_flops`: cost of training on the whole pool."""
    train_flops = point["budget_pct"] / 100 * full_flops
    selection_flops = point["total_flops"] - train_flops
    if selection_flops < FREE_BELOW * full_flops:
        train_flops, selection_flops = point["total_flops"], 0.0
    return run_row(
        IMPORTED,
        cell=f"imported {name}",
        task=point["task"],
        model=point["size"],
        method=point["method"],
        selector=point["method"],
        options={},
        budget=f"{point['budget_pct']:g} %",
        count_selection=False,
        sharing=1.0,
        seed=0,
        n_parameters=parameters_of(point["size"]),
        budget_flops=point["budget_pct"] / 100 * full_flops,
        metric="score",
        score=point["score"],
        metrics={"score": point["score"]},
        selection_flops=selection_flops,
        selection_flops_spent=selection_flops,
        training_flops=train_flops,
        total_flops=point["total_flops"],
        full_flops=full_flops,
        accounting="as published",
        ledger=[
            {"phase": "select", "stage": "as published", "flops": selection_flops},
            {"phase": "train", "stage": "final model", "flops": train_flops},
        ],
        source_probability={},
        probability_course=[],
        notes={},
    )


def parameters_of(size: str) -> float | None:
    """The number of parameters of a size such as `7b` or `135M`; None if `size` is not of this form."""
    number, letter = size[:-1], size[-1:].lower()
    try:
        return float(number) * SIZES[letter]
    except (KeyError, ValueError):
        return None
