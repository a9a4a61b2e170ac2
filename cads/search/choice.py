"""The result of a search, before method, seed, budget and ledger are added to make a Selection."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cads.data.pool import Pool
from cads.selection import Selection


@dataclass
class Choice:
    """What to train on, in the order of the pool that was searched.

    Attributes:
        selected: bool, shape (N,).
        score: shape (N,); None: `selected` as 0 and 1. probability: the same.
        weighted: whether training draws by `probability`.
        source_probability: of each source by name; empty if the search did not choose among sources.
        notes: on the search, such as the guard's.
    """

    selected: np.ndarray
    score: np.ndarray | None = None
    probability: np.ndarray | None = None
    weighted: bool = False
    source_probability: dict[str, float] = field(default_factory=dict)
    notes: dict[str, object] = field(default_factory=dict)

    @classmethod
    def full_pool(cls, pool: Pool, guard: str) -> Choice:
        """The full pool; `guard` is the reason."""
        return cls(np.ones(len(pool), dtype=bool), notes={"guard": guard})

    def selection(self, pool: Pool, **provenance: Any) -> Selection:
        """The Selection from `pool`; `provenance` holds the other arguments of `Selection.from_pool`."""
        probabilities = {s: self.source_probability[s] for s in pool.source_names if s in self.source_probability}
        return Selection.from_pool(pool, **vars(self) | {"source_probability": probabilities}, **provenance)
