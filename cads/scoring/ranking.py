"""A ranking of the pool: ids with scores, sharded on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cads.accounting.ledger import Ledger
from cads.data.ids import all_distinct
from cads.data.pool import Pool
from cads.errors import CadsError, DataError, SelectionError
from cads.runtime.atomic_files import whole_folder
from cads.runtime.safe_read import check_fields, read_header, read_scores
from cads.scoring.score_files import COLUMNS
from cads.selection_files import check_folder

SCHEMA_VERSION = 1
FILES = ("ranking.json", "scores.parquet")
HEADER: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "config": dict,
    "seed": int,
    "pool_hash": str,
    "made_from": str,
    "notes": dict,
}
"""Fields of ranking.json that a Ranking takes unchanged, and their types."""
FIELD_OF = {"made_from": "provenance_hash"}
"""Names in a Ranking of the fields of ranking.json that are named differently."""


@dataclass
class Ranking:
    """A score for each example of a pool, whatever the budget.

    Attributes:
        ids: of the examples, shape (N,).
        score: of each example, higher is better, shape (N,).
        method, config, seed: how the scores were computed.
        ledger: what they cost.
        pool_hash: content hash of the pool.
        provenance_hash: hash of everything that the scores follow from, or "" if it was not computed.
        notes: further results of the method.
    """

    ids: pa.Array
    score: np.ndarray
    method: str
    seed: int
    ledger: Ledger
    pool_hash: str
    config: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    provenance_hash: str = ""

    def scores_of(self, pool: Pool) -> np.ndarray:
        """The scores in the order of `pool`, matched by id, shape (N,).

        Raises:
            DataError: if an example of the pool has no score, or one that is not finite.
        """
        score = self.score
        if not self.ids.equals(pool.ids):
            rows = pc.index_in(pool.ids, value_set=self.ids)
            if rows.null_count:
                missing = pool.ids.filter(pc.is_null(rows))
                raise DataError(
                    f"{rows.null_count} examples of the {pool.name} have no score by {self.method}, such as "
                    f"{missing[:3].to_pylist()}: rank the pool that is trained on"
                )
            score = score[rows.to_numpy()]
        if not np.isfinite(score).all():
            bad = pool.ids.take(np.flatnonzero(~np.isfinite(score))[:5]).to_pylist()
            raise DataError(f"{self.method} scores examples such as {bad} with NaN or infinity: look at these examples")
        return score

    def save(self, folder: Path | str) -> Path:
        """Write `ranking.json` and `scores.parquet` to a folder, atomically.

        Raises:
            SelectionError: if the folder holds other files.
        """
        folder = Path(folder)
        check_folder(folder, FILES)
        header = {name: getattr(self, FIELD_OF.get(name, name)) for name in HEADER}
        header |= {"schema_version": SCHEMA_VERSION, "ledger": self.ledger.to_json(seconds=False)}
        with whole_folder(folder) as partial:
            table = pa.table({"id": self.ids, "score": self.score}, schema=pa.schema(list(COLUMNS.items())))
            pq.write_table(table, partial / "scores.parquet", use_dictionary=False)
            (partial / "ranking.json").write_text(json.dumps(header, indent=2, sort_keys=True) + "\n")
        return folder

    @classmethod
    def load(cls, folder: Path | str) -> Ranking:
        """Read a Ranking from JSON and Parquet; nothing is executed.

        Raises:
            SelectionError: if it is missing, corrupt, or of another version.
        """
        folder = Path(folder)
        header_file, scores_file = (folder / name for name in FILES)
        header = read_header(header_file, scores_file, SCHEMA_VERSION, "ranking")
        try:
            table = read_scores(scores_file, COLUMNS)
            check_fields(header, HEADER)
            if table["id"].null_count or table["score"].null_count:
                raise SelectionError("missing ids or scores")
            if not all_distinct(table["id"]):
                raise SelectionError("ids that are not unique")
            return cls(
                ids=table["id"].combine_chunks(),
                score=table["score"].to_numpy(),
                ledger=Ledger.from_json(header["ledger"]),
                **{FIELD_OF.get(name, name): header[name] for name in HEADER},
            )
        except (OSError, ValueError, KeyError, TypeError, RecursionError, pa.ArrowException, CadsError) as error:
            raise SelectionError(f"{folder} is no ranking that can be read: {error}") from error
