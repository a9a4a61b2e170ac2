"""A part of a grid for one machine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from cads.errors import ConfigError
from cads.study.cells import CellPlan, price


@dataclass(frozen=True)
class GridShard:
    """One of `of` parts of a grid with about the same to compute, the `index`-th (1-based)."""

    index: int = 1
    of: int = 1

    def part(self, plans: Sequence[CellPlan]) -> list[CellPlan]:
        """The cells of this shard, in the order of the grid; those that one ranking serves stay together.

        The dearest first, each goes where least has gone so far (Graham's longest-processing-time rule).
        """
        units: dict[str, list[CellPlan]] = {}
        for p in plans:
            units.setdefault(p.ranking or p.key, []).append(p)
        loads = [0.0] * self.of
        mine: set[str] = set()
        for unit in sorted(units.values(), key=lambda unit: -sum(price(unit))):
            place = loads.index(min(loads))
            # Cells that cost nothing are dealt out as well.
            loads[place] += sum(price(unit)) + len(unit)
            if place == self.index - 1:
                mine |= {p.key for p in unit}
        return [p for p in plans if p.key in mine]

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
