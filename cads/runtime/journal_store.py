"""The records of a run on disk: those of finished operations are written once, those under way repeatedly."""

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
    """The records of the operations of one run, by index; some of them on disk.

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
        self._last_write = self._start_time = time.monotonic()
        self._earlier_seconds = 0.0

    def read(self) -> bool:
        """Read what an earlier process has written; returns whether there was anything.

        Raises:
            CheckpointError: if it is of another run.
        """
        self.checkpoints.sweep()
        for path, values, tensors in self.checkpoints.read(FINISHED):
            self._earlier_seconds = max(self._earlier_seconds, seconds_of(path, values))
            for index, record in records_of(path, values, tensors):
                self._finished.setdefault(index, record)
        for path, values, tensors in self.checkpoints.read(UNDERWAY):
            self._earlier_seconds = max(self._earlier_seconds, seconds_of(path, values))
            self._underway = dict(records_of(path, values, tensors))
            break
        return bool(self._finished) or bool(self._underway)

    def take(self, index: int) -> tuple[JournalRecord | None, bool]:
        """The record that was read of an operation, or None, and whether it had finished; each is returned once."""
        finished, underway = self._finished.pop(index, None), self._underway.pop(index, None)
        if finished is not None:
            return finished, True
        # The next checkpoint of this operation removes the file with the tensors of the others under way: those beside
        # it, or after it where its own record was damaged. So their tensors are loaded now.
        for other_index, other in self._underway.items():
            self._underway[other_index] = replace(other, tensors=other.state().tensors)
        return underway, False

    def keep(self, index: int, record: JournalRecord) -> None:
        """Keep the record of a finished operation until `flush` or `save` writes it."""
        self._pending[index] = record

    def count(self, steps: int = 1) -> None:
        """Count `steps` as taken since the last write."""
        self._steps += steps

    @property
    def seconds(self) -> float:
        """Seconds of work on the run: of this process, and of earlier ones up to their last checkpoint."""
        return self._earlier_seconds + time.monotonic() - self._start_time

    @property
    def due(self) -> bool:
        """Whether it is time to write."""
        seconds, steps = self._config.every_seconds, self._config.every_steps
        time_is_up = seconds is not None and time.monotonic() - self._last_write >= seconds
        return time_is_up or (steps is not None and self._steps >= steps)

    def flush(self) -> bool:
        """Write the finished operations that are not yet written; returns whether all are.

        An earlier launch with more processes may have left more operations under way. Those that no process has
        resumed yet are written again, without those that have finished.
        """
        has_pending = bool(self._pending)
        if not self._write_finished():
            return False
        if has_pending and not self._underway:
            self.checkpoints.prune(UNDERWAY, keep=0)
        elif has_pending and self._write_underway(self._underway):
            self.checkpoints.prune(UNDERWAY, keep=1)
        return True

    def save(self, records: Mapping[int, JournalRecord]) -> bool:
        """Write the finished operations, then those under way; returns whether all are written."""
        all_finished_written = self._write_finished()
        if not self._write_underway({**self._underway, **records}):
            return False
        self.checkpoints.prune(UNDERWAY)
        return all_finished_written

    def _write_finished(self) -> bool:
        self._steps, self._last_write = 0, time.monotonic()
        if self._pending:
            if self.checkpoints.write(FINISHED, state_of(self._pending, self.seconds)) is None:
                return False
            self._pending.clear()
        return True

    def _write_underway(self, records: Mapping[int, JournalRecord]) -> bool:
        return self.checkpoints.write(UNDERWAY, state_of(records, self.seconds)) is not None
