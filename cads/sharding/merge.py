"""Merging the shards of a run: one pass over all values keeps the best that the budget pays for, and sums the ledgers.

Memory holds what is kept and one row group, whatever the size of the pool.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa

from cads.accounting.budget import Budget
from cads.accounting.costs import Workload
from cads.accounting.ledger import ROUNDING, SELECT, Ledger
from cads.data.origin import FileOrigin, Origin
from cads.errors import BudgetError, CheckpointError, DataError
from cads.launch.launcher import WaitsError
from cads.recipe import TrainConfig
from cads.runtime.checkpoint import State
from cads.scoring.cut import left_to_train
from cads.scoring.order_statistics import median
from cads.scoring.top_k import TopK
from cads.selection import POOL_EXAMPLES, Selection
from cads.sharding.run import ShardedRun, iterate
from cads.sharding.store import Part, PartStore
from cads.task import LEAK_TOLERANCE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Merged:
    """What merging gives.

    Attributes:
        selection: of the examples that are kept, all of them selected; the others are in the shards alone.
        pool: number of examples of the pool.
    """

    selection: Selection
    pool: int


def merge(run: ShardedRun, budget: Budget, recipe: TrainConfig) -> Merged:
    """Merge all shards of a run.

    Raises:
        WaitsError: if a file has not been scored, naming it.
        CheckpointError: if a shard is of another run, damaged, or of no file of the pool.
        BudgetError: if the budget is a time, or leaves nothing to train with.
        DataError: if the pool leaks into target or test set, or an id occurs twice.
    """
    check_unit(budget)
    run.begin()
    state, ledger = run.finished_state()
    store = run.store("values", state)
    parts = _all_parts(run, store)
    _add_ledgers(ledger, run, parts)
    _check_copies(parts)
    pool = _PoolTotals(parts)
    workload = cast(Workload, _Totals(pool, pool, recipe))
    train_flops = left_to_train(workload, budget, ledger.total(SELECT).flops, run.scoring.method)
    best = _best(run, parts, pool, train_flops)
    target = _number(parts[0], "target_usage")
    n_target = int(parts[0].header["held_out"]["target"])
    cut = run.scoring.cut
    n_kept = cut.size(best["cost"].to_numpy(), train_flops, lambda: (n_target, target), pool.flops)
    kept = best.slice(0, n_kept)
    selection = _selection(run, parts, kept, state, ledger, budget)
    selection.target_fraction = cut.target_share(n_target, n_kept)
    return Merged(selection, len(pool))


def check_unit(budget: Budget) -> None:
    """Refuse a budget of time.

    Raises:
        BudgetError: with the units that can be used.
    """
    if budget.unit == "seconds":
        raise BudgetError(f"a budget of {budget} needs the speed of one machine: give FLOPs, usages, epochs or tokens")


class _PoolTotals:
    """The sums over all files that budgets are converted by; as a pool and as its costs."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self._n = sum(part.header["rows"] for part in parts)
        self.flops = math.fsum(_number(part, "usage_flops") for part in parts)
        self._tokens = math.fsum(_number(part, "tokens") for part in parts)
        self.step_share = _number(parts[0], "step_share")

    def __len__(self) -> int:
        return self._n

    def per_usage(self, pool: Any, batch_size: int) -> float:
        """See `cads.accounting.costs.Costs`."""
        return self.flops / self._n

    def tokens_per_example(self, pool: Any) -> float:
        """See `cads.accounting.costs.Costs`."""
        return self._tokens / self._n


@dataclass(frozen=True)
class _Totals:
    """What `Budget` asks of a task."""

    pool: _PoolTotals
    costs: _PoolTotals
    recipe: TrainConfig


def _all_parts(run: ShardedRun, store: PartStore) -> list[Part]:
    """The values of all files, in their order."""
    foreign = store.foreign({store.path(file).name for file in run.files})
    if foreign:
        raise CheckpointError(
            f"the shard {foreign[0]} is of no file of this pool ({len(foreign)} such): remove it, or choose another "
            "folder with --out"
        )
    found = {file.name: store.read(file) for file in run.files}
    missing = [name for name, part in found.items() if part is None]
    if missing:
        raise WaitsError(
            f"{len(missing)} of {len(run.files)} files have not been scored, such as {missing[0]}: run their shards, "
            "then merge"
        )
    return [part for part in found.values() if part is not None]


