"""What a run has done, written down, so that the same run can be gone through again without doing it twice.

A selector is a deterministic program: its draws are pure functions of (seed, step), and all that is costly in it
goes through few doors (training, measuring, scoring). So it is resumed by replay: it runs again from its start, what
was finished answers from the journal, with its charges to the ledger, and what was under way goes on from its last
checkpoint. Nothing of this is asked of the selector.
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
from cads.errors import CheckpointError, NonFiniteError
from cads.runtime.checkpoint import CheckpointConfig, State
from cads.runtime.journal_record import Charges, JournalRecord, charges_since, key_of, restore
from cads.runtime.journal_store import RecordStore
from cads.runtime.lockstep import Lockstep, Merge, Operation, OperationStatus, Part, StepReporter, divide
from cads.runtime.processes import ProcessError, ProcessGroup, active_group
from cads.runtime.signals import Interrupted, Interrupts

SHARDS_AT_ONCE = 4
"""Shards that each of several processes computes before they exchange what they have."""


def replay_or_run(
    name: str, arguments: Sequence[Any], ledger: Ledger, compute: Callable[[StepReporter], State]
) -> State:
    """Do something costly, or take it from the journal if this run has done it before.

    Within an operation, further ones are part of it.

    Args:
        name: what is done. arguments: with what, as JSON values: if they differ from before, so does the run.
        ledger: charged by `compute`; charged the same if the journal answers.
        compute: does it, and returns all of its result. It changes nothing else that the run will read.

    Raises:
        CheckpointError: if the run does something else here than the one that wrote the journal.
    """
    journal = _CURRENT.get()
    if journal is None or journal.inside:
        return compute(StepReporter())
    return journal.replay_or_run(name, arguments, ledger, compute)


def replay_or_run_parallel(operations: Sequence[Operation], ledger: Ledger, part: Part, join: Merge) -> list[State]:
    """Do operations that do not depend on each other, each process a part of them.

    A journal keeps them as it would if one process had performed one after another.

    Args:
        ledger: charged by `Operation.settle`, in order. part: does what falls to this process. join: see `Merge`.

    Returns:
        what came out of each; the same in all processes.
    """
    journal = _CURRENT.get()
    if journal is None or journal.inside:
        rounds = Lockstep(active_group(), join, lambda: (0, False), lambda states, signal: None)
        states = [_known(state) for state in join(rounds.run(part, [OperationStatus() for _ in operations]))]
        for operation, state in zip(operations, states, strict=True):
            operation.commit(state)
        return states
    return journal.replay_or_run_parallel(operations, ledger, part, join)


def map_shards(
    name: str, arguments: Sequence[Any], ledger: Ledger, count: int, shard: Callable[[int], np.ndarray]
) -> np.ndarray:
    """Concatenate `shard(0)`, ..., `shard(count - 1)` along their first axis: a pass whose finished shards survive.

    Several processes take shard after shard in turn.

    Args:
        shard: charges `ledger` for what it does.
    """
    size = active_group().size
    at_once = 1 if size == 1 else size * SHARDS_AT_ONCE

    def compute(progress: StepReporter) -> State:
        found: list[np.ndarray] = []

        def state() -> State:
            return State({"done": done}, {"found": torch.from_numpy(np.concatenate(found))})

        done = 0
        if progress.restored is not None:
            done = int(progress.restored.number("done"))
            found.append(_found(progress.restored))
        while done < count:
            following = range(done, min(done + at_once, count))
            found += divide(ledger, following, shard)
            done = following.stop
            progress.step(state)
        return state()

    return _found(replay_or_run(name, arguments, ledger, compute))


def _found(state: State) -> np.ndarray:
    if "found" not in state.tensors:
        raise CheckpointError("the scores of a pool are not where they were stored: begin anew with --overwrite true")
    return np.asarray(state.tensors["found"].numpy())


def _known(state: State | None) -> State:
    assert state is not None
    return state


@dataclass(frozen=True)
class _Recalled:
    """What a journal has of an operation: under which name and key, with what charges, and what came out so far."""

    name: str
    key: str
    finished: bool
    charges: Charges
    state: State


class Journal:
    """The operations of one run, in order, in a folder.

    Of several processes the first reads and writes, and tells the others.

    Args:
        folder: where it is; what is there already is gone on from.
        identity: what the run is (settings, data, versions), as JSON values: it is refused to go on with another.
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
        self._next = 0
        self._resumed = bool(self._world.on_rank_zero(self.store.read))

    @property
    def resumed(self) -> bool:
        """Whether there was something to go on from."""
        return self._resumed

    @property
    def seconds(self) -> float:
        """Seconds of work on this run so far, those of earlier processes included, as the first process knows."""
        return self.store.seconds

    @contextmanager
    def open(self) -> Iterator[Journal]:
        """Let `replay_or_run` answer from this journal within the block.

        What is done is written down if the block is interrupted, if numbers go wrong, a disk is full, or another
        process is lost. A setting that is refused leaves nothing beyond what was due, so that it can be corrected.
        """
        token = _CURRENT.set(self)
        try:
            yield self
        except (Interrupted, NonFiniteError, CheckpointError, ProcessError, OSError):
            self.store.flush()
            raise
        finally:
            _CURRENT.reset(token)

    def replay_or_run(
        self, name: str, arguments: Sequence[Any], ledger: Ledger, compute: Callable[[StepReporter], State]
    ) -> State:
        """See the function `replay_or_run`."""
        index, self._next = self._next, self._next + 1
        before = _entries(ledger)
        key = key_of(index, name, arguments, before)
        self.sync(name, key)
        known = self._recall(index)
        if known is not None and known.finished:
            self._check(index, name, key, known)
            restore(ledger, known.charges)
            return known.state
        progress = _Underway(self, index, name, arguments, ledger, before)
        if known is not None:
            self._check(index, name, progress.key, known)
            restore(ledger, known.charges)
            progress.restored = known.state
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
        first, self._next = self._next, self._next + len(operations)
        # What is spent before each of them is known when all are done: while they are under way, it is no part of keys.
        keys = [key_of(first + i, o.name, o.arguments, {}) for i, o in enumerate(operations)]
        self.sync(operations[0].name, keys)
        known = [self._recall(first + i) for i in range(len(operations))]
        standing = []
        for i, (operation, found) in enumerate(zip(operations, known, strict=True)):
            if found is not None and not found.finished:
                self._check(first + i, operation.name, keys[i], found)
            standing.append(OperationStatus() if found is None else OperationStatus(found.finished, found.state))
        states: list[State | None] = [s.state if s.finished else None for s in standing]
        if None in states:
            self.inside = True
            try:
                with self.interrupts.held():
                    joined = join(self._rounds(first, operations, keys, join).run(part, standing))
            finally:
                self.inside = False
            states = [new if old is None else old for old, new in zip(states, joined, strict=True)]
        for i, (operation, found) in enumerate(zip(operations, known, strict=True)):
            before = _entries(ledger)
            key = key_of(first + i, operation.name, operation.arguments, before)
            if found is not None and found.finished:
                self._check(first + i, operation.name, key, found)
                restore(ledger, found.charges)
                continue
            state = _known(states[i])
            operation.commit(state)
            self._write_record(first + i, operation.name, key, state, charges_since(before, ledger))
        self.store.count(len(operations))
        self._checkpoint_if_due(f"after {operations[0].name}")
        return [_known(state) for state in states]

    def _rounds(self, first: int, operations: Sequence[Operation], keys: Sequence[str], join: Merge) -> Lockstep:
        """The rounds of operations, which are written down under their own numbers."""

        def ask() -> tuple[int, bool]:
            self.store.count()
            return self.interrupts.pending or 0, self._world.first and self.store.due

        def keep(states: list[State | None], signal: int) -> None:
            records = {
                first + i: JournalRecord(operations[i].name, keys[i], state.values, [], state.tensors)
                for i, state in enumerate(states)
                if state is not None
            }
            self._save_and_stop(records, signal, operations[0].name)

        return Lockstep(self._world, join, ask, keep)

    def step(self, index: int, record: Callable[[], JournalRecord]) -> None:
        """The operation under way has done one step."""
        self.store.count()
        signal, due = self._all_reduce_signals()
        if signal or due:
            now = record()
            self._save_and_stop({index: now}, signal, now.name)

    def _save_and_stop(self, records: dict[int, JournalRecord], signal: int, name: str) -> None:
        """Write where operations under way are, after all that was finished before them.

        Raises:
            Interrupted: if a process was asked to stop by `signal`.
        """
        written = self._world.on_rank_zero(lambda: self.store.save(records))
        self._stop(signal, f"during {name}" + ("" if written else " (its checkpoint could not be written)"))

    def _recall(self, index: int) -> _Recalled | None:
        """What is known of an operation, in all processes."""

        def look() -> State:
            record, finished = self.store.take(index)
            if record is None:
                return State({"name": None})
            state = record.state()
            about = {"name": record.name, "key": record.key, "finished": finished}
            return State({**about, "charges": record.charges, "values": state.values}, state.tensors)

        found = self._world.broadcast(look)
        about = found.values
        if about["name"] is None:
            return None
        state = State(about["values"], found.tensors)
        return _Recalled(about["name"], about["key"], about["finished"], about["charges"], state)

    def _check(self, index: int, name: str, key: str, known: _Recalled) -> None:
        if known.key != key:
            raise CheckpointError(
                f"operation {index} of this run is {name}, with other arguments than {known.name} in the journal "
                f"{self.store.checkpoints.folder}: this run does not repeat the one before; begin anew with "
                "--overwrite true"
            )

    def _write_record(self, index: int, name: str, key: str, state: State, charges: Charges) -> None:
        if self._world.first:
            kept = state.detached()
            self.store.keep(index, JournalRecord(name, key, kept.values, charges, kept.tensors))

    def sync(self, name: str, key: Any) -> None:
        """Before an operation: all processes do the same, and end here if one of them was asked to stop."""
        if self._world.size > 1:
            self._world.check_identical(f"what {name} is done with", key)
            self._stop(self._all_reduce_signals()[0], f"before {name}")

    def _checkpoint_if_due(self, where: str) -> None:
        """Between two operations: write if it is time, and end if a process was asked to."""
        signal, due = self._all_reduce_signals()
        if signal or due:
            self.store.flush()
        self._stop(signal, where)

    def _all_reduce_signals(self) -> tuple[int, bool]:
        """The signal by which some process was asked to stop, or 0; whether the first finds it time to write."""
        due = self._world.first and self.store.due
        signal, write = self._world.all_reduce_max([self.interrupts.pending or 0, int(due)])
        return signal, bool(write)

    def _stop(self, signal: int, where: str) -> None:
        if signal:
            self.interrupts.pending = signal
            self.interrupts.raise_if_pending(where)


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
    """A copy of what a ledger holds."""
    return {key: replace(entry) for key, entry in ledger.entries.items()}


_CURRENT: ContextVar[Journal | None] = ContextVar("journal", default=None)
"""The journal of the run that is going on in this context."""
