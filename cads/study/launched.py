"""A grid in shards that a launcher starts: one job a cell, or a batch of cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cads.launch.launcher import Job
from cads.study.cells import CellPlan
from cads.study.runner import Study
from cads.study.shard import GridShard, units_of
from cads.study.tables import DONE, read_table_file


class LaunchedGrid:
    """The jobs of a grid, and which of them have something left to do.

    A cell that fails by itself is not started again by the same launch; one whose process is lost is.

    Args:
        study: the grid in its folder. plans: of all its cells. of: how many shards; at most one for each unit.
    """

    def __init__(self, study: Study, plans: Sequence[CellPlan], of: int) -> None:
        self._study, self._plans = study, list(plans)
        self._of = max(1, min(of, len(units_of(plans))))
        self._parts = {i: GridShard(i, self._of).part(plans) for i in range(1, self._of + 1)}
        self._before = {plan.key: self._stamp(plan) for plan in plans}

    def pending(self) -> list[Job]:
        """The shards with a cell that has not ended."""
        config = str(self._study.folder / "config.yaml")
        out = str(self._study.folder)
        return [
            Job(f"cells-{i}-of-{self._of}", ("compare", config, "--out", out, "--shard", f"{i}/{self._of}"))
            for i, part in self._parts.items()
            if any(not self._ended(plan) for plan in part)
        ]

    def _ended(self, plan: CellPlan) -> bool:
        path = self._path(plan)
        if not path.exists():
            return False
        if self._stamp(plan) != self._before[plan.key]:
            return True
        status = read_table_file(path, "runs").column("status")[0].as_py()
        return bool(status == DONE or (plan.status and status == plan.status))

    def _stamp(self, plan: CellPlan) -> int | None:
        path = self._path(plan)
        return path.stat().st_mtime_ns if path.exists() else None

    def _path(self, plan: CellPlan) -> Path:
        return self._study.folder / "tables" / "runs" / f"{plan.key}.parquet"
