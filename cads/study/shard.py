"""The part of a grid that one machine runs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cads.errors import ConfigError
from cads.study.cells import CellPlan, price


@dataclass(frozen=True)
class GridShard:
    """The `index`-th (1-based) of `of` parts of a grid. All parts cost about the same FLOPs."""

    index: int = 1
    of: int = 1

    def part(self, plans: Sequence[CellPlan]) -> list[CellPlan]:
        """The cells of this shard, in the order of the grid. Cells that share a ranking are in the same shard.

        Units go out from the most expensive on, each to the shard with the lowest load so far (Graham's
        longest-processing-time rule). A unit is a cell, or all cells that share a ranking.
        """
        units: dict[str, list[CellPlan]] = {}
        for p in plans:
            units.setdefault(p.ranking or p.key, []).append(p)
        loads = [0.0] * self.of
        keys: set[str] = set()
        for unit in sorted(units.values(), key=lambda unit: -sum(price(unit))):
            shard = loads.index(min(loads))
            # The number of cells is added so that cells that cost nothing are spread over the shards too.
            loads[shard] += sum(price(unit)) + len(unit)
            if shard == self.index - 1:
                keys |= {p.key for p in unit}
        return [p for p in plans if p.key in keys]

    @classmethod
    def parse(cls, text: str) -> GridShard:
        """Read `i/n`.

        Raises:
            ConfigError: unless 1 <= i <= n.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(f"shard {text!r}: write i/n with 1 <= i <= n, such as 1/4")
        return cls(int(match[1]), int(match[2]))
