"""One cell of a grid: its cost, whether its method applies, and its run: select, train, test."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from rich.console import Console

from cads.accounting.budget import check_step
from cads.accounting.ledger import EVALUATE, SELECT, TRAIN, Ledger
from cads.accounting.transformer import trainable_size
from cads.errors import BudgetError, ConfigError, DataError
from cads.monitor import Monitor
from cads.registry import build_selector
from cads.runtime.processes import active_group
from cads.runtime.trackers import Track, tracker_names
from cads.scoring.ranker import Ranker
from cads.selection import Selection
from cads.selector import Selector
from cads.study.grid import Cell
from cads.study.journals import Journals
from cads.study.ranking_store import Rankings
from cads.study.run_row import run_row
from cads.study.tables import DONE, NOT_APPLICABLE, OVER_BUDGET
from cads.task import Task
from cads.training.final import train

DISTRIBUTION = "cads-select"
N_SHOWN = 8
"""Selected examples, and as many rejected ones, that are stored for the report."""


@dataclass(frozen=True)
class CellPlan:
    """The plan of a cell: its cost, and whether it is run.

    Attributes:
        cell: of the grid. key: name of the cell on disk. ranking: name of its ranking, or "" if it makes none.
        status: why the cell is not run, or "". note: the reason in words, or what the selector says of its plan.
        selection: FLOPs of selection, as spent. training: FLOPs that remain for training.
    """

    cell: Cell
    key: str
    ranking: str
    status: str
    note: str
    selection_flops: float
    train_flops: float


@dataclass
class RunRow:
    """The result of a cell: its row of `runs`, and its rows of `selections` and `examples`."""

    run: dict[str, Any]
    selections: pa.Table
    examples: list[dict[str, Any]]


@dataclass
class Recorder(Monitor):
    """A monitor that also keeps the source probabilities of every step: {name: probability} each, in `course`."""

    folder: Path
    console: Console | None = None
    track: Track = "tensorboard"
    run: str = ""
    course: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.folder, self.console, track=tracker_names(self.track), run=self.run)

    def probabilities(self, names: tuple[str, ...], values: np.ndarray, step: int) -> None:
        """The probability of each source over time (values: shape (S,))."""
        super().probabilities(names, values, step)
        self.course.append(dict(zip(names, np.asarray(values, dtype=float).tolist(), strict=True)))


def plan_cell(task: Task, cell: Cell, key: str, ranking: str) -> CellPlan:
    """The cost of a cell, whether its method applies, and whether it fits the budget. Nothing is trained."""
    selector = build_selector(cell.entry.method, cell.entry.options)

    def plan(status: str, note: str, selection_flops: float = 0.0, train_flops: float = 0.0) -> CellPlan:
        return CellPlan(cell, key, ranking, status, note, selection_flops, train_flops)

    try:
        total = cell.budget.flops(task)
        planned = selector.rank_plan(task) if isinstance(selector, Ranker) else selector.plan(task, cell.budget)
    except (ConfigError, DataError) as error:
        return plan(NOT_APPLICABLE, str(error))
    except BudgetError as error:
        return plan(OVER_BUDGET, str(error))
    selection = planned.total(SELECT).flops
    charged = selection / cell.sharing if cell.budget.count_selection else 0.0
    try:
        check_step(task, total - charged)
    except BudgetError:
        note = f"selection costs {charged:.4g} of {total:.4g} FLOPs: too little is left to train with"
        return plan(OVER_BUDGET, note, selection)
    return plan("", planned.note, selection, total - charged)


def price(plans: Sequence[CellPlan]) -> tuple[float, float]:
    """FLOPs of selection, where each ranking is counted once, and FLOPs of training."""
    shared = {p.ranking: p.selection_flops for p in plans if p.ranking and not p.status}
    unshared = sum(p.selection_flops for p in plans if not p.ranking and not p.status)
    return unshared + sum(shared.values()), sum(p.train_flops for p in plans if not p.status)


def amortised(ledger: Ledger, sharing: float) -> Ledger:
    """The ledger of one task, if `sharing` tasks share the cost of the selection."""
    shared = Ledger()
    for (phase, stage), entry in ledger.entries.items():
        flops = entry.flops / sharing if phase == SELECT else entry.flops
        shared.charge(phase, stage, **{**asdict(entry), "flops": flops})
    return shared


def run_cell(
    plan: CellPlan,
    task: Task,
    metric: str,
    journals: Journals,
    folder: Path,
    console: Console | None = None,
    track: Track = "tensorboard",
) -> RunRow:
    """Select, train and test once. The Selection and TensorBoard's files are written into `folder`.

    The trackers of `track` know the run by the key of the cell.

    Progress goes to `console`, unless it is a terminal, where the whole grid has a table.

    Work that the journal of the cell holds is not repeated. A ranking has a journal of its own, because several cells
    share it.

    Raises:
        CadsError: whatever selection or training refuses.
        Interrupted: if this process was asked to stop.
    """
    cell, seed = plan.cell, plan.cell.setting.seed
    lines = None if console is None or console.is_terminal else console
    monitor = Recorder(folder / "tensorboard", lines, track, plan.key)
    with monitor, monitor.named(f"{cell.label}, {cell.budget}, seed {seed}:"):
        select, ranking_seconds = _selecting(plan, task, journals, monitor)
        with journals.open(plan.key) as journal:
            selection, spent = select()
            monitor.shares(selection.shares)
            outcome = train(task, selection, cell.budget, seed=seed, monitor=monitor, evaluations=cell.evaluations)
            charged = {phase: outcome.ledger.total(phase) for phase in (SELECT, TRAIN, EVALUATE)}
            total = charged[SELECT].flops + charged[TRAIN].flops
            measured = scored(task, metric, outcome.metrics)
            hparams = {
                "task": cell.setting.task or task.name,
                "model": cell.setting.model,
                "method": cell.label,
                "budget": str(cell.budget),
                "budget_flops": cell.budget.flops(task),
                "seed": seed,
            }
            monitor.hparams(hparams, {**outcome.metrics, "total_flops": total})
            active_group().on_rank_zero(lambda: str(selection.save(folder / "selection")))
            run = cell_row(
                plan,
                DONE,
                journals.code,
                task,
                **measured,
                metrics=outcome.metrics,
                selection_flops=charged[SELECT].flops,
                selection_flops_spent=spent,
                training_flops=charged[TRAIN].flops,
                evaluation_flops=charged[EVALUATE].flops,
                total_flops=total,
                n_selected=int(selection.selected.sum()),
                examples=charged[TRAIN].usages,
                tokens=charged[TRAIN].tokens,
                seconds=ranking_seconds + journal.seconds,
                ledger=outcome.ledger.to_json(),
                source_probability=selection.source_probability,
                shares=selection.shares,
                probability_course=monitor.course,
                notes=selection.notes,
            )
            return RunRow(run, _selected(plan.key, selection), example_rows(plan.key, selection, task))


def _selecting(
    plan: CellPlan, task: Task, journals: Journals, monitor: Monitor
) -> tuple[Callable[[], tuple[Selection, float]], float]:
    """A function that selects, and the seconds that its ranking took. A ranking that is missing is made here.

    The function returns the selection, charged as the grid's `charge` says, and the FLOPs that were spent on it.
    """
    cell, seed = plan.cell, plan.cell.setting.seed
    selector = build_selector(cell.entry.method, cell.entry.options)
    if isinstance(selector, Ranker):
        ranking, seconds = Rankings(journals.folder).get(plan.ranking, selector, task, seed, monitor, journals)
        shared = amortised(ranking.ledger, cell.sharing)
        spent = ranking.ledger.total(SELECT).flops
        return lambda: (selector.select_top(ranking, task, cell.budget, shared), spent), seconds
    return lambda: _search(selector, cell, task, monitor), 0.0


def _search(selector: Selector, cell: Cell, task: Task, monitor: Monitor) -> tuple[Selection, float]:
    """The selection of a search, charged as the grid's `charge` says, and the FLOPs that were spent on it."""
    selection = selector.select(task, cell.budget, seed=cell.setting.seed, ledger=Ledger(), monitor=monitor)
    spent = selection.ledger.total(SELECT).flops
    return replace(selection, ledger=amortised(selection.ledger, cell.sharing)), spent


