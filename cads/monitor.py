"""What is seen while it runs: a progress bar with the budget spent, and TensorBoard event files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from cads.runtime.processes import world_group

if TYPE_CHECKING:
    from cads.accounting.ledger import Ledger
    from cads.data.pool import Pool

CURVE_POINTS = 200
"""Points that one training run leaves in TensorBoard, whatever its length."""
PANEL_SIZE = 16
"""Examples in each of the panels of most and least probable examples."""

TEXT_SHOWN = 1000
"""Characters of an example that a panel shows."""

Advance = Callable[[float, float, float], None]
Describe = Callable[["Pool", np.ndarray], list[str] | None]


class Monitor:
    """Shows nothing and records nothing, unless told to; of several processes the first alone does.

    Args:
        folder: where TensorBoard's event files go, or None for none.
        console: where the progress bar goes, or None for none.
    """

    def __init__(self, folder: Path | str | None = None, console: Console | None = None) -> None:
        first = world_group().first
        self._writer = SummaryWriter(str(folder)) if first and folder is not None else None
        self._bar = _bar(console) if first and console is not None else None
        self._steps: dict[str, int] = {}
        self._prefix = ""

    def __enter__(self) -> Monitor:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._writer is not None:
            self._writer.close()

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Put `name` in front of the stage in the progress bar while the block runs."""
        before, self._prefix = self._prefix, f"{name} "
        try:
            yield
        finally:
            self._prefix = before

    @contextmanager
    def progress(self, stage: str, flops: float) -> Iterator[Advance]:
        """Follow one training run of at most `flops`.

        Yields:
            a function of (FLOPs spent so far, loss in nats, learning rate), to be called at every step.
        """
        bar = None if self._bar is None else self._bar.add_task(f"{self._prefix}{stage}", total=flops, loss="")
        start = self._steps.get(stage, 0)
        written = 0

        def advance(spent: float, loss: float, rate: float) -> None:
            nonlocal written
            if spent * CURVE_POINTS < flops * (written + 1):
                return
            written += 1
            if self._bar is not None and bar is not None:
                self._bar.update(bar, completed=spent, loss=f"loss {loss:.3f}")
            self.scalar(f"{stage}/training_loss", loss, start + written)
            self.scalar(f"{stage}/learning_rate", rate, start + written)

        try:
            yield advance
        finally:
            self._steps[stage] = start + written
            if self._bar is not None and bar is not None:
                self._bar.remove_task(bar)

    def scalar(self, tag: str, value: float, step: int) -> None:
        """One point of a curve."""
        if self._writer is not None:
            self._writer.add_scalar(tag, value, step)

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """The distribution of `values`, of any shape."""
        if self._writer is not None:
            self._writer.add_histogram(tag, values, step)

    def probabilities(self, names: tuple[str, ...], values: np.ndarray, step: int) -> None:
        """The probability of each source over time (values: shape (S,))."""
        for name, value in zip(names, values, strict=True):
            self.scalar(f"source_probability/{name}", float(value), step)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Markdown text."""
        if self._writer is not None:
            self._writer.add_text(tag, text, step)

    def ledger(self, ledger: Ledger) -> None:
        """FLOPs by stage, one bar of a curve each."""
        for (phase, stage), entry in ledger.entries.items():
            self.scalar(f"flops/{phase}/{stage}", entry.flops, 0)

    def hparams(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """The settings of a run beside what came out, for TensorBoard's table of runs."""
        if self._writer is not None:
            plain = {k: v if isinstance(v, int | float | bool | str) else str(v) for k, v in settings.items()}
            self._writer.add_hparams(plain, {f"result/{k}": v for k, v in metrics.items()}, run_name="hparams")

    def panels(self, pool: Pool, probabilities: np.ndarray, step: int, describe: Describe | None = None) -> None:
        """The most and the least probable examples: images as two grids with their labels, text as text.

        Args:
            describe: what gives examples as text (`Task.describe`).
        """
        if self._writer is None:
            return
        order = np.argsort(-probabilities, kind="stable")
        for tag, positions in (("most", order[:PANEL_SIZE]), ("least", order[-PANEL_SIZE:])):
            texts = None if describe is None else describe(pool, positions)
            if texts is not None:
                self.text(f"examples/{tag}_probable", _panel(pool, positions, probabilities, texts), step)
                continue
            batch = pool.batch(positions)
            images = batch.inputs.get("images")
            if images is None:
                return
            self._writer.add_images(f"examples/{tag}_probable", images, step)
            rows = [
                f"{identity}: label {label}, p = {p:.3f}"
                for identity, label, p in zip(
                    pool.ids.take(positions).to_pylist(),
                    batch.labels.tolist(),
                    probabilities[positions],
                    strict=True,
                )
            ]
            self.text(f"examples/{tag}_probable", "\n\n".join(rows), step)


def _panel(pool: Pool, positions: np.ndarray, probabilities: np.ndarray, texts: list[str]) -> str:
    """Markdown: id and probability of each example, and what it says, as it is."""
    rows = []
    for identity, p, text in zip(pool.ids.take(positions).to_pylist(), probabilities[positions], texts, strict=True):
        shown = text if len(text) <= TEXT_SHOWN else f"{text[:TEXT_SHOWN]}..."
        # Indented lines are shown as they are: what an example says is never taken for markup.
        rows.append(f"**{identity}**, p = {p:.3f}\n\n" + "\n".join(f"    {line}" for line in shown.splitlines()))
    return "\n\n".join(rows)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.3g}/{task.total:.3g} FLOPs"),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
