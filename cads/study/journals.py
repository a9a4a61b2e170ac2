"""The journals of a study: a cell or a ranking that was stopped resumes from its journal.

The journal of KEY is in `checkpoints/KEY` until the work is done. It belongs to the process that holds the lock of KEY.
`select` refuses checkpoints of another run. A grid must not stop for them: it discards them with a warning.
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
from cads.runtime.versions import versions

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Journals:
    """The journals in the folder of a study.

    Attributes:
        folder: of the study. code: digest of the sources. config: how often checkpoints are written.
        interrupts: the signals that this command has received.
    """

    folder: Path
    code: str
    config: CheckpointConfig
    interrupts: Interrupts

    def begin(self, key: str, work: Callable[[], T]) -> T:
        """The result of `work`, which opens the journal of `key`. The caller holds the lock of `key`.

        Checkpoints from which `work` cannot resume are discarded with a warning, and `work` starts again: those of
        other code or versions, and those whose operations `work` does not repeat.
        """
        world = active_group()
        if not world.on_rank_zero(lambda: Checkpoints(self._checkpoint_folder(key), {}).empty):
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
            CheckpointError: if its checkpoints are of another run.
        """
        identity = {"work": key, "code": self.code, "versions": self._versions}
        return resumable_journal(key, self._checkpoint_folder(key), identity, self.config, self.interrupts)

    def forget(self, key: str) -> None:
        """Remove the checkpoints of `key`; only in the process that writes, rank zero."""
        Checkpoints(self._checkpoint_folder(key), {}).clear()
        with contextlib.suppress(OSError):
            # Fails, as it should, while other journals are in the folder.
            self._checkpoint_folder(key).parent.rmdir()

    def sweep(self, keys: Collection[str], is_done: Callable[[str], bool]) -> None:
        """Remove checkpoints that the grid will not resume from; only in the process that writes, rank zero.

        Those that another process has locked stay.

        Args:
            keys: of all cells and rankings of the grid. is_done: whether the cell or ranking of a key is finished.
        """
        foreign = []
        for path in sorted(self._checkpoint_folder("").glob("*")):
            if path.name.startswith("."):
                # A removal that was killed halfway.
                shutil.rmtree(path, ignore_errors=True)
            elif path.name not in keys or is_done(path.name):
                try:
                    with RunLock(self.folder / "locks" / path.name):
                        self.forget(path.name)
                except LockedError:
                    continue
                if path.name not in keys:
                    foreign.append(path.name)
        if foreign:
            log.warning(
                "checkpoints of cells and rankings that are not in this grid are discarded: %s", ", ".join(foreign)
            )

    @cached_property
    def _versions(self) -> dict[str, str]:
        return versions()

    def _checkpoint_folder(self, key: str) -> Path:
        return self.folder / "checkpoints" / key
