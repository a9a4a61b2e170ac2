"""Scores of pools larger than memory: streamed to Parquet shard by shard, and read back row group by row group.

The files have the format of a ranking's `scores.parquet`, an id and a score per row; either can be read as the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cads.accounting.ledger import Ledger
from cads.data.pool import Pool
from cads.errors import CadsError, DataError
from cads.runtime.atomic_files import atomic_file
from cads.runtime.processes import active_group
from cads.runtime.safe_read import read_score_groups
from cads.scoring.pool_scores import BatchPrice, Score, score_pool

COLUMNS = {"id": pa.string(), "score": pa.float64()}
GROUP = 2**18
"""Rows of a row group: about 8 MB, the memory that reading and writing take."""
SHARD = 2**20
"""Examples of a pool that are scored together: sorted by length and cut into batches."""


class ScoreWriter:
    """Writes ids and scores to one Parquet file, in row groups; the file appears only once it is complete.

    Use as a context manager. An exception leaves no file behind.

    Args:
        path: of the file; a file that exists there is replaced.
        group: rows that are written at once.

    Raises:
        DataError: if the file cannot be written, or scores are not one finite number per id.
    """

    def __init__(self, path: Path | str, *, group: int = GROUP) -> None:
        self.path = Path(path)
        self.rows = 0
        self._group = group
        self._stack = ExitStack()
        self._waiting: list[pa.RecordBatch] = []
        self._n_waiting = 0
        self._schema = pa.schema(list(COLUMNS.items()))

    def __enter__(self) -> ScoreWriter:
        try:
            partial = self._stack.enter_context(atomic_file(self.path))
            self._file = pq.ParquetWriter(partial, self._schema, use_dictionary=False)
        except OSError as error:
            raise DataError(f"{self.path} cannot be written: {error}") from error
        return self

    def write(self, ids: pa.Array, scores: np.ndarray) -> None:
        """Append one score (float64, shape (n,)) per id."""
        if ids.type != pa.string() or ids.null_count:
            raise DataError(f"ids of type {ids.type}, {ids.null_count} of them missing: give a string to each example")
        if scores.shape != (len(ids),):
            raise DataError(f"scores of shape {scores.shape} for {len(ids)} ids: give one each")
        if not np.isfinite(scores).all():
            bad = ids.take(pa.array(np.flatnonzero(~np.isfinite(scores))[:5])).to_pylist()
            raise DataError(f"the scores of examples such as {bad} are not finite: look at these examples")
        batch = pa.record_batch([ids, pa.array(scores, pa.float64())], schema=self._schema)
        self._waiting.append(batch)
        self._n_waiting += len(ids)
        self.rows += len(ids)
        if self._n_waiting >= self._group:
            self._flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with self._stack:
                if error is None:
                    self._flush()
                self._file.close()
                if error is not None:
                    raise error
        except OSError as failure:
            if failure is not error:
                raise DataError(f"{self.path} cannot be written: {failure}") from failure
        except BaseException as failure:
            if failure is not error:
                raise

    def _flush(self) -> None:
        """Write the waiting rows."""
        if self._waiting:
            try:
                self._file.write_table(pa.Table.from_batches(self._waiting), row_group_size=self._group)
            except OSError as error:
                raise DataError(f"{self.path} cannot be written: {error}") from error
        self._waiting, self._n_waiting = [], 0


def read_groups(paths: Iterable[Path | str]) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """The ids and scores (float64, shape (n,)) of score files, one row group after another.

    Raises:
        DataError: if a file is missing, not a score file, or has missing values.
    """
    for path in map(Path, paths):
        try:
            for table in read_score_groups(path, COLUMNS):
                if table["id"].null_count or table["score"].null_count:
                    raise DataError(f"{path} has missing ids or scores")
                yield table["id"].combine_chunks(), table["score"].to_numpy()
        except (OSError, ValueError, pa.ArrowException) as error:
            if isinstance(error, CadsError):
                raise
            raise DataError(f"{path} is no score file that can be read: {error}") from error


def stream_scores(
    pool: Pool,
    score: Score,
    price: BatchPrice,
    path: Path | str,
    *,
    ledger: Ledger,
    stage: str,
    device: torch.device | str = "cpu",
    tokens: int | None = None,
    precision: str = "no",
    shard: int = SHARD,
) -> None:
    """Score all of `pool` into the file at `path`, shard by shard: `score_pool` in memory bounded by a shard.

    For pools whose scores do not fit in memory: `cads.scoring.top_k.best_of_files` selects from the file. Several
    processes score together; rank 0 writes.

    Args:
        score, price, ledger, stage, device, tokens, precision: as for `score_pool`.
        shard: examples that are scored together.

    Raises:
        DataError: if a score is not finite, or the file cannot be written.
    """
    world, writer = active_group(), ScoreWriter(path)
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(writer)

        world.on_rank_zero(begin)
        for start in range(0, len(pool), shard):
            part = pool.subset(np.arange(start, min(start + shard, len(pool))), pool.name)
            scores = score_pool(
                part, score, price, ledger=ledger, stage=stage, device=device, tokens=tokens, precision=precision
            )
            world.on_rank_zero(partial(writer.write, part.ids, scores))
        world.on_rank_zero(stack.close)
