"""Selection: the result that every selector returns. It stores scores by id, and loads without a model."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cads.accounting.budget import Budget
from cads.accounting.ledger import EVALUATE, Ledger
from cads.data.balanced_stream import balanced_stream
from cads.data.hashing import add_column
from cads.data.ids import as_dictionary, rank_by_score
from cads.data.origin import Origin
from cads.data.pool import Pool
from cads.data.row_search import find_rows
from cads.data.sampler import StreamSampler
from cads.data.streams import ShuffledStream, Stream, WeightedStream
from cads.data.token_batches import in_id_order
from cads.data.weighted_rows import take_rows
from cads.data_card import upload_selection
from cads.errors import CadsError, SelectionError
from cads.runtime.checkpoint import State
from cads.runtime.versions import versions
from cads.selection_files import COLUMNS, OPTIONAL, SCHEMA_VERSION, read_selection, selection_folder, write_selection

log = logging.getLogger(__name__)

EQUAL_DIGITS = 12
"""Digits in which weights must differ to count as unequal: quotients of shares and sizes differ in their last bits."""
POOL_EXAMPLES = "pool_examples"
"""Note of a Selection that holds only what was kept of a pool: how many examples the pool has."""
Weights = Literal["column", "resample"]
"""What `apply` does about unequal weights: write them into a column, or draw rows by them."""


@dataclass
class Selection:
    """Which examples of a pool to train on.

    `weights` and `shares` say what training draws. `probability`, `source_probability` and `policy_probability` say
    what the policy of the selector was; the choice can be another one, such as the full pool if that was not beaten.

    Attributes:
        ids: one a pool example, in the order of the pool that the selection was made from.
        score: higher is better, shape (N,).
        probability: of being selected under the selector's policy, shape (N,); if `weighted`, what training draws by.
        selected: bool, shape (N,); may be empty only if `target_fraction` is 1.
        sources: the name of each example's source, or None. Given as a list or Arrow strings, it becomes a dictionary
            array of 4 bytes an example.
        source_probability: of each source under the selector's policy, for selectors that choose sources. This is no
            share of the training data: see `shares`.
        target_fraction: share of each training batch drawn from the target (0: pool only).
        weighted: whether training draws examples in proportion to their probability, with replacement, instead
            of going through the selected ones epoch by epoch.
        method, config, seed, budget, ledger: how the selection was made. Functions in `config` become their names.
        pool_hash: content hash of that pool.
        notes: remarks of the selector, such as the decision of the guard.
        versions: versions of Python and of the libraries that results depend on.
        trained: the end of the run in which the selector trained the final model, or None. The FLOPs of that run are in
            `ledger` under "train".
        origin: the file and row that each example was read from, or None if that is not known.
        balanced: whether batches hold the groups of the task (classes) in even turns.
        stop_passes: passes over the selected examples and the target after which training ends, if the budget buys
            more; None: it spends the budget.
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
    trained: State | None = None
    origin: Origin | None = None
    balanced: bool = False
    stop_passes: float | None = None

    def __post_init__(self) -> None:
        n = len(self.ids)
        self.sources = as_dictionary(self.sources)
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
        if self.weighted and self.target_fraction < 1 and not self._amounts.any():
            raise SelectionError(f"{self.method} gives each selected example the weight 0: nothing can be drawn")
        if self.balanced and self.weighted:
            raise SelectionError(f"{self.method} draws by weights: they cannot be balanced too")
        if self.stop_passes is not None and not self.stop_passes > 0:
            raise SelectionError(f"stop_passes = {self.stop_passes}: it must be positive")
        if self.origin is not None and len(self.origin) != n:
            raise SelectionError(f"{len(self.origin)} rows of files for {n} ids")
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
            origin=pool.origin,
            **fields,
        )

    @cached_property
    def content_hash(self) -> str:
        """Hash of everything that is saved except times: selections with the same hash give the same training run.

        What was evaluated on the way is no part of it: watching a run does not change its Selection.
        """
        header = self._header()
        header["ledger"] = [entry for entry in header["ledger"] if entry["phase"] != EVALUATE]
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        add_column(digest, self.ids)
        if self.sources is not None:
            add_column(digest, self.sources)
        for values in (self.score, self.probability, self.selected):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()

    @cached_property
    def _trained_digest(self) -> str | None:
        return None if self.trained is None else self.trained.digest

    @property
    def _amounts(self) -> np.ndarray:
        """Relative weights of all examples in training, shape (N,)."""
        return self.selected * (self.probability if self.weighted else 1.0)

    @cached_property
    def weights(self) -> np.ndarray:
        """The probability that a draw of training from the pool gives each example, shape (N,); the sum is 1.

        Training draws `target_fraction` of each batch from the target instead. If that is 1, nothing is drawn from the
        pool, and all weights are 0.
        """
        if self.target_fraction == 1:
            return np.zeros(len(self.ids))
        amounts = self._amounts
        return np.asarray(amounts / amounts.sum())

    @property
    def effective_share(self) -> float:
        """The part of the pool that training draws from: 1 / (N sum of squared `weights`), 0 if from the target alone.

        With equal weights it is the share of the examples selected; unequal weights make it smaller.
        """
        if self.target_fraction == 1:
            return 0.0
        n_pool = int(self.notes.get(POOL_EXAMPLES, len(self.ids)))
        return float(1 / (n_pool * np.square(self.weights).sum()))

    @property
    def unequal(self) -> bool:
        """Whether some selected examples are drawn more often than others."""
        positive = self.weights[self.weights > 0]
        return bool(len(positive)) and len(np.unique(np.round(positive / positive.max(), EQUAL_DIGITS))) > 1

    @property
    def shares(self) -> dict[str, float]:
        """The share of each source in what training draws from the pool: the sum of its `weights`.

        The shares sum to 1; they are 0 if nothing is drawn from the pool. Empty if the pool had no sources.
        """
        if self.sources is None:
            return {}
        amounts = self._by_source(np.zeros(len(self.ids)) if self.target_fraction == 1 else self._amounts)
        total = sum(amounts.values()) or 1.0
        return {name: amount / total for name, amount in amounts.items()}

    @property
    def policy_probability(self) -> dict[str, float]:
        """The probability of each source under the selector's policy, which the choice need not follow.

        For selectors of single examples, it is the mean over the source. Empty for selectors without a policy, and
        where the pool had no sources.
        """
        if self.source_probability:
            return dict(self.source_probability)
        if self.sources is None or np.array_equal(self.probability, self.selected):
            return {}
        return {name: mean for name, _, _, mean in self.source_counts()}

    def _by_source(self, values: np.ndarray) -> dict[str, float]:
        """The sum of values (shape (N,)) over each source that has examples, by name."""
        assert self.sources is not None
        names, codes = self.sources.dictionary.to_pylist(), self.sources.indices.to_numpy()
        sums = np.bincount(codes, weights=values, minlength=len(names))
        present = np.bincount(codes, minlength=len(names)) > 0
        return {str(name): float(sums[i]) for i, name in sorted(enumerate(names), key=lambda x: x[1]) if present[i]}

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

    def stream(self, pool: Pool, seed: int, groups: np.ndarray | None = None) -> Stream:
        """An endless, seeded sequence of positions in `pool` to train on; the order of the pool changes no id in it.

        Args:
            groups: of the examples of `pool`, int, shape (N,), which come in even turns if the selection is `balanced`.

        Raises:
            SelectionError: if a selected id is not in the pool.
        """
        positions = in_id_order(pool, self.positions(pool))
        if self.balanced:
            return balanced_stream(positions, groups, seed)
        if not self.weighted:
            return ShuffledStream(positions, seed)
        rows = pc.index_in(pool.ids.take(pa.array(positions)), value_set=self.ids).to_numpy()
        return WeightedStream(self._amounts[rows], seed, positions)

    def apply(
        self, dataset: Any, id_column: str | None = None, *, weights: Weights | None = None, seed: int = 0
    ) -> Any:
        """The selected rows of a `datasets.Dataset` or `IterableDataset`, in its order.

        The data set may hold the files that the pool was read from, each alone or several one after another, with or
        without ids: they are recognised by their contents. Any other data set needs a column of ids. A stream is read
        once before this returns, to make sure that its rows are these.

        Args:
            dataset: of one split.
            id_column: of the ids; None: rows are found by contents, and if that fails, by the column that the pool's
                ids were read from ("id" if that is not known).
            weights: "column" adds the `weights` as a column `weight`, whose sum over all files is 1. "resample" repeats
                rows in proportion to how often training draws them, as many in all files together as are selected; a
                repeated row follows itself. None: the rows alone, which is refused if their weights are not equal.
            seed: of the draws of "resample".

        Raises:
            SelectionError: if rows are missing or ambiguous, if weights are not equal and `weights` is None, or if
                nothing of the pool is selected.
        """
        counts = self.row_counts(weights, seed, "apply() gives")
        chosen = self.weights > 0
        matches = find_rows(dataset, self.ids, chosen, self.origin, id_column)
        if matches.absent:
            log.warning(
                "the data holds %d of %d selected examples: it does not hold %s",
                len(matches.rows),
                int(chosen.sum()),
                ", ".join(matches.absent),
            )
        if weights == "column":
            return take_rows(dataset, matches, self.weights[matches.examples])
        return take_rows(dataset, matches.repeated(counts[matches.examples]))

    def row_counts(self, weights: Weights | None, seed: int, what: str) -> np.ndarray:
        """How often rows have to hold each example, int64, shape (N,), and a warning of what they do not hold.

        Args:
            weights: as for `apply`: without "resample", or with equal weights, each example comes once or never.
            seed: of the draws of "resample".
            what: begins the warning.

        Raises:
            SelectionError: if weights are not equal and `weights` is None, or if nothing of the pool is selected.
        """
        if weights is not None and weights not in get_args(Weights):
            raise SelectionError(f"weights = {weights!r}: choose from {list(get_args(Weights))}, or None")
        self._check_pool_part()
        if self.unequal and weights is None:
            raise SelectionError(
                f"{self.method} gives examples different weights{self._shares_said()}, which the rows alone would "
                'lose: give weights="column" for a column of weights, or weights="resample" for rows drawn by them'
            )
        self._say_rest(what)
        if weights == "resample" and self.unequal:
            return self._draw_counts(seed)
        return (self.weights > 0).astype(np.int64)

    def _draw_counts(self, seed: int) -> np.ndarray:
        """How often each example comes in as many draws as examples are selected, int64, shape (N,)."""
        draws = WeightedStream(self._amounts, seed).take(0, int(self.selected.sum()))
        return np.bincount(draws, minlength=len(self.ids))

    def _shares_said(self) -> str:
        shares = self.shares
        return f" ({', '.join(f'{name} {share:.1%}' for name, share in list(shares.items())[:5])})" if shares else ""

    def _check_pool_part(self) -> None:
        """Refuse to give examples of the pool if training draws none.

        Raises:
            SelectionError: naming the method.
        """
        if self.target_fraction == 1:
            raise SelectionError(
                f"{self.method} selected nothing of the pool, it trains on the target alone: use the rows of the target"
            )

    def _say_rest(self, what: str) -> None:
        """Warn of what training does besides drawing from the pool by `weights`."""
        if self.trained is not None:
            log.warning(
                "%s examples and their weights at the end of the run in which %s trained the final model. Neither that "
                "model nor the course of the weights is among them: `cads train` and cads.train give the model",
                what,
                self.method,
            )
        if self.target_fraction:
            log.warning(
                "%s examples of the pool alone. %s also trains on the target: %.3g %% of each batch",
                what,
                self.method,
                100 * self.target_fraction,
            )

    def sampler(self, pool: Pool, seed: int = 0) -> StreamSampler:
        """A `torch.utils.data.Sampler` over positions of `pool`, which must contain the selected ids.

        Raises:
            SelectionError: if a selected id is not in the pool, or nothing of the pool is selected.
        """
        self._check_pool_part()
        self._say_rest("sampler() gives")
        return StreamSampler(self.stream(pool, seed), int(self.selected.sum()))

    def source_counts(self) -> list[tuple[str, int, int, float]]:
        """For each source (or the full pool): name, number of examples, number selected, mean `probability`.

        `shares` has what training draws.
        """
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
        """The `shares`, for `datasets.interleave_datasets`.

        Raises:
            SelectionError: if the pool had no sources, or nothing of the pool is selected.
        """
        if self.sources is None:
            raise SelectionError("the pool of this selection had no sources, so there is no mixture")
        self._check_pool_part()
        self._say_rest("mixture() gives")
        return self.shares

    def save(self, folder: Path | str) -> Path:
        """Write `selection.json`, `scores.parquet`, `timings.json` and the `trained` run, if any, to a new folder.

        The folder is written atomically. Two runs with the same seed write the same bytes, except for the times.

        Raises:
            SelectionError: if the folder exists and holds other files (`check_folder`).
        """
        return write_selection(
            folder, self._header(), self.table(), ledger=self.ledger, trained=self.trained, origin=self.origin
        )

    def push_to_hub(self, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload ids, scores, probabilities and ledger with a data card to USER/NAME on the hub; returns the address.

        A data set that is made is private by default. `cads.export(selection, repo_id, to="hub")` uploads rows too.

        Raises:
            ConfigError: if that is no name of a data set, or the hub refuses.
        """
        return upload_selection(self, repo_id, private=private, token=token)

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
        trained = {} if self.trained is None else {"trained": self._trained_digest}
        optional = {name: value for name in OPTIONAL if (value := getattr(self, name))}
        return {
            **trained,
            **optional,
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
        folder = selection_folder(folder)
        stored = read_selection(folder)
        try:
            return cls(**stored.fields())
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, CadsError) as error:
            raise SelectionError(f"{folder} is corrupt: {type(error).__name__}: {error}") from error


def _qualified_name(value: Any) -> Any:
    """The qualified name of a function, or of the class of another callable; any other value unchanged."""
    if not callable(value):
        return value
    return f"{value.__module__}.{getattr(value, '__qualname__', type(value).__qualname__)}"
