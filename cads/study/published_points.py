"""Published points of other work, as rows of results."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cads.errors import DataError
from cads.study.tables import IMPORTED, write_rows

PUBLISHED_COLUMNS = ("task", "size", "method", "budget_pct", "total_flops", "score")
FREE_BELOW = 1e-3
"""Selection that costs a smaller share of full training than this is the rounding of published figures."""
SIZES = {"m": 1e6, "b": 1e9, "t": 1e12}
"""What the letter behind a model's size stands for."""


def import_points(path: Path | str, folder: Path) -> int:
    """Take published points over into the tables of a study; returns how many.

    The format: a CSV file with columns task, size, method, budget_pct (share of the pool trained on, percent),
    total_flops (selection and training) and score. Training on everything costs what the cheapest method pays at
    100 percent; what a method pays beyond its share of that is its selection.

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
            raise DataError(f"{path}: {' '.join(group)} has no point at budget_pct 100, which says what all costs")
        name = f"{p['task']} {p['size']} {p['method']} {p['budget_pct']:g} %"
        if name in seen:
            raise DataError(f"{path}: {name} is given twice: keep one of the points")
        seen.add(name)
        rows.append(_published_row(p, full[group], name))
    for row in rows:
        # A file each, so that a point that is imported again, or corrected, takes the place of what it was.
        write_rows(folder, "runs", f"import-{hashlib.sha256(row['cell'].encode()).hexdigest()[:12]}", [row])
    return len(rows)


def _read_points(path: Path) -> list[dict[str, Any]]:
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
        sound = all(map(math.isfinite, numbers.values())) and 0 < numbers["budget_pct"] <= 100
        if not sound or numbers["total_flops"] <= 0:
            raise DataError(f"{path}, line {line}: {numbers}: need 0 < budget_pct <= 100 and total_flops > 0")
        points.append({**row, **numbers})
    if not points:
        raise DataError(f"{path} has no points: it holds a header alone")
    return points


def _published_row(point: Mapping[str, Any], full: float, name: str) -> dict[str, Any]:
    training = point["budget_pct"] / 100 * full
    selection = point["total_flops"] - training
    if selection < FREE_BELOW * full:
        training, selection = point["total_flops"], 0.0
    return {
        "cell": f"imported {name}",
        "task": point["task"],
        "model": point["size"],
        "n_parameters": parameters_of(point["size"]),
        "method": point["method"],
        "selector": point["method"],
        "options": "{}",
        "budget": f"{point['budget_pct']:g} %",
        "budget_flops": point["budget_pct"] / 100 * full,
        "count_selection": False,
        "sharing": 1.0,
        "seed": 0,
        "status": IMPORTED,
        "metric": "score",
        "score": point["score"],
        "metrics": json.dumps({"score": point["score"]}),
        "selection_flops": selection,
        "selection_flops_spent": selection,
        "training_flops": training,
        "total_flops": point["total_flops"],
        "full_flops": full,
        "accounting": "as published",
        "ledger": json.dumps(
            [
                {"phase": "select", "stage": "as published", "flops": selection},
                {"phase": "train", "stage": "final model", "flops": training},
            ]
        ),
        "source_probability": "{}",
        "probability_course": "[]",
        "notes": "{}",
    }


def parameters_of(size: str) -> float | None:
    """How many parameters a size such as `7b` or `135M` stands for; None if it is no such size."""
    number, letter = size[:-1], size[-1:].lower()
    try:
        return float(number) * SIZES[letter]
    except (KeyError, ValueError):
        return None
