"""The part of a grid that one machine runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cads.runtime.shard import Shard
from cads.study.cells import CellPlan, price


@dataclass(frozen=True)
class GridShard(Shard):
    """The `index`-th (1-based) of `of` parts of a grid. All parts cost about the same FLOPs."""

    def part(self, plans: Sequence[CellPlan]) -> list[CellPlan]:
        """The cells of this shard, in the order of the grid. Cells that share a ranking are in the same shard."""
        units = units_of(plans)
        # The number of cells is added so that cells that cost nothing are spread over the shards too.
        taken = self.take([sum(price(unit)) + len(unit) for unit in units])
        keys = {p.key for i in taken for p in units[i]}
        return [p for p in plans if p.key in keys]


def units_of(plans: Sequence[CellPlan]) -> list[list[CellPlan]]:
    """The cells in units that one process runs: all cells that share a ranking, or a single cell."""
    units: dict[str, list[CellPlan]] = {}
    for p in plans:
        units.setdefault(p.ranking or p.key, []).append(p)
    return list(units.values())