def _add_ledgers(ledger: Ledger, run: ShardedRun, parts: Sequence[Part]) -> None:
    """Add what surveys and values cost, in the order of the files."""
    prepared = run.prepared()
    surveys = run.surveyed(prepared) if run.scoring.surveys and prepared is not None else []
    for part in [*(part for part in surveys if part is not None), *parts]:
        ledger.merge(Ledger.from_json(part.header["ledger"]))


def _check_copies(parts: Sequence[Part]) -> None:
    """Refuse a pool whose files together hold copies of more than `LEAK_TOLERANCE` of target or test set."""
    for name, size in parts[0].header["held_out"].items():
        copies = sorted({copied for part in parts for copied in part.header["copies"][name]})
        if len(copies) > LEAK_TOLERANCE * size:
            raise DataError(
                f"{len(copies)} of {size} {name} examples have exact copies in the pool, such as {copies[:3]}: remove "
                "them from one side"
            )
        if copies:
            log.warning(
                "%d of %d %s examples have exact copies in the pool, such as %s", len(copies), size, name, copies[:3]
            )


def _best(run: ShardedRun, parts: Sequence[Part], pool: _PoolTotals, train_flops: float) -> pa.Table:
    """The best examples that a pass of the final training over the pool alone pays for, best first."""
    cut = run.scoring.cut
    best = TopK(cut.pass_flops(train_flops, pool.flops) * ROUNDING)
    middle = None
    if run.scoring.nearest_median:
        middle = median(lambda: (table["value"].to_numpy() for _, _, table in iterate(parts)), len(pool))
    for i, _, table in iterate(parts):
        value = table["value"].to_numpy()
        best.add(
            table["id"].combine_chunks(),
            value if middle is None else -np.abs(value - middle),
            table["cost"].to_numpy() + pool.step_share,
            part=np.full(len(table), i, dtype=np.int32),
            source=table["source"].to_numpy(),
            row=table["row"].to_numpy(),
        )
    return best.table()


def _selection(
    run: ShardedRun, parts: Sequence[Part], kept: pa.Table, state: State, ledger: Ledger, budget: Budget
) -> Selection:
    """The Selection of the kept examples."""
    n, scoring = len(kept), run.scoring
    digest = hashlib.sha256("\n".join(part.header["pool_hash"] for part in parts).encode())
    n_pool = sum(part.header["rows"] for part in parts)
    return Selection(
        ids=kept["id"].combine_chunks(),
        score=kept["score"].to_numpy(),
        probability=np.ones(n),
        selected=np.ones(n, dtype=bool),
        method=scoring.method,
        seed=run.seed,
        budget=budget,
        ledger=ledger,
        pool_hash=digest.hexdigest(),
        sources=_sources(parts, kept),
        source_probability=scoring.source_probability(state),
        config=scoring.config,
        notes={**scoring.notes(state), POOL_EXAMPLES: n_pool, "files": len(parts)},
        origin=_origin(parts, kept),
    )


def _sources(parts: Sequence[Part], kept: pa.Table) -> pa.DictionaryArray | None:
    """The name of the source of each kept example; None if the pool has none."""
    codes = kept["source"].to_numpy()
    if (codes < 0).any():
        return None
    names: dict[str, int] = {}
    offsets = np.cumsum([0, *(len(part.header["sources"]) for part in parts)])
    of_all = np.array(
        [names.setdefault(x, len(names)) for part in parts for x in part.header["sources"]], dtype=np.int32
    )
    return pa.DictionaryArray.from_arrays(
        pa.array(of_all[offsets[kept["part"].to_numpy()] + codes]), pa.array(list(names), pa.string())
    )


def _origin(parts: Sequence[Part], kept: pa.Table) -> Origin | None:
    """The file and row of each kept example, with the files that have one; None if they are not known."""
    rows, part_of = kept["row"].to_numpy(), kept["part"].to_numpy()
    used, file = np.unique(part_of, return_inverse=True)
    headers = [parts[i].header["origin"] for i in used.tolist()]
    if (rows < 0).any() or any(header is None for header in headers):
        return None
    return Origin(tuple(FileOrigin.from_json(header) for header in headers), file.astype(np.int32), rows)


def _number(part: Part, name: str) -> float:
    return float(part.header[name])