def cell_row(plan: CellPlan, status: str, code: str, task: Task | None = None, **columns: Any) -> dict[str, Any]:
    """The row of `runs` for a cell of the grid.

    Args:
        code: digest of the sources.
        task: the task of the cell; without it, the columns that depend on its data and model stay null.
        columns: further columns by name, those of the result.
    """
    cell, setting = plan.cell, plan.cell.setting
    task_columns: dict[str, Any] = {}
    if task is not None:
        usage = task.costs.per_usage(task.pool, task.recipe.batch_size)
        task_columns = {
            "n_parameters": float(trainable_size(task.costs.model)),
            "selector_parameters": float(trainable_size((task.proxy or task).costs.model)),
            "budget_flops": cell.budget.flops(task),
            "full_flops": usage * len(task.pool),
            "n_pool": len(task.pool),
            "learning_rate": setting.train.learning_rate,
            "accounting": task.costs.accounting,
        }
    return run_row(
        status,
        cell=plan.key,
        task=setting.task or (setting.kind if task is None else task.name),
        model=setting.model,
        method=cell.label,
        selector=cell.entry.method,
        options=cell.entry.options,
        budget=str(cell.budget),
        count_selection=cell.budget.count_selection,
        sharing=cell.sharing,
        seed=setting.seed,
        **task_columns,
        **columns,
        version=version(DISTRIBUTION),
        code=code,
    )


