"""Rankings that all budgets of a grid share: made once, stored as a table, read by every process that needs them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cads.accounting.ledger import Ledger
from cads.data.ids import rank_by_score
from cads.errors import DataError
from cads.monitor import Monitor
from cads.runtime.lock import LockedError, held_by_first
from cads.runtime.processes import active_group
from cads.scoring.ranker import CUT_OPTIONS, Ranker
from cads.scoring.ranking import Ranking
from cads.study.grid import Setting, content_key, readable
from cads.study.journals import Journals
from cads.study.tables import read_table_file, write_rows
from cads.task import Task

WAIT_SECONDS = 0.5
"""Interval at which a waiting process checks whether another has finished a ranking."""


@dataclass(frozen=True)
class Rankings:
    """The rankings of a study, in its folder."""

    folder: Path

    def key(self, setting: Setting, ranker: Ranker, contents: Mapping[str, str], version: str) -> str:
        """The key of a ranking: a hash of all that it depends on. It depends on neither the budget nor the cut."""
        options = {name: value for name, value in asdict(ranker).items() if name not in CUT_OPTIONS}
        parts = [setting.describe(), ranker.method, options, dict(contents), version]
        return f"{readable(f'{ranker.method}-{setting.seed}')}-{content_key(parts)}"

    def path(self, key: str) -> Path:
        """The file of the ranking `key`. It exists once the ranking has been made."""
        return self.folder / "tables" / "rankings" / f"{key}.parquet"

    def get(
        self, key: str, ranker: Ranker, task: Task, seed: int, monitor: Monitor, journals: Journals
    ) -> tuple[Ranking, float]:
        """The ranking `key`: read if it exists, else made by this process while others wait.

        Returns:
            the ranking, with the options of `ranker`; the seconds it took to make.

        Raises:
            DataError: if the file is damaged.
            Interrupted: if this process was asked to stop.
        """

        def make() -> None:
            with journals.open(key) as journal:
                ranking = ranker.rank(task, seed=seed, ledger=Ledger(), monitor=monitor)
                world.on_rank_zero(lambda: self._write(key, ranking, journal.seconds))

        path, world = self.path(key), active_group()
        while not world.on_rank_zero(path.exists):
            try:
                with held_by_first(self.folder / "locks" / key):
                    if not world.on_rank_zero(path.exists):
                        journals.begin(key, make)
                        world.on_rank_zero(lambda: journals.forget(key))
            except LockedError:
                journals.interrupts.stop_together("while another process makes a ranking")
                time.sleep(WAIT_SECONDS)
        ranking, seconds = world.locally(lambda: _read(path))
        return replace(ranking, config=asdict(ranker)), seconds

    def _write(self, key: str, ranking: Ranking, seconds: float) -> None:
        """Store a ranking as a table; what is not a column goes into the header of the file."""
        n = len(ranking.ids)
        header = {
            "method": ranking.method,
            "seed": ranking.seed,
            "pool_hash": ranking.pool_hash,
            "notes": ranking.notes,
            "ledger": ranking.ledger.to_json(),
            "seconds": seconds,
        }
        rows = pa.table(
            {
                "ranking": [key] * n,
                "method": [ranking.method] * n,
                "seed": np.full(n, ranking.seed),
                "id": ranking.ids,
                "score": ranking.score,
                "rank": rank_by_score(ranking.ids, ranking.score),
            }
        )
        write_rows(self.folder, "rankings", key, rows, header=json.dumps(header))


def _read(path: Path) -> tuple[Ranking, float]:
    """A stored ranking, and the seconds that it took."""
    table = read_table_file(path, "rankings")
    try:
        header: dict[str, Any] = json.loads((table.schema.metadata or {})[b"cads_header"])
        ranking = Ranking(
            ids=table["id"].combine_chunks(),
            score=table["score"].to_numpy(),
            method=header["method"],
            seed=header["seed"],
            ledger=Ledger.from_json(header["ledger"]),
            pool_hash=header["pool_hash"],
            notes=header["notes"],
        )
        return ranking, float(header["seconds"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the ranking {path} is damaged ({error}): remove it and run again") from error
