"""A grid that runs in a second."""

from __future__ import annotations

from pathlib import Path

import yaml
from rich.console import Console

from cads.study.grid import read_grid
from cads.study.runner import Study
from cads.study.shard import GridShard
from cads.study.tables import read_runs

GRID = {
    "task": {
        "hidden": 16,
        "n_pool": 80,
        "n_target": 30,
        "n_test": 100,
        "sources": [{"name": "clean"}, {"name": "noise 90 %", "label_noise": 0.9}],
    },
    "train": {"batch_size": 8, "learning_rate": 0.003},
    "budgets": ["2 epochs", "4 epochs"],
    "seeds": 2,
    "methods": [
        "full",
        {"method": "random", "options": {"epochs": 8}},
        {"method": "source", "label": "only clean", "options": {"name": "clean"}},
    ],
}


def grid_file(folder: Path, **changes) -> Path:
    """Write the grid, but for `changes`."""
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**GRID, **changes}))
    return path


def run(folder: Path, out: str = "out", shard: str = "1/1", **changes) -> list[dict]:
    """Run a shard of the grid; returns its rows."""
    study = Study(read_grid(grid_file(folder, **changes)), folder / out, Console(quiet=True))
    study.run(study.plan(), GridShard.parse(shard))
    return read_runs(folder / out)
