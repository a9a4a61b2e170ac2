"""One of n equal parts of some work, by `i/n` or by the place of a task in a SLURM array."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from cads.errors import ConfigError

SLURM = "slurm"
"""The text that stands for the place of this process in a SLURM array."""
ARRAY = "SLURM_ARRAY_TASK_"

S = TypeVar("S", bound="Shard")


@dataclass(frozen=True)
class Shard:
    """The `index`-th (1-based) of `of` parts."""

    index: int = 1
    of: int = 1

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"

    def take(self, prices: Sequence[float]) -> list[int]:
        """Positions of the units of this shard, ascending. All shards cost about the same.

        Units go out from the most expensive on, each to the shard with the lowest load so far (Graham's
        longest-processing-time rule).
        """
        loads = [0.0] * self.of
        taken = []
        for position in sorted(range(len(prices)), key=lambda i: -prices[i]):
            shard = loads.index(min(loads))
            loads[shard] += prices[position]
            if shard == self.index - 1:
                taken.append(position)
        return sorted(taken)

    @classmethod
    def parse(cls: type[S], text: str) -> S:
        """Read `i/n`, or `slurm`: the place of this process in its SLURM array.

        Raises:
            ConfigError: unless 1 <= i <= n, or if this process is of no SLURM array.
        """
        if text.strip() == SLURM:
            return cls(*_place_in_array())
        match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ConfigError(f"shard {text!r}: write i/n with 1 <= i <= n, such as 1/4, or slurm in a SLURM array")
        return cls(int(match[1]), int(match[2]))


def _place_in_array() -> tuple[int, int]:
    """The place of this task in its array, counted from 1, and the number of tasks."""
    values = {name: os.environ.get(ARRAY + name, "") for name in ("ID", "MIN", "STEP", "COUNT")}
    values["STEP"] = values["STEP"] or "1"
    if not all(value.isdigit() for value in values.values()):
        missing = ", ".join(ARRAY + name for name, value in values.items() if not value.isdigit())
        raise ConfigError(f"shard 'slurm': {missing} is not set: submit with `sbatch --array=1-N`, or write i/n")
    place, least, step, count = (int(values[name]) for name in ("ID", "MIN", "STEP", "COUNT"))
    return (place - least) // step + 1, count
