"""SIGTERM and SIGINT: the step under way is finished and written down before the command ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from cads.errors import CadsError
from cads.runtime.processes import active_group, world_group

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(CadsError):
    """A run that was asked to stop, and did.

    Attributes:
        signal: by which it was asked.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number

    @property
    def status(self) -> int:
        """The exit status of a process that ends for this reason: 128 and the number of the signal."""
        return 128 + self.signal


class Interrupts:
    """Notes the signals that ask a run to stop, while it is told to `listen`.

    Several processes stop together, at the next step that all of them take: there a signal to one is noted, and no
    more. A launcher passes on what a terminal has already sent, so that a second one means nothing.

    Args:
        overwriting: whether the command begins anew, whatever there is to go on from.
    """

    def __init__(self, *, overwriting: bool = False) -> None:
        self.pending: int | None = None
        self._again = "the same command without --overwrite" if overwriting else "the same command"
        self._held = 0

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Catch `SIGNALS` within the block (in the main thread; elsewhere nothing is caught).

        Raises:
            Interrupted: where a signal comes while no operation holds it back. A second signal ends the
                operation at once too.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block signals wait, until the block asks for them by `pending`, or ends."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1

    def raise_if_pending(self, where: str) -> None:
        """End the run if a signal has come.

        Raises:
            Interrupted: saying `where` the run is.
        """
        if self.pending is not None:
            name = signal.Signals(self.pending).name
            raise Interrupted(f"stopped by {name} {where}; {self._again} goes on from here", self.pending)

    def stop_together(self, where: str) -> None:
        """Between operations: end the run, in all processes, if one of them was asked to stop.

        Raises:
            Interrupted: saying `where` the run is.
        """
        (number,) = active_group().all_reduce_max([self.pending or 0])
        self.pending = number or None
        self.raise_if_pending(where)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.pending = self.pending is not None, number
        if world_group().size > 1:
            return
        if again or not self._held:
            self.raise_if_pending("at once" if again else "between two operations")
