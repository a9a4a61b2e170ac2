"""A row of the table `runs`: every row, of any status, is built here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

JSON_COLUMNS = ("options", "metrics", "ledger", "source_probability", "shares", "probability_course", "notes")
"""Columns that are stored as JSON text."""


def run_row(
    status: str,
    *,
    cell: str,
    task: str,
    model: str,
    method: str,
    selector: str,
    options: Mapping[str, Any],
    budget: str,
    count_selection: bool,
    sharing: float,
    seed: int,
    **columns: Any,
) -> dict[str, Any]:
    """A row of the table `runs`. Columns that are not given are stored as null.

    Args:
        status: one of the states in `cads.study.tables`.
        cell, task, model, method, selector, options, budget, count_selection, sharing, seed: columns of every row.
        columns: further columns by name. Values of `JSON_COLUMNS` are encoded here; selectors may note what JSON does
            not know, which becomes text.
    """
    row: dict[str, Any] = {
        "cell": cell,
        "task": task,
        "model": model,
        "method": method,
        "selector": selector,
        "options": options,
        "budget": budget,
        "count_selection": count_selection,
        "sharing": sharing,
        "seed": seed,
        "status": status,
        **columns,
    }
    for name in JSON_COLUMNS:
        if name in row:
            row[name] = json.dumps(row[name], default=str if name == "notes" else None)
    return row
