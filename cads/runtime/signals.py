"""SIGTERM and SIGINT: the step under way is finished and its state is written before the command ends."""

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
        signal: number of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number

    @property
    def status(self) -> int:
        """The exit status of a process that ends for this reason: 128 and the number of the signal."""
        return 128 + self.signal


class Interrupts:
    """Notes the signals that ask a run to stop, within `listen`.

    Several processes stop together, at the next step that all of them take: a signal to one of them is only noted.
    A second signal to one of several means nothing: a launcher passes on what the terminal has already sent.

    Args:
        overwriting: whether the command begins anew (`--overwrite`), for the advice in messages.
    """

    def __init__(self, *, overwriting: bool = False) -> None:
        self.pending: int | None = None
        self._resume_command = "the same command without --overwrite" if overwriting else "the same command"
        self._hold_depth = 0

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Catch `SIGNALS` within the block (in the main thread; elsewhere nothing is caught).

        Raises:
            Interrupted: when a signal comes outside of `held`, or when a second one comes.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous_handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous_handlers.items():
                signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within the block a first signal only sets `pending`, which the block checks itself."""
        self._hold_depth += 1
        try:
            yield
        finally:
            self._hold_depth -= 1

    def raise_if_pending(self, position: str) -> None:
        """End the run if a signal has come.

        Raises:
            Interrupted: saying by `position` where the run is.
        """
        if self.pending is not None:
            name = signal.Signals(self.pending).name
            raise Interrupted(f"stopped by {name} {position}; {self._resume_command} goes on from here", self.pending)

    def stop_together(self, position: str) -> None:
        """Between operations: end the run, in all processes, if one of them was asked to stop.

        Raises:
            Interrupted: saying by `position` where the run is.
        """
        (number,) = active_group().all_reduce_max([self.pending or 0])
        self.pending = number or None
        self.raise_if_pending(position)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        repeated, self.pending = self.pending is not None, number
        if world_group().size > 1:
            return
        if repeated or not self._hold_depth:
            self.raise_if_pending("at once" if repeated else "between two operations")