def scored(task: Task, metric: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    """The columns of `runs` with the score of a trained model by one metric.

    Raises:
        DataError: if the score is not finite.
    """
    score = metrics[metric]
    if not math.isfinite(score):
        raise DataError(
            f"the {metric} of the trained model is {score}: lower the learning rate, or look at the test set"
        )
    return {
        "metric": metric,
        "maximised": metric in task.maximised,
        "score": score,
        "stderr": standard_error(metric, score, len(task.test)),
    }


def standard_error(metric: str, score: float, n: int) -> float | None:
    """Standard error of a share of right or wrong answers on n test examples; None for other metrics."""
    return math.sqrt(score * (1 - score) / n) if metric in ("accuracy", "error") else None


def metric_of(task: Task, requested: str | None) -> str:
    """The metric to compare by: the requested one, or else accuracy, or else the task's own.

    Raises:
        ConfigError: if the task has no such metric.
    """
    examples = task.test.subset(np.arange(min(N_SHOWN, len(task.test))), "test set")
    measured: Mapping[str, float] = task.metrics(task.model(0), examples)
    metric = requested or ("accuracy" if "accuracy" in measured else task.outer)
    if metric not in measured:
        raise ConfigError(f"metric = {metric!r} is no metric of {task.name}: choose from {sorted(measured)}")
    return metric


def _selected(key: str, selection: Selection) -> pa.Table:
    """The rows of `selections` for the cell `key`: one for each selected example."""
    mask = pa.array(selection.selected)
    sources = (
        pa.nulls(len(selection.ids), pa.string()) if selection.sources is None else selection.sources.cast(pa.string())
    )
    n = int(selection.selected.sum())
    columns = {"id": selection.ids, "source": sources, "rank": pa.array(selection.rank)}
    return pa.table({"cell": pa.array([key] * n, pa.string()), **{k: v.filter(mask) for k, v in columns.items()}})


def example_rows(key: str, selection: Selection, task: Task) -> list[dict[str, Any]]:
    """The rows of `examples` for the cell `key`: the best selected and the worst rejected examples, for a reader.

    Where nothing is rejected, and examples are drawn by weight, the selected of the least weight follow the best.
    """
    order = np.argsort(selection.rank, kind="stable")
    kept = order[selection.selected[order]]
    selected, rejected = kept[:N_SHOWN], order[~selection.selected[order]][::-1][:N_SHOWN]
    if selection.weighted and not len(rejected):
        selected = np.concatenate([selected, kept[N_SHOWN:][-N_SHOWN:][::-1]])
    positions = np.concatenate([selected, rejected])
    batch = task.pool.batch(positions)
    images = batch.inputs.get("images")
    texts = task.describe(task.pool, positions)
    names = task.classes
    labels = [names[i] if names else None for i in batch.labels.tolist()] if batch.labels.ndim == 1 else None
    return [
        {
            "cell": key,
            "id": example_id,
            "kept": i < len(selected),
            "score": float(selection.score[positions[i]]),
            "label": None if labels is None else labels[i],
            "text": None if texts is None else texts[i],
            "image": None if images is None else _png(images[i]),
        }
        for i, example_id in enumerate(task.pool.ids.take(positions).to_pylist())
    ]


def _png(image: torch.Tensor) -> bytes:
    """An image (C, H, W) of grey levels as PNG: all of three channels, else the first alone."""
    pixels = image.to(torch.uint8).cpu().numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0]).save(stream, "PNG")
    return stream.getvalue()
