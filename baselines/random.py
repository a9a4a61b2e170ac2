"""Random: a seeded random subset; smaller subsets are nested in larger ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np

from cads.accounting.ledger import Ledger, PlannedLedger
from cads.data.pool import Pool
from cads.monitor import Monitor
from cads.runtime.checkpoint import State
from cads.scoring.ranker import Ranker
from cads.scoring.ranking import Ranking
from cads.scoring.sharded import ShardedScoring, Values
from cads.scoring.stages import RankingStage
from cads.seeding import derive_each
from cads.task import Task


@dataclass
class Random(Ranker):
    """A random subset, as large as the budget can pay for `epochs` times, or a fixed share of the pool.

    The order is by a hash of (seed, id): subsets of one seed are nested, and a permutation of the pool changes
    nothing.
    """

    method: ClassVar[str] = "random"
    reads_model: ClassVar[bool] = False

    def rank(self, task: Task, *, seed: int, ledger: Ledger, monitor: Monitor | None = None) -> Ranking:
        """A uniform number for each id; see `cads.scoring.ranker.Ranker`."""
        return self.ranking(task, random_scores(task.pool, seed), seed=seed, ledger=ledger)

    def stages(self, scorer: Task) -> Sequence[RankingStage]:
        """None: nothing is spent; see `cads.scoring.ranker.Ranker`."""
        return ()

    def sharded(self, seed: int) -> ShardedScoring:
        """Scores file by file; see `cads.scoring.sharded`."""
        return _ShardedRandom(self.method, asdict(self), self.cut)


class _ShardedRandom(ShardedScoring):
    """A number for each id, wherever it is."""

    def values(self, task: Task, state: State, *, seed: int) -> Values:
        """See `ShardedScoring`."""
        return lambda part, ledger: random_scores(part.pool, seed)

    def plan(self, task: Task) -> PlannedLedger:
        """Nothing is spent."""
        return PlannedLedger()


def random_scores(pool: Pool, seed: int) -> np.ndarray:
    """A uniform number in [0, 1) for each id, independent of its position in the pool; shape (N,)."""
    return derive_each(seed, pool.ids) / 2.0**63
