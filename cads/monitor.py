"""Progress of a run: a progress bar with the FLOPs spent, and TensorBoard event files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from cads.accounting.stage_labels import stage_label, stage_tag
from cads.runtime.processes import world_group

if TYPE_CHECKING:
    from cads.accounting.ledger import Ledger
    from cads.data.pool import Pool

CURVE_POINTS = 200
"""Largest number of points per curve that one training run writes to TensorBoard, whatever its length."""
PANEL_SIZE = 16
"""Examples in each of the panels of most and least probable examples."""

TEXT_SHOWN = 1000
"""Largest number of characters of an example that a panel shows."""

Advance = Callable[[float, float, float], None]
Describe = Callable[["Pool", np.ndarray], list[str] | None]


class Monitor:
    """Shows a progress bar and writes event files, each only if it has a destination; of several processes only rank 0.

    Args:
        folder: of TensorBoard's event files, or None for none.
        console: of the progress bar, or None for none.
    """

    def __init__(self, folder: Path | str | None = None, console: Console | None = None) -> None:
        is_rank_zero = world_group().first
        self._writer = SummaryWriter(str(folder)) if is_rank_zero and folder is not None else None
        self._bar = _bar(console) if is_rank_zero and console is not None else None
        self._steps: dict[str, int] = {}
        self._prefix = ""
        self._status = ""

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
        outer_prefix, self._prefix = self._prefix, f"{name} "
        try:
            yield
        finally:
            self._prefix = outer_prefix

    @contextmanager
    def progress(self, stage: str, flops: float) -> Iterator[Advance]:
        """Follow one training run of at most `flops`.

        Yields:
            a function of (FLOPs spent so far, loss in nats, learning rate), to be called at every step.
        """
        task_id, tag = None, stage_tag(stage)
        if self._bar is not None:
            task_id = self._bar.add_task(
                f"{self._prefix}{stage_label(stage)}", total=flops, loss="", amount=f"0/{flops:.3g} FLOPs"
            )
        start = self._steps.get(stage, 0)
        n_written = 0

        def advance(spent_flops: float, loss: float, learning_rate: float) -> None:
            nonlocal n_written
            if spent_flops * CURVE_POINTS < flops * (n_written + 1):
                return
            n_written += 1
            if self._bar is not None and task_id is not None:
                amount = f"{spent_flops:.3g}/{flops:.3g} FLOPs"
                text = f"loss {loss:.3f}  {self._status}".rstrip()
                self._bar.update(task_id, completed=spent_flops, loss=text, amount=amount)
            self.scalar(f"{tag}/training_loss", loss, start + n_written)
            self.scalar(f"{tag}/learning_rate", learning_rate, start + n_written)

        try:
            yield advance
        finally:
            self._steps[stage] = start + n_written
            if self._bar is not None and task_id is not None:
                self._bar.remove_task(task_id)

    @contextmanager
    def counting(self, stage: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Follow work on `total` examples; None: in one piece, shown as under way.

        Yields:
            a function of the number of examples that are done so far.
        """
        bar = self._bar
        if bar is None:
            yield lambda done: None
            return

        def amount(done: int) -> str:
            return "" if total is None else f"{done:,}/{total:,} examples"

        task_id = bar.add_task(f"{self._prefix}{stage_label(stage)}", total=total, loss="", amount=amount(0))
        try:
            yield lambda done: bar.update(task_id, completed=done, amount=amount(done))
        finally:
            bar.remove_task(task_id)

    def status(self, text: str) -> None:
        """Say in the progress bar what the run is doing; until the next text, "" for nothing."""
        self._status = text

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Write one point of a curve."""
        if self._writer is not None:
            self._writer.add_scalar(tag, value, step)

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """Write the distribution of `values`, of any shape."""
        if self._writer is not None:
            self._writer.add_histogram(tag, values, step)

    def probabilities(self, names: tuple[str, ...], values: np.ndarray, step: int) -> None:
        """Write the probability of each source under a policy (values: shape (S,)), one curve per source.

        What is chosen in the end can differ from the policy: see `shares`.
        """
        for name, value in zip(names, values, strict=True):
            self.scalar(f"policy_probability/{name}", float(value), step)

    def shares(self, shares: Mapping[str, float]) -> None:
        """Write the share of each source in what training draws (`Selection.shares`), a curve of one point each."""
        for name, share in shares.items():
            self.scalar(f"share_of_training/{name}", share, 0)

    def text(self, tag: str, text: str, step: int = 0) -> None:
        """Write Markdown text."""
        if self._writer is not None:
            self._writer.add_text(tag, text, step)

    def ledger(self, ledger: Ledger) -> None:
        """Write the FLOPs of each phase and stage, each as a curve of one point."""
        for (phase, stage), entry in ledger.entries.items():
            self.scalar(f"flops/{phase}/{stage_tag(stage)}", entry.flops, 0)

    def hparams(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write the settings and the resulting metrics of a run, for TensorBoard's table of runs."""
        if self._writer is not None:
            plain = {k: v if isinstance(v, int | float | bool | str) else str(v) for k, v in settings.items()}
            self._writer.add_hparams(plain, {f"result/{k}": v for k, v in metrics.items()}, run_name="hparams")

    def panels(self, pool: Pool, probabilities: np.ndarray, step: int, describe: Describe | None = None) -> None:
        """Write the most and the least probable examples: images as two grids with their labels, text as text.

        Args:
            describe: gives the text of examples, or None where they are not text (`Task.describe`).
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
                f"{example_id}: label {label}, p = {p:.3f}"
                for example_id, label, p in zip(
                    pool.ids.take(positions).to_pylist(),
                    batch.labels.tolist(),
                    probabilities[positions],
                    strict=True,
                )
            ]
            self.text(f"examples/{tag}_probable", "\n\n".join(rows), step)


def _panel(pool: Pool, positions: np.ndarray, probabilities: np.ndarray, texts: list[str]) -> str:
    """Markdown with the id, the probability and the text of each example, cut after `TEXT_SHOWN` characters."""
    rows = []
    for example_id, p, text in zip(pool.ids.take(positions).to_pylist(), probabilities[positions], texts, strict=True):
        excerpt = text if len(text) <= TEXT_SHOWN else f"{text[:TEXT_SHOWN]}..."
        # Indented lines are a code block in Markdown: the text of an example is never interpreted as markup.
        rows.append(f"**{example_id}**, p = {p:.3f}\n\n" + "\n".join(f"    {line}" for line in excerpt.splitlines()))
    return "\n\n".join(rows)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[amount]}"),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
