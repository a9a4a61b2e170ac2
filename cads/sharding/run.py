"""One shard of a run: it scores its files, skips what is done, and says what it waits for."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.errors import BudgetError, CheckpointError
from cads.launch.launcher import WaitsError
from cads.monitor import Monitor
from cads.runtime.atomic_files import whole_file
from cads.runtime.checkpoint import Checkpoints, State, differences, load_json
from cads.runtime.lock import LockedError, RunLock
from cads.runtime.shard import Shard
from cads.runtime.signals import Interrupts
from cads.scoring.pool_scores import check_finite
from cads.scoring.sharded import PoolPart, ShardedScoring
from cads.sharding.store import Kind, NamedFile, Part, PartStore
from cads.task import Task

log = logging.getLogger(__name__)

SHARDS = "shards"
"""The folder of all parts, in the folder of the run."""
RECORD = "run.json"
COLUMNS = {
    "id": pa.string(),
    "value": pa.float64(),
    "cost": pa.float64(),
    "source": pa.int32(),
    "row": pa.int64(),
}
"""Of the values of a file: the example, its value, FLOPs of a usage without the optimizer's share, its source as an
index into `sources` of the header (-1: none), and its row in the file (-1: not known)."""
PREPARED, COMBINED, DONE = "prepared", "combined", "done"
POLL_SECONDS = 0.5
"""Interval at which it is looked whether another process has done what is done once."""


class Parts(Protocol):
    """The files of a pool, and a task for each; see `cads.tasks.language.pool_parts`."""

    @property
    def files(self) -> Sequence[NamedFile]:
        """All files, in a fixed order."""
        ...

    def part(self, text_file: Any) -> AbstractContextManager[PoolPart]:
        """The task of one file."""
        ...

    def sample(self, rows: list[dict[str, Any]]) -> AbstractContextManager[Task]:
        """A task whose pool are some rows of the files."""
        ...


class ShardedRun:
    """A run in shards, in its folder, which all machines see.

    Args:
        folder: of the run. scoring: of the method. parts: the files of the pool. seed: of the run.
        identity: settings, code and versions on which values depend, as JSON values.
        budget: what the values may cost, if it covers them.
    """

    def __init__(
        self,
        folder: Path,
        scoring: ShardedScoring,
        parts: Parts,
        *,
        seed: int,
        identity: Mapping[str, Any],
        budget: Budget,
    ) -> None:
        self.folder, self.scoring, self.parts, self.seed = folder / SHARDS, scoring, parts, seed
        self.identity: dict[str, Any] = json.loads(json.dumps(dict(identity)))
        self._budget = budget
        self._first: tuple[ExitStack, PoolPart] | None = None
        self._states: dict[str, State] = {}
        self._interrupts = Interrupts()

    @cached_property
    def files(self) -> list[NamedFile]:
        """All files of the pool."""
        return list(self.parts.files)

    def begin(self) -> None:
        """Compare the run with the record in its folder, or write it.

        Raises:
            CheckpointError: naming what differs, if the folder holds shards of another run, or of other files.
        """
        path = self.folder / RECORD
        record = {"identity": self.identity, "files": {f.name: f.file.to_json() for f in self.files}}
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            whole_file(path, json.dumps(record, indent=1, sort_keys=True) + "\n")
            return
        try:
            stored = load_json(path)
            changed = differences(stored["identity"], self.identity)
            changed += _file_changes(stored["files"], record["files"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}): choose another folder with --out") from error
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise CheckpointError(
                f"{self.folder} holds shards of another run: {'; '.join(changed[:5])}{more}; choose another folder "
                "with --out, or remove this one"
            )

    def run(self, shard: Shard, monitor: Monitor | None = None) -> None:
        """Score the files of a shard that are not done.

        Raises:
            WaitsError: if files of other shards have to be surveyed first, or another process has files of this one.
            BudgetError: if the budget covers selection, and scoring the pool would take all of it.
            CheckpointError: if a part is of another run, or damaged.
            Interrupted: if this process was asked to stop.
        """
        self.begin()
        mine = self._files_of(shard)
        with self._interrupts.listen(), ExitStack() as stack:
            stack.callback(self.close)
            if self._scored(mine):
                return
            prepared = self._once(PREPARED, {}, lambda ledger: self._prepare(ledger, monitor))
            if self.scoring.surveys:
                store = self.store("surveys", prepared)
                busy = self._each(store, mine, lambda file: self._survey(file, prepared))
                missing = [f for f in self.files if not store.has(f)]
                if missing:
                    raise WaitsError(
                        f"shard {shard} is surveyed; {len(missing)} of {len(self.files)} files of others are not, such "
                        f"as {missing[0].name}: run it again when they are ({len(busy)} are being surveyed)"
                    )
            state = self._combined(prepared, monitor)
            values = self.scoring.values(self._first_part().task, state, seed=self.seed)
            busy = self._each(self.store("values", state), mine, lambda file: self._values(file, values))
            if busy:
                raise WaitsError(f"{len(busy)} files of shard {shard} are with other processes, such as {busy[0].name}")

    def pending(self, shard: Shard) -> bool:
        """Whether a shard has something to do now: files to survey, or files to score if all are surveyed."""
        mine = self._files_of(shard)
        if not mine or self._scored(mine):
            return False
        prepared = self.prepared()
        if prepared is None or not self.scoring.surveys:
            return True
        store = self.store("surveys", prepared)
        return not all(store.has(f) for f in mine) or all(store.has(f) for f in self.files)

    def finished_state(self) -> tuple[State, Ledger]:
        """What was prepared and combined, and what that cost.

        Raises:
            WaitsError: if it has not been made.
        """
        ledger, state = Ledger(), self._read(PREPARED, {})
        if state is not None:
            ledger.merge(Ledger.from_json(state.values["ledger"]))
            if self.scoring.surveys:
                prepared = _inner(state)
                state = self._read(COMBINED, {"prepared": prepared.digest})
                if state is not None:
                    ledger.merge(Ledger.from_json(state.values["ledger"]))
        if state is None:
            raise WaitsError(f"{self.folder}: no shard has been scored yet; run all shards before --merge")
        return _inner(state), ledger

    def surveyed(self, prepared: State) -> list[Part | None]:
        """The surveys of all files, in their order."""
        store = self.store("surveys", prepared)
        return [store.read(f) for f in self.files]

    def prepared(self) -> State | None:
        """What was prepared, if it was."""
        state = self._read(PREPARED, {})
        return None if state is None else _inner(state)

    def store(self, kind: Kind, state: State) -> PartStore:
        """The parts of one kind, which depend on what was prepared or combined."""
        return PartStore(self.folder / kind, {**self.identity, "state": state.digest})

    def first_task(self) -> Task:
        """The task of the first file."""
        return self._first_part().task

    def close(self) -> None:
        """Let go of the first file."""
        if self._first is not None:
            self._first[0].close()
            self._first = None

    def _files_of(self, shard: Shard) -> list[NamedFile]:
        return [self.files[i] for i in shard.take([max(1, f.file.size) for f in self.files])]

    def _scored(self, files: Sequence[NamedFile]) -> bool:
        """Whether some files have their values."""
        state = self._final_state()
        if state is None:
            return False
        store = self.store("values", state)
        return all(store.has(f) for f in files)

    def _final_state(self) -> State | None:
        """What values depend on; None before it is made."""
        prepared = self.prepared()
        if prepared is None or not self.scoring.surveys:
            return prepared
        combined = self._read(COMBINED, {"prepared": prepared.digest})
        return None if combined is None else _inner(combined)

    def _prepare(self, ledger: Ledger, monitor: Monitor | None) -> State:
        return self.scoring.prepare(self._first_part().task, seed=self.seed, ledger=ledger, monitor=monitor)

    def _combined(self, prepared: State, monitor: Monitor | None) -> State:
        if not self.scoring.surveys:
            return prepared

        def combine(ledger: Ledger) -> State:
            surveys = self.surveyed(prepared)
            with ExitStack() as stack:
                return self.scoring.combine(
                    (_whole_table(part) for part in surveys if part is not None),
                    self._first_part().task,
                    prepared,
                    sample=lambda rows: stack.enter_context(self.parts.sample(rows)),
                    seed=self.seed,
                    ledger=ledger,
                    monitor=monitor,
                )

        return self._once(COMBINED, {"prepared": prepared.digest}, combine)

    def _once(self, name: str, identity: Mapping[str, Any], make: Callable[[Ledger], State]) -> State:
        """What is made once for all shards: read, or made here while others wait."""
        while (state := self._read(name, identity)) is None:
            try:
                with RunLock(self.folder / "locks" / name):
                    if self._read(name, identity) is None:
                        ledger = Ledger()
                        made = make(ledger)
                        values = {"state": made.values, "ledger": ledger.to_json(seconds=True)}
                        if self._checkpoints(name, identity).write(DONE, State(values, made.tensors)) is None:
                            raise CheckpointError(f"{self.folder / name} cannot be written: look at the disk")
            except LockedError:
                self._interrupts.stop_together(f"while another process makes what is {name}")
                time.sleep(POLL_SECONDS)
        return _inner(state)

    def _read(self, name: str, identity: Mapping[str, Any]) -> State | None:
        if name not in self._states:
            for _, values, tensors in self._checkpoints(name, identity).read(DONE):
                self._states[name] = State(values, tensors.load())
                break
        return self._states.get(name)

    def _checkpoints(self, name: str, identity: Mapping[str, Any]) -> Checkpoints:
        return Checkpoints(self.folder / name, {**self.identity, **identity})

    def _each(
        self, store: PartStore, files: Sequence[NamedFile], make: Callable[[NamedFile], tuple[pa.Table, dict[str, Any]]]
    ) -> list[NamedFile]:
        """Make the parts of some files that are missing; returns the files that other processes have."""
        busy = []
        for file in files:
            if store.read(file) is not None:
                continue
            self._interrupts.stop_together(f"before {file.name}")
            try:
                with RunLock(self.folder / "locks" / f"{store.folder.name}-{store.path(file).name}"):
                    if store.read(file) is None:
                        table, header = make(file)
                        with self._interrupts.held():
                            store.publish(file, table, header)
            except LockedError:
                busy.append(file)
        return busy

    def _survey(self, file: NamedFile, prepared: State) -> tuple[pa.Table, dict[str, Any]]:
        ledger = Ledger()
        with self._open(file) as part:
            table = self.scoring.survey(part, prepared, seed=self.seed, ledger=ledger)
        return table, {"ledger": ledger.to_json()}

    def _values(self, file: NamedFile, values: Callable[[Task, Ledger], np.ndarray]) -> tuple[pa.Table, dict[str, Any]]:
        ledger = Ledger()
        with self._open(file) as part:
            task = part.task
            self._check_budget(file, task)
            found = values(task, ledger)
            check_finite(found, task.pool, self.scoring.method)
            return _described(task, found, ledger)

    def _check_budget(self, file: NamedFile, task: Task) -> None:
        """Refuse to score if the whole pool would take more than a budget of FLOPs that covers it."""
        if not self._budget.count_selection or self._budget.unit != "FLOPs":
            return
        total_bytes = sum(f.file.size for f in self.files)
        flops = self.scoring.plan(task).total(SELECT).flops * total_bytes / max(1, file.file.size)
        if flops > self._budget.amount:
            raise BudgetError(
                f"{self.scoring.method} would spend about {flops:.4g} of {self._budget.amount:.4g} FLOPs on scoring "
                f"{len(self.files)} files, by the size of {file.name}: raise the budget, or do not count selection"
            )

    def _open(self, file: NamedFile) -> AbstractContextManager[PoolPart]:
        first = self._first_part()
        if file is self.files[0]:
            return _Kept(first)
        return self.parts.part(file)

    def _first_part(self) -> PoolPart:
        """The first file, open until `close`: its target, models and costs serve all."""
        if self._first is None:
            with ExitStack() as stack:
                part = stack.enter_context(self.parts.part(self.files[0]))
                self._first = stack.pop_all(), part
        return self._first[1]


class _Kept(AbstractContextManager[PoolPart]):
    """A part that stays open."""

    def __init__(self, part: PoolPart) -> None:
        self._part = part

    def __enter__(self) -> PoolPart:
        return self._part

    def __exit__(self, *error: object) -> None:
        return


def _described(task: Task, values: np.ndarray, ledger: Ledger) -> tuple[pa.Table, dict[str, Any]]:
    """The rows of the values of one file, and its header."""
    pool, costs = task.pool, task.costs
    n, batch_size = len(pool), task.recipe.batch_size
    origin = pool.origin
    table = pa.table(
        {
            "id": pool.ids,
            "value": np.asarray(values, dtype=np.float64),
            "cost": costs.usages(pool),
            "source": np.full(n, -1, dtype=np.int32) if pool.sources is None else pool.sources.astype(np.int32),
            "row": np.full(n, -1, dtype=np.int64) if origin is None else origin.row,
        },
        schema=pa.schema(list(COLUMNS.items())),
    )
    header = {
        "ledger": ledger.to_json(),
        "sources": list(pool.source_names) if pool.sources is not None else [],
        "origin": None if origin is None or len(origin.files) != 1 else origin.files[0].to_json(),
        "pool_hash": pool.content_hash,
        "copies": task.copies(),
        "held_out": {part.name: len(part) for part in (task.target, task.test)},
        "step_share": costs.optimizer_step / batch_size,
        "usage_flops": math.fsum([costs.per_usage(pool, batch_size) * n]),
        "tokens": costs.tokens_per_example(pool) * n,
        "target_usage": costs.per_usage(task.target, batch_size),
    }
    return table, header


def _inner(stored: State) -> State:
    """The state that `_once` has stored beside its ledger."""
    return State(stored.values["state"], stored.tensors)


def _whole_table(part: Part) -> pa.Table:
    import pyarrow.parquet as pq

    schema = pq.read_schema(part.table_path)
    return part.table(dict(zip(schema.names, schema.types, strict=True)))


def _file_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two listings, one phrase a file."""
    changes = [f"the file {name} was not in the pool" for name in sorted(now.keys() - before.keys())]
    changes += [f"the file {name} is no longer in the pool" for name in sorted(before.keys() - now.keys())]
    return changes + [
        f"the file {name} has changed" for name in sorted(now) if before.get(name, now[name]) != now[name]
    ]


def iterate(parts: Sequence[Part]) -> Iterator[tuple[int, Part, pa.Table]]:
    """The values of all parts, a row group at a time, with the number of the part."""
    for i, part in enumerate(parts):
        for table in part.groups(COLUMNS):
            yield i, part, table
