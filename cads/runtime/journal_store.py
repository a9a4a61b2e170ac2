"""The records of a run in a folder: those of finished operations are written once, those under way again and again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cads.runtime.checkpoint import CheckpointConfig, Checkpoints
from cads.runtime.journal_record import JournalRecord, records_of, seconds_of, state_of

FINISHED, UNDERWAY = "finished", "underway"
"""The kinds of checkpoints."""


class RecordStore:
    """The records of the operations of one run, by their numbers; some of them on disk.

    Args:
        folder, identity: as for `Checkpoints`.
        config: how often it is written.
    """

    def __init__(self, folder: Path | str, identity: Mapping[str, Any], config: CheckpointConfig) -> None:
        self.checkpoints = Checkpoints(folder, identity)
        self._config = config
        self._finished: dict[int, JournalRecord] = {}
        self._pending: dict[int, JournalRecord] = {}
        self._underway: dict[int, JournalRecord] = {}
        self._steps = 0
        self._written = self._began = time.monotonic()
        self._before = 0.0

    def read(self) -> bool:
        """Take in what an earlier process has written; whether there was anything.

        Raises:
            CheckpointError: if it is of another run.
        """
        self.checkpoints.sweep()
        for path, values, tensors in self.checkpoints.read(FINISHED):
            self._before = max(self._before, seconds_of(path, values))
            for index, record in records_of(path, values, tensors):
                self._finished.setdefault(index, record)
        for path, values, tensors in self.checkpoints.read(UNDERWAY):
            self._before = max(self._before, seconds_of(path, values))
            self._underway = dict(records_of(path, values, tensors))
            break
        return bool(self._finished) or bool(self._underway)

    def take(self, index: int) -> tuple[JournalRecord | None, bool]:
        """What was read of an operation, if anything, and whether it had finished; it is given away once."""
        finished, begun = self._finished.pop(index, None), self._underway.pop(index, None)
        if finished is not None:
            return finished, True
        # Writing this operation anew removes the file of those that were under way with it, or after it where its own
        # record was damaged.
        for later, other in self._underway.items():
            self._underway[later] = replace(other, tensors=other.state().tensors)
        return begun, False

    def keep(self, index: int, record: JournalRecord) -> None:
        """An operation has finished; it is written with the next ones."""
        self._pending[index] = record

    def count(self, steps: int = 1) -> None:
        """So many steps were taken."""
        self._steps += steps

    @property
    def seconds(self) -> float:
        """Seconds of work on the run: here, and in processes before this one up to what they wrote last."""
        return self._before + time.monotonic() - self._began

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        seconds, steps = self._config.every_seconds, self._config.every_steps
        late = seconds is not None and time.monotonic() - self._written >= seconds
        return late or (steps is not None and self._steps >= steps)

    def flush(self) -> bool:
        """Write the finished operations that are not yet written; returns whether all are.

        Several operations may have been under way in processes of which there are fewer now: those that nobody has
        gone on with are written anew, without those that have finished.
        """
        some = bool(self._pending)
        if not self._write_finished():
            return False
        if some and not self._underway:
            self.checkpoints.prune(UNDERWAY, keep=0)
        elif some and self._write_underway(self._underway):
            self.checkpoints.prune(UNDERWAY, keep=1)
        return True

    def save(self, records: Mapping[int, JournalRecord]) -> bool:
        """Write operations under way, after all that was finished before them; returns whether all is written."""
        whole = self._write_finished()
        if not self._write_underway({**self._underway, **records}):
            return False
        self.checkpoints.prune(UNDERWAY)
        return whole

    def _write_finished(self) -> bool:
        self._steps, self._written = 0, time.monotonic()
        if self._pending:
            if self.checkpoints.write(FINISHED, state_of(self._pending, self.seconds)) is None:
                return False
            self._pending.clear()
        return True

    def _write_underway(self, records: Mapping[int, JournalRecord]) -> bool:
        return self.checkpoints.write(UNDERWAY, state_of(records, self.seconds)) is not None
