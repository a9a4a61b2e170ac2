"""Progress of a stage: a bar on a terminal; elsewhere a line every half minute."""

from __future__ import annotations

import threading
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from cads.accounting.units import duration

LINE_SECONDS = 30.0
"""Between two lines where there is no terminal."""
SPEED_SECONDS = 600.0
"""The time that remains follows from the speed of these last seconds."""
REDRAW_SECONDS = 0.1
"""Least time between two updates of a bar: steps can be shorter than a frame."""


class StageProgress:
    """Shows the stages that are under way, in a bar or in lines.

    A thread prints the lines, so that they also come while a single step, or an evaluation, takes minutes.

    Args:
        console: for the output.
        line_seconds: between two lines where `console` is no terminal.
    """

    def __init__(self, console: Console, line_seconds: float = LINE_SECONDS) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amount]}"),
            TextColumn("{task.fields[detail]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=SPEED_SECONDS,
        )
        self._line_seconds = line_seconds
        self._began = time.monotonic()
        self._drawn = 0.0
        self._stop = threading.Event()
        self._ticker: threading.Thread | None = None

    def start(self) -> None:
        """Begin to show."""
        self._began = time.monotonic()
        self.bar.start()
        if self.bar.disable:
            self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
            self._ticker.start()

    def stop(self) -> None:
        """Show nothing more."""
        self._stop.set()
        if self._ticker is not None:
            self._ticker.join()
        self.bar.stop()

    def begin(self, name: str, total: float | None, unit: str) -> TaskID:
        """A stage begins: `total` of `unit` ("FLOPs", "examples") are to be done; None: it is one piece."""
        return self.bar.add_task(name, total=total, amount=_amount(0, total, unit), detail="", unit=unit)

    def advance(self, stage: TaskID, done: float, detail: str = "") -> None:
        """So much of a stage is done; `detail` is said beside it."""
        now = time.monotonic()
        task = self.bar.tasks[self.bar.task_ids.index(stage)]
        if now - self._drawn < REDRAW_SECONDS and done != task.total and task.completed:
            return
        self._drawn = now
        amount = _amount(done, task.total, task.fields["unit"])
        self.bar.update(stage, completed=done, detail=detail, amount=amount)

    def end(self, stage: TaskID) -> None:
        """A stage is over."""
        self.bar.remove_task(stage)

    def lines(self) -> list[str]:
        """What is under way, a line a stage: its share done, what is left of it in its unit, and the time left."""
        elapsed = duration(time.monotonic() - self._began)
        lines = []
        for task in self.bar.tasks:
            parts = [f"after {elapsed}: {task.description}"]
            if task.total:
                left = _left(task.completed, task.total, task.fields["unit"])
                parts += [f"{task.completed / task.total:.0%} done", left]
                if task.time_remaining is not None and task.completed:
                    parts.append(f"about {duration(task.time_remaining)} left")
            else:
                parts.append("under way")
            lines.append(", ".join([*parts, *filter(None, [task.fields["detail"]])]))
        return lines

    def _tick(self) -> None:
        while not self._stop.wait(self._line_seconds):
            for line in self.lines():
                self.bar.console.print(line, markup=False, highlight=False, soft_wrap=True)


def _amount(done: float, total: float | None, unit: str) -> str:
    if total is None:
        return ""
    if unit == "FLOPs":
        return f"{done:.3g}/{total:.3g} FLOPs" if done else f"0/{total:.3g} FLOPs"
    return f"{int(done):,}/{int(total):,} {unit}"


def _left(done: float, total: float, unit: str) -> str:
    if unit == "FLOPs":
        return f"{max(0.0, total - done):.3g} of its {total:.3g} FLOPs left"
    return f"{int(total - done):,} of {int(total):,} {unit} left"
