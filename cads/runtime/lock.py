"""One writer: a run folder is locked while a process works in it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from cads.errors import CadsError
from cads.runtime.processes import active_group

log = logging.getLogger(__name__)

LOCK = ".lock"
NOTE_LIMIT = 4096
"""Bytes that are read of the note that the holder of a lock has written into it."""


class LockedError(CadsError):
    """A run folder is locked by another process."""


class RunLock:
    """The lock of a folder, which is made if need be. The kernel releases it when its process ends, however it ends.

    The lock file names its holder: process, host and command. The lock of a killed process is taken over.

    Raises:
        LockedError: if another process holds it.
        OSError: if the folder cannot be made or written to.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self._file = self.folder / LOCK
        self._handle: int | None = None
        self._created = not self.folder.exists()

    def __enter__(self) -> RunLock:
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(self.folder))
        while self._handle is None:
            self._handle = self._acquire()
        os.ftruncate(self._handle, 0)
        note = {"pid": os.getpid(), "host": socket.gethostname(), "command": " ".join(sys.argv)[: NOTE_LIMIT // 2]}
        os.pwrite(self._handle, json.dumps(note).encode(), 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            self._file.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None
            if self._created:
                # A refused run leaves no folder behind; `rmdir` fails on one with contents.
                with contextlib.suppress(OSError):
                    self.folder.rmdir()

    def _acquire(self) -> int | None:
        """The locked file; None if its holder removed it while it was being opened."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note = os.pread(handle, NOTE_LIMIT, 0).decode(errors="replace")
            os.close(handle)
            raise LockedError(self._in_use_message(note)) from None
        except OSError as error:
            log.warning("%s: this file system has no locks (%s): let no other process write there", self.folder, error)
        try:
            is_current = os.path.samestat(os.fstat(handle), os.stat(self._file))
        except FileNotFoundError:
            is_current = False
        if not is_current:
            os.close(handle)
            return None
        return handle

    def _in_use_message(self, note: str) -> str:
        try:
            fields = json.loads(note)
            holder = f"process {fields['pid']} on {fields['host']} ({fields['command']!r})"
        except (ValueError, TypeError, KeyError, RecursionError):
            holder = "another process"
        return f"{self.folder} is in use by {holder}: wait until it ends, stop it, or choose another folder with --out"


@contextlib.contextmanager
def held_by_first(folder: Path | str) -> Iterator[None]:
    """Lock a folder for several processes that work in it together; the first one holds the lock.

    Raises: as `RunLock`, in all of them.
    """
    with contextlib.ExitStack() as stack:

        def acquire() -> None:
            stack.enter_context(RunLock(folder))

        active_group().on_rank_zero(acquire)
        yield
