"""Progress of a run: a bar or lines with the FLOPs spent, and curves in TensorBoard or another tracker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from cads.accounting.stage_labels import stage_label, stage_tag
from cads.runtime.processes import world_group
from cads.runtime.progress import StageProgress
from cads.runtime.trackers import Guarded, open_trackers

if TYPE_CHECKING:
    from cads.accounting.ledger import Ledger
    from cads.data.pool import Pool

CURVE_POINTS = 200
"""Largest number of points per curve that one training run writes, whatever its length, beside its first and last."""
PANEL_SIZE = 16
"""Examples in each of the panels of most and least probable examples."""

TEXT_SHOWN = 1000
"""Largest number of characters of an example that a panel shows."""

Advance = Callable[[float, float, float], None]
Describe = Callable[["Pool", np.ndarray], list[str] | None]


class Monitor:
    """Shows progress and keeps curves, each only if it has a destination; of several processes only rank 0.

    Args:
        folder: of TensorBoard's event files, and of what other trackers write; None: no curves are kept.
        console: of the progress; None for none. On a terminal it is a bar, elsewhere a line every half minute.
        track: names of trackers: "tensorboard", "wandb", "mlflow".
        run: its name in the trackers; "" for that of the folder.
        validation_points: how often the final training is measured on the target; see `cads.training.validation`.

    Attributes:
        validation: the measurements so far: step, FLOPs and metrics each.

    Raises:
        ConfigError: if a tracker is not installed, or refuses to begin.
    """

    def __init__(
        self,
        folder: Path | str | None = None,
        console: Console | None = None,
        *,
        track: Sequence[str] = ("tensorboard",),
        run: str = "",
        validation_points: int = 0,
    ) -> None:
        is_rank_zero = world_group().first
        self._trackers = Guarded({})
        if is_rank_zero and folder is not None:
            self._trackers = open_trackers(track, Path(folder), run or Path(folder).name)
        self._shown = StageProgress(console) if is_rank_zero and console is not None else None
        self.validation_points = validation_points
        self.validation: list[dict[str, Any]] = []
        self._steps: dict[str, int] = {}
        self._prefix = ""
        self._status = ""

    def __enter__(self) -> Monitor:
        if self._shown is not None:
            self._shown.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._shown is not None:
            self._shown.stop()
        self._trackers.tell("close")

    @contextmanager
    def named(self, name: str) -> Iterator[None]:
        """Put `name` in front of the stage in the progress while the block runs."""
        outer_prefix, self._prefix = self._prefix, f"{name} "
        try:
            yield
        finally:
            self._prefix = outer_prefix

    @contextmanager
    def progress(self, stage: str, flops: float, spent: float = 0.0) -> Iterator[Advance]:
        """Follow one training run of at most `flops`, of which `spent` were spent, and shown, before.

        The first and the last step are among the points of its curves, and between them `CURVE_POINTS` at most. The
        horizontal axis counts steps; runs of one stage follow each other.

        Yields:
            a function of (FLOPs spent so far, loss in nats, learning rate), to be called at every step.
        """
        task_id, tag, shown = None, stage_tag(stage), self._shown
        if shown is not None:
            task_id = shown.begin(f"{self._prefix}{stage_label(stage)}", flops, "FLOPs")
        start = self._steps.get(stage, 0)
        n_steps, next_point = 0, 0.0
        pending: tuple[float, float] | None = None

        def write(loss: float, learning_rate: float) -> None:
            self.scalar(f"{tag}/training_loss", loss, start + n_steps)
            self.scalar(f"{tag}/learning_rate", learning_rate, start + n_steps)

        def advance(spent_flops: float, loss: float, learning_rate: float) -> None:
            nonlocal n_steps, next_point, pending
            n_steps += 1
            if shown is not None and task_id is not None:
                shown.advance(task_id, spent_flops, f"loss {loss:.3f}  {self._status}".rstrip())
            pending = loss, learning_rate
            if spent_flops >= next_point:
                write(*pending)
                pending, next_point = None, spent_flops + (flops - spent) / CURVE_POINTS

        try:
            yield advance
        finally:
            if pending is not None:
                write(*pending)
            self._steps[stage] = start + n_steps
            if shown is not None and task_id is not None:
                shown.end(task_id)

    @contextmanager
    def counting(self, stage: str, total: int | None) -> Iterator[Callable[[int], None]]:
        """Follow work on `total` examples; None: in one piece, shown as under way.

        Yields:
            a function of the number of examples that are done so far.
        """
        shown = self._shown
        if shown is None:
            yield lambda done: None
            return
        task_id = shown.begin(f"{self._prefix}{stage_label(stage)}", total, "examples")
        try:
            yield lambda done: shown.advance(task_id, done)
        finally:
            shown.end(task_id)

    def validated(self, step: int, flops: float, metrics: Mapping[str, float]) -> None:
        """Record the metrics of the final model on the target after `step` steps, which cost `flops`."""
        self.validation.append({"step": step, "flops": flops, "metrics": dict(metrics)})
        for name, value in metrics.items():
            self.scalar(f"validation/{name}", value, step)

    def status(self, text: str) -> None:
        """Say in the progress what the run is doing; until the next text, "" for nothing."""
        self._status = text

    def scalar(self, tag: str, value: float, step: int) -> None:
        """Write one point of a curve."""
        self._trackers.tell("scalar", tag, value, step)

    def histogram(self, tag: str, values: np.ndarray, step: int) -> None:
        """Write the distribution of `values`, of any shape."""
        self._trackers.tell("histogram", tag, values, step)

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
        self._trackers.tell("text", tag, text, step)

    def ledger(self, ledger: Ledger) -> None:
        """Write the FLOPs of each phase and stage, each as a curve of one point."""
        for (phase, stage), entry in ledger.entries.items():
            self.scalar(f"flops/{phase}/{stage_tag(stage)}", entry.flops, 0)

    def hparams(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write the settings and the resulting metrics of a run, for the tracker's table of runs."""
        plain = {k: v if isinstance(v, int | float | bool | str) else str(v) for k, v in settings.items()}
        self._trackers.tell("hparams", plain, dict(metrics))

    def panels(self, pool: Pool, probabilities: np.ndarray, step: int, describe: Describe | None = None) -> None:
        """Write the most and the least probable examples: images as two grids with their labels, text as text.

        Args:
            describe: gives the text of examples, or None where they are not text (`Task.describe`).
        """
        if not self._trackers:
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
            self._trackers.tell("images", f"examples/{tag}_probable", images, step)
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
