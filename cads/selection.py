"""Selection: the result that every selector returns. It stores scores by id, and loads without a model."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from torch.utils.data import Sampler

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.data.hashing import add_column
from cads.data.ids import distinct, rank_by_score
from cads.data.pool import Pool
from cads.data.streams import ShuffledStream, Stream, WeightedStream
from cads.errors import CadsError, SelectionError
from cads.runtime.atomic_files import whole_folder
from cads.runtime.checkpoint import State
from cads.runtime.safe_read import check_fields, read_header, read_scores
from cads.warm_start import START_FILES, read_start, write_start

SCHEMA_VERSION = 1
FILES = ("selection.json", "scores.parquet", "timings.json", *START_FILES)
"""The files of a saved Selection; the last two only if it has a `warm_start`."""
SAMPLER_BLOCK = 2**16
"""Positions that a sampler converts to Python integers at a time."""
LIBRARIES = ("cads-select", "torch", "numpy", "accelerate")
COLUMNS = {
    "id": pa.string(),
    "source": pa.string(),
    "score": pa.float64(),
    "probability": pa.float64(),
    "rank": pa.int64(),
    "selected": pa.bool_(),
}


HEADER: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "config": dict,
    "seed": int,
    "versions": dict,
    "pool_hash": str,
    "source_probability": dict,
    "target_fraction": (int, float),
    "weighted": bool,
    "notes": dict,
}
"""Fields of selection.json that become fields of a Selection unchanged, and their types."""


@dataclass
class Selection:
    """Which examples of a pool to train on.

    Attributes:
        ids: one a pool example, in the order of the pool that the selection was made from.
        score: higher is better, shape (N,).
        probability: of being selected, shape (N,).
        selected: bool, shape (N,); may be empty only if `target_fraction` is 1.
        sources: the name of each example's source, or None. Given as a list or Arrow strings, it becomes a dictionary
            array of 4 bytes an example.
        source_probability: probability of each source, for selectors that choose sources.
        target_fraction: share of each training batch drawn from the target (0: pool only).
        weighted: whether training draws examples in proportion to their probability, with replacement, instead
            of going through the selected ones epoch by epoch.
        method, config, seed, budget, ledger: how the selection was made. Functions in `config` become their names.
        pool_hash: content hash of that pool.
        notes: remarks of the selector, such as the decision of the guard.
        versions: versions of Python and of the libraries that results depend on.
        warm_start: weights, optimizer and step from which training continues, if the selector started the run of the
            final model (`cads.search.single_run`). The FLOPs of that start are in `ledger` under "train".
    """

    ids: pa.Array
    score: np.ndarray
    probability: np.ndarray
    selected: np.ndarray
    method: str
    seed: int
    budget: Budget
    ledger: Ledger
    pool_hash: str
    sources: pa.DictionaryArray | None = None
    source_probability: dict[str, float] = field(default_factory=dict)
    target_fraction: float = 0.0
    weighted: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    warm_start: State | None = None

    def __post_init__(self) -> None:
        n = len(self.ids)
        self.sources = _dictionary(self.sources)
        if self.sources is not None and (len(self.sources) != n or self.sources.null_count):
            raise SelectionError(f"{len(self.sources) - self.sources.null_count} sources for {n} ids")
        for name in ("score", "probability", "selected"):
            values = getattr(self, name)
            if values.shape != (n,):
                raise SelectionError(f"{name} has shape {values.shape} for {n} ids")
            if not np.isfinite(values).all():
                raise SelectionError(f"{name} has NaN or infinite values: a selector must score every example")
        if ((self.probability < 0) | (self.probability > 1)).any():
            raise SelectionError("probabilities must lie between 0 and 1")
        if not 0 <= self.target_fraction <= 1:
            raise SelectionError(f"target_fraction = {self.target_fraction}: it must lie between 0 and 1")
        if not self.selected.any() and self.target_fraction < 1:
            raise SelectionError(f"{self.method} selected no example: lower its threshold or raise the budget")
        self.versions = self.versions or versions()
        self.config = {option: _qualified_name(value) for option, value in self.config.items()}

    @classmethod
    def from_pool(
        cls,
        pool: Pool,
        *,
        selected: np.ndarray,
        method: str,
        seed: int,
        budget: Budget,
        ledger: Ledger,
        score: np.ndarray | None = None,
        probability: np.ndarray | None = None,
        **fields: Any,
    ) -> Selection:
        """A Selection from `pool`; score and probability default to `selected` as 0 and 1. `fields`: other fields."""
        indicator = np.asarray(selected, dtype=np.float64)
        sources = None
        if pool.sources is not None:
            sources = pa.DictionaryArray.from_arrays(pool.sources, pa.array(pool.source_names, pa.string()))
        return cls(
            ids=pool.ids,
            score=indicator if score is None else np.asarray(score, dtype=np.float64),
            probability=indicator if probability is None else np.asarray(probability, dtype=np.float64),
            selected=np.asarray(selected, dtype=bool),
            method=method,
            seed=seed,
            budget=budget,
            ledger=ledger,
            pool_hash=pool.content_hash,
            sources=sources,
            **fields,
        )

    @cached_property
    def content_hash(self) -> str:
        """Hash of everything that is saved except times: selections with the same hash give the same training run."""
        digest = hashlib.sha256(json.dumps(self._header(), sort_keys=True).encode())
        add_column(digest, self.ids)
        if self.sources is not None:
            add_column(digest, self.sources)
        for values in (self.score, self.probability, self.selected):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    @cached_property
    def _start_digest(self) -> str | None:
        return None if self.warm_start is None else self.warm_start.digest

    @property
    def rank(self) -> np.ndarray:
        """Rank of each example by score: 0 has the highest score, ties by id; int64, shape (N,)."""
        return rank_by_score(self.ids, self.score)

    def positions(self, pool: Pool) -> np.ndarray:
        """Positions of the selected examples in `pool`, which may be in another order; sorted, int64.

        Raises:
            SelectionError: if a selected id is not in the pool.
        """
        if self.ids.equals(pool.ids):
            return np.flatnonzero(self.selected)
        selected_ids = self.ids.filter(pa.array(self.selected))
        positions = pc.index_in(selected_ids, value_set=pool.ids)
        if positions.null_count:
            missing = selected_ids.filter(pc.is_null(positions))
            raise SelectionError(
                f"{positions.null_count} selected ids are not in the {pool.name}, such as {missing[:3].to_pylist()}: "
                "use the pool that the selection was made from"
            )
        return np.sort(positions.to_numpy(zero_copy_only=False).astype(np.int64))

    def stream(self, pool: Pool, seed: int) -> Stream:
        """An endless, seeded sequence of positions in `pool` to train on.

        Raises:
            SelectionError: if a selected id is not in the pool.
        """
        positions = self.positions(pool)
        if not self.weighted:
            return ShuffledStream(positions, seed)
        weights = np.zeros(len(pool))
        rows = pc.index_in(pool.ids.take(pa.array(positions)), value_set=self.ids).to_numpy()
        weights[positions] = self.probability[rows]
        return WeightedStream(weights, seed)

    def apply(self, dataset: Any, id_column: str = "id") -> Any:
        """The selected rows of a `datasets.Dataset`, matched by its id column.

        Raises:
            SelectionError: if the column is missing, or does not contain a selected id.
        """
        if id_column not in dataset.column_names:
            raise SelectionError(f"the dataset has no column {id_column!r}: it has {dataset.column_names}")
        ids = _as_strings(dataset, id_column)
        selected_ids = self.ids.filter(pa.array(self.selected))
        rows = pc.index_in(selected_ids, value_set=ids)
        if rows.null_count:
            missing = selected_ids.filter(pc.is_null(rows))
            raise SelectionError(
                f"{rows.null_count} selected ids are not in column {id_column!r}, such as "
                f"{missing[:3].to_pylist()}: use the data that the selection was made from"
            )
        return dataset.select(np.sort(rows.to_numpy(zero_copy_only=False)))

    def sampler(self, pool: Pool, seed: int = 0) -> SelectionSampler:
        """A `torch.utils.data.Sampler` over positions of `pool`, which must contain the selected ids."""
        return SelectionSampler(self.stream(pool, seed), int(self.selected.sum()))

    def source_counts(self) -> list[tuple[str, int, int, float]]:
        """For each source (or the full pool): name, number of examples, number selected, mean probability."""
        if self.sources is None:
            names, codes = ["(all)"], np.zeros(len(self.ids), dtype=np.int32)
        else:
            names, codes = self.sources.dictionary.to_pylist(), self.sources.indices.to_numpy()
        examples = np.bincount(codes, minlength=len(names))
        selected = np.bincount(codes[self.selected], minlength=len(names))
        probability = np.bincount(codes, weights=self.probability, minlength=len(names)) / np.maximum(examples, 1)
        rows = zip(names, examples, selected, probability, strict=True)
        return [(str(n), int(e), int(s), float(p)) for n, e, s, p in sorted(rows) if e]

    def mixture(self) -> dict[str, float]:
        """The share of each source in the training data, for `datasets.interleave_datasets`.

        Raises:
            SelectionError: if the pool had no sources, or no pool example is selected.
        """
        if self.sources is None:
            raise SelectionError("the pool of this selection had no sources, so there is no mixture")
        if not self.selected.any():
            raise SelectionError(f"{self.method} selected nothing of the pool, so there is no mixture")
        amounts = {
            name: examples * probability if self.weighted else float(selected)
            for name, examples, selected, probability in self.source_counts()
        }
        total = sum(amounts.values())
        return {name: amount / total for name, amount in amounts.items()}

    def save(self, folder: Path | str) -> Path:
        """Write `selection.json`, `scores.parquet`, `timings.json` and the `warm_start`, if any, to a new folder.

        The folder is written atomically. Two runs with the same seed write the same bytes, except for the times.

        Raises:
            SelectionError: if the folder exists and holds other files (`check_folder`).
        """
        folder = Path(folder)
        check_folder(folder)
        with whole_folder(folder) as partial:
            # Ids are unique: Parquet would build a dictionary of them and discard it.
            pq.write_table(self.table(), partial / "scores.parquet", use_dictionary=["source"])
            (partial / "selection.json").write_text(json.dumps(self._header(), indent=2, sort_keys=True) + "\n")
            self.ledger.save(partial / "timings.json")
            if self.warm_start is not None:
                write_start(self.warm_start, partial)
        return folder

    def table(self) -> pa.Table:
        """One row an example: id, source, score, probability, rank, selected."""
        sources = pa.nulls(len(self.ids)) if self.sources is None else self.sources
        return pa.table(
            {
                "id": self.ids,
                "source": sources.cast(pa.string()),
                "score": self.score,
                "probability": self.probability,
                "rank": self.rank,
                "selected": self.selected,
            },
            schema=pa.schema(list(COLUMNS.items())),
        )

    def _header(self) -> dict[str, Any]:
        warm_start = {} if self.warm_start is None else {"start": self._start_digest}
        return {
            **warm_start,
            "schema_version": SCHEMA_VERSION,
            "method": self.method,
            "config": self.config,
            "seed": self.seed,
            "versions": self.versions,
            "budget": {
                "amount": self.budget.amount,
                "unit": self.budget.unit,
                "count_selection": self.budget.count_selection,
            },
            "ledger": self.ledger.to_json(seconds=False),
            "counts": {"pool": len(self.ids), "selected": int(self.selected.sum())},
            "pool_hash": self.pool_hash,
            "source_probability": self.source_probability,
            "target_fraction": self.target_fraction,
            "weighted": self.weighted,
            "notes": self.notes,
        }

    @classmethod
    def load(cls, folder: Path | str) -> Selection:
        """Read a Selection from JSON, Parquet and safetensors; no code is executed.

        Raises:
            SelectionError: if it is missing, corrupt, of another version, or its files do not match.
        """
        folder = Path(folder)
        if (folder / "selection" / "selection.json").exists():
            folder = folder / "selection"
        scores_file = folder / "scores.parquet"
        header = read_header(folder / "selection.json", scores_file, SCHEMA_VERSION, "selection")
        try:
            table = read_scores(scores_file, COLUMNS)
            digest = header.pop("start", None)
            start = None if digest is None else read_start(folder, digest)
        except (OSError, ValueError, RecursionError, pa.ArrowException, CadsError) as error:
            raise SelectionError(f"{folder} cannot be read: {error}") from error
        try:
            return cls._build(header, table, start)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, CadsError) as error:
            raise SelectionError(f"{folder} is corrupt: {type(error).__name__}: {error}") from error

    @classmethod
    def _build(cls, header: dict[str, Any], table: pa.Table, start: State | None) -> Selection:
        check_fields(header, HEADER)
        missing = [n for n in ("id", "score", "probability", "selected") if table[n].null_count]
        if missing:
            raise SelectionError(f"the columns {missing} of the scores have missing values")
        if not distinct(table["id"]):
            raise SelectionError("ids of the scores are not unique")
        counts = {"pool": len(table), "selected": pc.sum(table["selected"]).as_py() or 0}
        if header["counts"] != counts:
            raise SelectionError(f"the scores have counts {counts} where the header says {header['counts']}")
        sources = table["source"].combine_chunks()
        return cls(
            ids=table["id"].combine_chunks(),
            score=table["score"].to_numpy(),
            probability=table["probability"].to_numpy(),
            selected=table["selected"].to_numpy().astype(bool),
            sources=None if sources.null_count else sources,
            budget=Budget(**header["budget"]),
            ledger=Ledger.from_json(header["ledger"]),
            warm_start=start,
            **{name: header[name] for name in HEADER},
        )


def _qualified_name(value: Any) -> Any:
    """The qualified name of a function, or of the class of another callable; any other value unchanged."""
    if not callable(value):
        return value
    return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"


def _dictionary(names: pa.Array | Sequence[str] | None) -> pa.DictionaryArray | None:
    """Names as a dictionary array of int32 codes."""
    if names is None:
        return None
    column = names if isinstance(names, pa.Array) else pa.array(names, pa.string())
    return column if isinstance(column, pa.DictionaryArray) else column.dictionary_encode()


def _as_strings(dataset: Any, column: str) -> pa.ChunkedArray:
    """A column of strings or numbers of a `datasets.Dataset`, as strings.

    Raises:
        SelectionError: if the column has another type.
    """
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    try:
        return values.cast(pa.string())
    except pa.ArrowException as error:
        raise SelectionError(f"column {column!r} holds {values.type}: name one of strings or numbers") from error


def check_folder(folder: Path | str, files: Sequence[str] = FILES) -> None:
    """Refuse to save to a folder that holds anything other than an earlier Selection.

    Args:
        folder: to save to.
        files: the names of the files of an earlier Selection.

    Raises:
        SelectionError: if `folder` is a file, or holds other files.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise SelectionError(f"{folder} is no folder: choose another name")
    foreign = sorted(f.name for f in folder.iterdir() if f.name not in files)
    if foreign:
        raise SelectionError(f"{folder} exists and holds {foreign[:3]}: choose another folder")


class SelectionSampler(Sampler[int]):
    """One epoch of positions in a pool: as many as examples are selected.

    Call `set_epoch` before each epoch, as with `DistributedSampler`.
    """

    def __init__(self, stream: Stream, count: int) -> None:
        self._stream = stream
        self._count = count
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[int]:
        positions = self._stream.take(self._epoch * self._count, self._count)
        for start in range(0, len(positions), SAMPLER_BLOCK):
            yield from positions[start : start + SAMPLER_BLOCK].tolist()


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries on which results depend."""
    installed = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = "not installed"
    return installed
