"""What a run has done, written down, so that the same run can be gone through again without doing it twice.

A selector is a deterministic program: its draws are pure functions of (seed, step), and all that is costly in it
goes through few doors (training, measuring, scoring). So it is resumed by replay: it runs again from its start, what
was finished answers from the journal, with its charges to the ledger, and what was under way goes on from its last
checkpoint. Nothing of this is asked of the selector.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cads.budget import Entry, Ledger
from cads.checkpoint import CheckpointConfig, Checkpoints, State, StoredTensors
from cads.errors import CheckpointError, NonFiniteError
from cads.interrupt import Interrupted, Interrupts

log = logging.getLogger(__name__)

FINISHED, UNDERWAY = "finished", "underway"
Charges = list[dict[str, Any]]
"""What an operation added to a ledger: for each entry where it stood after, and the seconds it took."""


class Progress:
    """How an operation tells where it is. Outside a journal nothing is kept.

    Attributes:
        restored: what the operation last told, in a process that is gone, or None.
    """

    restored: State | None = None

    def step(self, state: Callable[[], State]) -> None:
        """One step is done; `state` is all that is needed to go on, and is asked for only if it is written down.

        Raises:
            Interrupted: if the run was asked to stop, once the state is written.
        """


def perform(name: str, arguments: Sequence[Any], ledger: Ledger, compute: Callable[[Progress], State]) -> State:
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
        return compute(Progress())
    return journal.perform(name, arguments, ledger, compute)


def in_shards(
    name: str, arguments: Sequence[Any], ledger: Ledger, count: int, shard: Callable[[int], np.ndarray]
) -> np.ndarray:
    """Concatenate `shard(0)`, ..., `shard(count - 1)` along their first axis: a pass whose finished shards survive.

    Args:
        shard: charges `ledger` for what it does.
    """

    def compute(progress: Progress) -> State:
        found: list[np.ndarray] = []

        def state() -> State:
            return State({"done": done}, {"found": torch.from_numpy(np.concatenate(found))})

        done = 0
        if progress.restored is not None:
            done = int(progress.restored.number("done"))
            found.append(_found(progress.restored))
        for i in range(done, count):
            found.append(shard(i))
            done = i + 1
            progress.step(state)
        return state()

    return _found(perform(name, arguments, ledger, compute))


def _found(state: State) -> np.ndarray:
    if "found" not in state.tensors:
        raise CheckpointError("the scores of a pool are not where they were stored: begin anew with --overwrite true")
    return np.asarray(state.tensors["found"].numpy())


@dataclass
class _Record:
    """One finished operation."""

    name: str
    key: str
    values: dict[str, Any]
    charges: Charges
    tensors: StoredTensors | dict[str, torch.Tensor]
    prefix: str = ""

    def state(self) -> State:
        loaded = self.tensors.load(self.prefix) if isinstance(self.tensors, StoredTensors) else self.tensors
        return State(self.values, loaded)


class Journal:
    """The operations of one run, in order, in a folder.

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
        self.checkpoints = Checkpoints(folder, identity)
        self.interrupts = interrupts or Interrupts()
        self.inside = False
        self._config = config or CheckpointConfig()
        self._finished: dict[int, _Record] = {}
        self._pending: dict[int, _Record] = {}
        self._underway: _Record | None = None
        self._underway_index = -1
        self._next = 0
        self._steps = 0
        self._written = time.monotonic()
        self._read()

    @property
    def resumed(self) -> bool:
        """Whether there was something to go on from."""
        return bool(self._finished) or self._underway is not None

    @contextmanager
    def open(self) -> Iterator[Journal]:
        """Let `perform` answer from this journal within the block.

        What is done is written down if the block is interrupted, if numbers go wrong, or a disk is full. A setting
        that is refused leaves nothing beyond what was due, so that it can be corrected.
        """
        token = _CURRENT.set(self)
        try:
            yield self
        except (Interrupted, NonFiniteError, CheckpointError, OSError):
            self._flush()
            raise
        finally:
            _CURRENT.reset(token)

    def perform(
        self, name: str, arguments: Sequence[Any], ledger: Ledger, compute: Callable[[Progress], State]
    ) -> State:
        """See the function `perform`."""
        index, self._next = self._next, self._next + 1
        before = {key: replace(entry) for key, entry in ledger.entries.items()}
        key = _key(index, name, arguments, before)
        if (record := self._finished.pop(index, None)) is not None:
            self._check(index, name, key, record)
            _restore(ledger, record.charges)
            return record.state()
        if self._underway is not None and self._underway_index > index:
            # The record of this operation was damaged; writing it anew removes the file of the one under way.
            self._underway = replace(self._underway, tensors=self._underway.state().tensors)
        progress = _Underway(self, index, name, key, ledger, before)
        if self._underway is not None and self._underway_index == index:
            self._check(index, name, key, self._underway)
            _restore(ledger, self._underway.charges)
            progress.restored = self._underway.state()
            self._underway = None
        self.inside = True
        try:
            with self.interrupts.held():
                state = compute(progress)
        finally:
            self.inside = False
        kept = state.detached()
        self._pending[index] = _Record(name, key, kept.values, _charges(before, ledger), kept.tensors)
        self._steps += 1
        if self._due() or self.interrupts.pending is not None:
            self._flush()
        self.interrupts.raise_if_pending(f"after {name}")
        return state

    def _read(self) -> None:
        """Take in what an earlier process has written."""
        self.checkpoints.sweep()
        for path, values, tensors in self.checkpoints.read(FINISHED):
            for index, record in _records(path, values, tensors):
                self._finished.setdefault(index, record)
        for path, values, tensors in self.checkpoints.read(UNDERWAY):
            for self._underway_index, self._underway in _records(path, values, tensors):
                return

    def _check(self, index: int, name: str, key: str, record: _Record) -> None:
        if record.key != key:
            raise CheckpointError(
                f"operation {index} of this run is {name}, with other arguments than {record.name} in the journal "
                f"{self.checkpoints.folder}: this run does not repeat the one before; begin anew with --overwrite true"
            )

    def _due(self) -> bool:
        seconds, steps = self._config.every_seconds, self._config.every_steps
        late = seconds is not None and time.monotonic() - self._written >= seconds
        return late or (steps is not None and self._steps >= steps)

    def _flush(self) -> bool:
        """Write the finished operations that are not yet written; returns whether all are."""
        self._steps, self._written = 0, time.monotonic()
        if not self._pending:
            return True
        if self.checkpoints.write(FINISHED, _state_of(self._pending)) is None:
            return False
        self._pending.clear()
        self.checkpoints.prune(UNDERWAY, keep=0)
        return True

    def _save(self, index: int, record: _Record) -> bool:
        """Write where the operation under way is, after all that was finished before it."""
        whole = self._flush()
        if self.checkpoints.write(UNDERWAY, _state_of({index: record})) is None:
            return False
        self.checkpoints.prune(UNDERWAY)
        return whole


