"""The journals of a study: what is under way, a cell or a ranking, goes on from where it was after any stop.

Each is in `checkpoints/KEY` until the work is done, and belongs to whoever holds the lock of KEY. A run of `select`
refuses checkpoints that are not its own; a grid must not stop for them: they are discarded, and said.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from cads.errors import CheckpointError
from cads.runtime.checkpoint import CheckpointConfig, Checkpoints, OtherRunError
from cads.runtime.journal import Journal
from cads.runtime.lock import LockedError, RunLock
from cads.runtime.processes import active_group
from cads.runtime.run_folder import resumable_journal
from cads.runtime.signals import Interrupts
from cads.selection import versions

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Journals:
    """The journals in the folder of a study.

    Attributes:
        folder: of the study. code: digest of the sources. config: how often they are written.
        interrupts: of the command.
    """

    folder: Path
    code: str
    config: CheckpointConfig
    interrupts: Interrupts

    def begin(self, key: str, work: Callable[[], T]) -> T:
        """What `work` returns, which opens the journal of `key`; called by who holds the lock of `key`.

        If what is there cannot be gone on from (it is of other code or versions, or the work does not repeat it), it is
        discarded with a warning, and `work` is called from the start.
        """
        world = active_group()
        if not world.on_rank_zero(lambda: Checkpoints(self._place(key), {}).empty):
            try:
                return work()
            except CheckpointError as error:
                reason = "; ".join(error.changed) if isinstance(error, OtherRunError) else str(error)
                log.warning("%s begins anew, its checkpoints are discarded: %s", key, reason)
                world.on_rank_zero(lambda: self.forget(key))
        return work()

    def open(self, key: str) -> AbstractContextManager[Journal]:
        """The journal of a cell or a ranking, open in the block.

        Raises:
            CheckpointError: if what is there is of another run.
        """
        identity = {"work": key, "code": self.code, "versions": self._versions}
        return resumable_journal(key, self._place(key), identity, self.config, self.interrupts)

    def forget(self, key: str) -> None:
        """Remove what is kept of `key`, in the one process that writes."""
        Checkpoints(self._place(key), {}).clear()
        with contextlib.suppress(OSError):
            # Only if nothing else is under way.
            self._place(key).parent.rmdir()

    def sweep(self, keys: Collection[str], is_done: Callable[[str], bool]) -> None:
        """Remove what nobody will go on from, unless another process is at work on it; in the one that writes.

        Args:
            keys: of all cells and rankings of the grid. is_done: whether one of them is finished.
        """
        foreign = []
        for place in sorted(self._place("").glob("*")):
            if place.name.startswith("."):
                # What a process that was killed was removing.
                shutil.rmtree(place, ignore_errors=True)
            elif place.name not in keys or is_done(place.name):
                try:
                    with RunLock(self.folder / "locks" / place.name):
                        self.forget(place.name)
                except LockedError:
                    continue
                if place.name not in keys:
                    foreign.append(place.name)
        if foreign:
            log.warning("checkpoints of what is no part of this grid are discarded: %s", ", ".join(foreign))

    @cached_property
    def _versions(self) -> dict[str, str]:
        return versions()

    def _place(self, key: str) -> Path:
        return self.folder / "checkpoints" / key
