"""The journal of a run: records of its operations on disk, so that a resumed run does not repeat finished work.

A selector is a deterministic program: its draws are pure functions of (seed, step), and all of its costly work goes
through a few functions (training, measuring, scoring). So it is resumed by replay: the program runs again from its
start. The journal returns the results of finished operations, and restores their charges to the ledger. An operation
under way resumes from its last checkpoint. Selectors need no code for this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cads.accounting.ledger import Ledger, LedgerEntry
from cads.errors import BudgetError, CheckpointError, ConfigError, DataError, SelectionError
from cads.runtime.checkpoint import CheckpointConfig, State
from cads.runtime.journal_record import Charges, JournalRecord, charges_since, key_of, restore
from cads.runtime.journal_store import RecordStore
from cads.runtime.lockstep import Lockstep, Merge, Operation, OperationStatus, Part, StepReporter, map_in_turn
from cads.runtime.processes import ProcessGroup, active_group
from cads.runtime.signals import Interrupts

SHARDS_AT_ONCE = 4
"""Shards that each of several processes computes before they exchange their results."""
REFUSALS = (ConfigError, DataError, BudgetError, SelectionError)
"""Errors that are put right by another setting, with which a journal of this run could not be resumed."""


def replay_or_run(
    name: str, arguments: Sequence[Any], ledger: Ledger, compute: Callable[[StepReporter], State]
) -> State:
    """Run a costly operation, or take its result from the journal if this run has done it before.

    An operation inside another one is part of it, and has no record of its own.

    Args:
        name: of the operation. arguments: its arguments, as JSON values; a replay must give the same ones.
        ledger: charged by `compute`; charged the same on replay.
        compute: runs the operation and returns all of its result. It changes nothing else that the run will read.

    Raises:
        CheckpointError: if the run that wrote the journal did another operation at this point.
    """
    journal = _CURRENT.get()
    if journal is None or journal.inside:
        return compute(StepReporter())
    return journal.replay_or_run(name, arguments, ledger, compute)


def replay_or_run_parallel(operations: Sequence[Operation], ledger: Ledger, part: Part, join: Merge) -> list[State]:
    """Run operations that do not depend on each other, divided among the processes.

    A journal records them as if one process had run one after another.

    Args:
        ledger: charged by `Operation.commit`, in order. part: runs the part of this process. join: see `Merge`.

    Returns:
        the result of each operation; the same in all processes.
    """
    journal = _CURRENT.get()
    if journal is None or journal.inside:
        lockstep = Lockstep(active_group(), join, lambda: (0, False), lambda states, signal: None)
        states = [_not_none(state) for state in join(lockstep.run(part, [OperationStatus() for _ in operations]))]
        for operation, state in zip(operations, states, strict=True):
            operation.commit(state)
        return states
    return journal.replay_or_run_parallel(operations, ledger, part, join)


def map_shards(
    name: str, arguments: Sequence[Any], ledger: Ledger, count: int, shard: Callable[[int], np.ndarray]
) -> np.ndarray:
    """Concatenate `shard(0)`, ..., `shard(count - 1)` along their first axis; finished shards survive an interruption.

    Several processes take the shards in turn.

    Args:
        shard: computes one shard, and charges `ledger` for it.
    """
    size = active_group().size
    shards_per_step = 1 if size == 1 else size * SHARDS_AT_ONCE

    def compute(progress: StepReporter) -> State:
        results: list[np.ndarray] = []

        def state() -> State:
            return State({"done": done}, {"found": torch.from_numpy(np.concatenate(results))})

        done = 0
        if progress.restored is not None:
            done = int(progress.restored.number("done"))
            results.append(_results(progress.restored))
        while done < count:
            shards = range(done, min(done + shards_per_step, count))
            results += map_in_turn(ledger, shards, shard)
            done = shards.stop
            progress.step(state)
        return state()

    return _results(replay_or_run(name, arguments, ledger, compute))


def _results(state: State) -> np.ndarray:
    if "found" not in state.tensors:
        raise CheckpointError("the stored results of a pass over a pool are missing: begin anew with --overwrite true")
    return np.asarray(state.tensors["found"].numpy())


def _not_none(state: State | None) -> State:
    assert state is not None
    return state


@dataclass(frozen=True)
class _StoredOperation:
    """What a journal has stored of an operation: name and key, whether it has finished, its charges and its state."""

    name: str
    key: str
    finished: bool
    charges: Charges
    state: State


class Journal:
    """The operations of one run, in order, in a folder.

    Of several processes the first reads and writes, and broadcasts what it reads.

    Args:
        folder: of the journal; the run resumes from the records in it.
        identity: identifies the run (settings, data, versions), as JSON values; another run's journal is refused.
        config: how often it is written.
        interrupts: of the command, if it listens to signals.

    Raises:
        CheckpointError: if the folder holds another run.
    """

    def __init__(
        self,
        folder: Path | str,
        identity: Mapping[str, Any],
        config: CheckpointConfig | None = None,
        interrupts: Interrupts | None = None,
    ) -> None:
        self.store = RecordStore(folder, identity, config or CheckpointConfig())
        self.interrupts = interrupts or Interrupts()
        self.inside = False
        self._world: ProcessGroup = active_group()
        self._next_index = 0
        self._resumed = bool(self._world.on_rank_zero(self.store.read))

    @property
    def resumed(self) -> bool:
        """Whether there were records to resume from."""
        return self._resumed

    @property
    def seconds(self) -> float:
        """Seconds of work on this run so far; only the first process includes those of earlier launches."""
        return self.store.seconds

    @contextmanager
    def open(self) -> Iterator[Journal]:
        """Let `replay_or_run` use this journal within the block.

        Finished operations are written if the block is interrupted or fails, such as for lack of memory. A refused
        setting writes nothing beyond what was due, so that it can be corrected.
        """
        token = _CURRENT.set(self)
        try:
            yield self
        except REFUSALS:
            raise
        except Exception:
            self.store.flush()
            raise
        finally:
            _CURRENT.reset(token)

    def replay_or_run(
        self, name: str, arguments: Sequence[Any], ledger: Ledger, compute: Callable[[StepReporter], State]
    ) -> State:
        """See the function `replay_or_run`."""
        index, self._next_index = self._next_index, self._next_index + 1
        before = _entries(ledger)
        key = key_of(index, name, arguments, before)
        self.sync(name, key)
        stored = self._stored(index)
        if stored is not None and stored.finished:
            self._check(index, name, key, stored)
            restore(ledger, stored.charges)
            return stored.state
        progress = _Underway(self, index, name, arguments, ledger, before)
        if stored is not None:
            self._check(index, name, progress.key, stored)
            restore(ledger, stored.charges)
            progress.resume_from(stored.state)
        self.inside = True
        try:
            with self.interrupts.held():
                state = compute(progress)
                self._write_record(index, name, key, state, charges_since(before, ledger))
        finally:
            self.inside = False
        self.store.count()
        self._checkpoint_if_due(f"after {name}")
        return state

    def replay_or_run_parallel(
        self, operations: Sequence[Operation], ledger: Ledger, part: Part, join: Merge
    ) -> list[State]:
        """See the function `replay_or_run_parallel`."""
        first, self._next_index = self._next_index, self._next_index + len(operations)
        # What was spent before each operation is known only when all are done: keys of those under way leave it out.
        keys = [key_of(first + i, o.name, o.arguments, {}) for i, o in enumerate(operations)]
        self.sync(operations[0].name, keys)
        stored_operations = [self._stored(first + i) for i in range(len(operations))]
        statuses = []
        for i, (operation, stored) in enumerate(zip(operations, stored_operations, strict=True)):
            if stored is not None and not stored.finished:
                self._check(first + i, operation.name, keys[i], stored)
            statuses.append(OperationStatus() if stored is None else OperationStatus(stored.finished, stored.state))
        states: list[State | None] = [s.state if s.finished else None for s in statuses]
        if None in states:
            self.inside = True
            try:
                with self.interrupts.held():
                    new_states = join(self._lockstep(first, operations, keys, join).run(part, statuses))
            finally:
                self.inside = False
            states = [new if old is None else old for old, new in zip(states, new_states, strict=True)]
        for i, (operation, stored) in enumerate(zip(operations, stored_operations, strict=True)):
            before = _entries(ledger)
            key = key_of(first + i, operation.name, operation.arguments, before)
            if stored is not None and stored.finished:
                self._check(first + i, operation.name, key, stored)
                restore(ledger, stored.charges)
                continue
            state = _not_none(states[i])
            operation.commit(state)
            self._write_record(first + i, operation.name, key, state, charges_since(before, ledger))
        self.store.count(len(operations))
        self._checkpoint_if_due(f"after {operations[0].name}")
        return [_not_none(state) for state in states]

    def _lockstep(self, first: int, operations: Sequence[Operation], keys: Sequence[str], join: Merge) -> Lockstep:
        """The lockstep of operations, which are recorded under their own indices."""

        def poll() -> tuple[int, bool]:
            self.store.count()
            return self.interrupts.pending or 0, self._world.first and self.store.due

        def save(states: list[State | None], signal: int) -> None:
            records = {
                first + i: JournalRecord(operations[i].name, keys[i], state.values, [], state.tensors)
                for i, state in enumerate(states)
                if state is not None
            }
            self._save_and_stop(records, signal, operations[0].name)

        return Lockstep(self._world, join, poll, save)

    def step(self, index: int, record: Callable[[], JournalRecord]) -> None:
        """The operation `index` has done one step; `record` gives its record, and is called only if it is written."""
        self.store.count()
        signal, due = self._all_reduce_signals()
        if signal or due:
            underway = record()
            self._save_and_stop({index: underway}, signal, underway.name)

    def _save_and_stop(self, records: dict[int, JournalRecord], signal: int, name: str) -> None:
        """Write the finished operations, then `records` of those under way.

        Raises:
            Interrupted: if a process was asked to stop, by `signal`.
        """
        written = self._world.on_rank_zero(lambda: self.store.save(records))
        self._stop(signal, f"during {name}" + ("" if written else " (its checkpoint could not be written)"))

    def _stored(self, index: int) -> _StoredOperation | None:
        """What the journal has stored of an operation, in all processes; None if nothing."""

        def read() -> State:
            record, finished = self.store.take(index)
            if record is None:
                return State({"name": None})
            state = record.state()
            header = {"name": record.name, "key": record.key, "finished": finished}
            return State({**header, "charges": record.charges, "values": state.values}, state.tensors)

        message = self._world.broadcast(read)
        fields = message.values
        if fields["name"] is None:
            return None
        state = State(fields["values"], message.tensors)
        return _StoredOperation(fields["name"], fields["key"], fields["finished"], fields["charges"], state)

    def _check(self, index: int, name: str, key: str, stored: _StoredOperation) -> None:
        if stored.key != key:
            raise CheckpointError(
                f"operation {index} of this run is {name}, with other arguments than {stored.name} in the journal "
                f"{self.store.checkpoints.folder}: this run does not repeat the one before; begin anew with "
                "--overwrite true"
            )

    def _write_record(self, index: int, name: str, key: str, state: State, charges: Charges) -> None:
        if self._world.first:
            detached = state.detached()
            self.store.keep(index, JournalRecord(name, key, detached.values, charges, detached.tensors))

    def sync(self, name: str, key: Any) -> None:
        """Before an operation: check that all processes run the same one; stop if one of them was asked to."""
        if self._world.size > 1:
            self._world.check_identical(f"the input of operation {name!r}", key)
            self._stop(self._all_reduce_signals()[0], f"before {name}")

    def _checkpoint_if_due(self, position: str) -> None:
        """Between two operations: write if a checkpoint is due, and stop if a process was asked to."""
        signal, due = self._all_reduce_signals()
        if signal or due:
            self.store.flush()
        self._stop(signal, position)

    def _all_reduce_signals(self) -> tuple[int, bool]:
        """The signal by which some process was asked to stop, or 0; whether a checkpoint is due in the first one."""
        due = self._world.first and self.store.due
        signal, write = self._world.all_reduce_max([self.interrupts.pending or 0, int(due)])
        return signal, bool(write)

    def _stop(self, signal: int, position: str) -> None:
        if signal:
            self.interrupts.pending = signal
            self.interrupts.raise_if_pending(position)


class _Underway(StepReporter):
    """The progress of one operation of a journal."""

    def __init__(
        self,
        journal: Journal,
        index: int,
        name: str,
        arguments: Sequence[Any],
        ledger: Ledger,
        before: dict[tuple[str, str], LedgerEntry],
    ) -> None:
        self._journal = journal
        self._index, self._name = index, name
        self._ledger, self._before = ledger, before
        self.key = key_of(index, name, arguments, {})

    def step(self, state: Callable[[], State]) -> None:
        self._journal.step(self._index, lambda: self._record(state()))

    def _record(self, now: State) -> JournalRecord:
        return JournalRecord(self._name, self.key, now.values, charges_since(self._before, self._ledger), now.tensors)


def _entries(ledger: Ledger) -> dict[tuple[str, str], LedgerEntry]:
    """A copy of the entries of a ledger."""
    return {key: replace(entry) for key, entry in ledger.entries.items()}


_CURRENT: ContextVar[Journal | None] = ContextVar("journal", default=None)
"""The journal of the run that is going on in this context."""