class _Underway(Progress):
    """The progress of one operation of a journal."""

    def __init__(
        self, journal: Journal, index: int, name: str, key: str, ledger: Ledger, before: dict[tuple[str, str], Entry]
    ) -> None:
        self._journal = journal
        self._index, self._name, self._key = index, name, key
        self._ledger, self._before = ledger, before

    def step(self, state: Callable[[], State]) -> None:
        journal = self._journal
        journal._steps += 1
        if journal.interrupts.pending is None and not journal._due():
            return
        now = state()
        charges = _charges(self._before, self._ledger)
        written = journal._save(self._index, _Record(self._name, self._key, now.values, charges, now.tensors))
        where = f"during {self._name}" + ("" if written else " (its checkpoint could not be written)")
        journal.interrupts.raise_if_pending(where)


def _key(index: int, name: str, arguments: Sequence[Any], before: Mapping[tuple[str, str], Entry]) -> str:
    spent = [[*key, entry.flops] for key, entry in before.items()]
    return hashlib.sha256(json.dumps([index, name, list(arguments), spent]).encode()).hexdigest()


def _charges(before: Mapping[tuple[str, str], Entry], ledger: Ledger) -> Charges:
    """What has changed in a ledger. Sums are kept as they stand, since adding again could round otherwise."""
    changed = []
    for (phase, stage), entry in ledger.entries.items():
        old = before.get((phase, stage))
        if old != entry:
            took = entry.seconds - (0.0 if old is None else old.seconds)
            changed.append({"phase": phase, "stage": stage, **asdict(entry), "seconds": took})
    return changed


def _restore(ledger: Ledger, charges: Charges) -> None:
    for charge in charges:
        entry = ledger.entries.setdefault((charge["phase"], charge["stage"]), Entry())
        entry.flops, entry.usages = charge["flops"], charge["usages"]
        entry.tokens, entry.answer_tokens = charge["tokens"], charge["answer_tokens"]
        entry.seconds += charge["seconds"]


def _state_of(records: Mapping[int, _Record]) -> State:
    """Records as one checkpoint: their values in a list, their tensors under the number of each."""
    values, tensors = [], {}
    for index, record in records.items():
        about = {"index": index, "name": record.name, "key": record.key}
        values.append({**about, "values": record.values, "charges": record.charges})
        loaded = record.state().tensors
        tensors.update({f"{index}/{name}": x for name, x in loaded.items()})
    return State({"operations": values}, tensors)


def _records(path: Path, values: dict[str, Any], tensors: StoredTensors) -> Iterator[tuple[int, _Record]]:
    """What `_state_of` put together.

    Raises:
        CheckpointError: if the values are not such as it writes.
    """
    try:
        for operation in values["operations"]:
            charges = [_checked(charge) for charge in operation["charges"]]
            about = (str(operation["name"]), str(operation["key"]), dict(operation["values"]), charges)
            index = int(operation["index"])
            yield index, _Record(*about, tensors, f"{index}/")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"checkpoint {path} does not hold a journal: {type(error).__name__}: {error}") from error


def _checked(charge: dict[str, Any]) -> dict[str, Any]:
    """A charge, if all its parts are there and are numbers that a ledger can hold."""
    amounts = [charge[f.name] for f in fields(Entry)]
    sound = all(isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < math.inf for x in amounts)
    if not (sound and isinstance(charge["phase"], str) and isinstance(charge["stage"], str)):
        raise ValueError(f"charge {charge!r}")
    return charge


_CURRENT: ContextVar[Journal | None] = ContextVar("journal", default=None)
"""The journal of the run that is going on in this context."""
