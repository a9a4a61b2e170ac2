"""One cell of a grid: what it would cost, whether it applies, and running it: select, train, measure."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from cads.accounting.budget import check_step
from cads.accounting.ledger import EVALUATE, SELECT, TRAIN, Ledger
from cads.accounting.transformer import trainable_size
from cads.errors import BudgetError, ConfigError, DataError
from cads.monitor import Monitor
from cads.registry import build_selector
from cads.runtime.processes import active_group
from cads.scoring.ranker import Ranker
from cads.selection import Selection
from cads.selector import Selector
from cads.study.grid import Cell
from cads.study.journals import Journals
from cads.study.ranking_store import Rankings
from cads.study.tables import DONE, NOT_APPLICABLE, OVER_BUDGET
from cads.task import Task
from cads.training.final import train

N_SHOWN = 8
"""Examples kept, and examples left out, that are shown of each selection."""


@dataclass(frozen=True)
class CellPlan:
    """What a cell would do.

    Attributes:
        cell: of the grid. key: its name on disk. ranking: the name of its ranking, or "" if it makes none.
        status: why it is not run, or "". note: more about that, or what the selector says of its plan.
        selection: FLOPs of selection, as spent. training: FLOPs that are left to train with.
    """

    cell: Cell
    key: str
    ranking: str
    status: str
    note: str
    selection: float
    training: float


@dataclass
class RunRow:
    """What came out of a cell: a row of `runs`, and its rows of `selections` and `examples`."""

    run: dict[str, Any]
    selections: pa.Table
    examples: list[dict[str, Any]]


@dataclass
class Recorder(Monitor):
    """A monitor that also remembers the course of the probabilities of the sources."""

    folder: Path
    course: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.folder)

    def probabilities(self, names: tuple[str, ...], values: np.ndarray, step: int) -> None:
        """The probability of each source over time (values: shape (S,))."""
        super().probabilities(names, values, step)
        self.course.append(dict(zip(names, np.asarray(values, dtype=float).tolist(), strict=True)))


def plan_cell(task: Task, cell: Cell, key: str, ranking: str) -> CellPlan:
    """What a cell would cost, whether its method applies, and whether it fits; nothing is trained."""
    selector = build_selector(cell.entry.method, cell.entry.options)

    def plan(status: str, note: str, selection: float = 0.0, training: float = 0.0) -> CellPlan:
        return CellPlan(cell, key, ranking, status, note, selection, training)

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
    """FLOPs of selection, each ranking made once, and of training."""
    shared = {p.ranking: p.selection for p in plans if p.ranking and not p.status}
    own = sum(p.selection for p in plans if not p.ranking and not p.status)
    return own + sum(shared.values()), sum(p.training for p in plans if not p.status)


def amortised(ledger: Ledger, sharing: float) -> Ledger:
    """The account of one of `sharing` tasks that share the selection."""
    shared = Ledger()
    for (phase, stage), entry in ledger.entries.items():
        flops = entry.flops / sharing if phase == SELECT else entry.flops
        shared.charge(phase, stage, **{**asdict(entry), "flops": flops})
    return shared


def run_cell(plan: CellPlan, task: Task, metric: str, journals: Journals, place: Path) -> RunRow:
    """Select, train and test once; leaves the Selection and TensorBoard's files in `place`.

    What the journal of the cell has of it is not done again. A ranking has a journal of its own: whoever makes it, it
    is no part of the cell.

    Raises:
        CadsError: whatever selection or training refuses.
        Interrupted: if this process was asked to stop.
    """
    cell, seed = plan.cell, plan.cell.setting.seed
    monitor = Recorder(place / "tensorboard")
    with monitor:
        select, ranked = _selecting(plan, task, journals, monitor)
        with journals.open(plan.key) as journal:
            selection, spent = select()
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
            active_group().on_rank_zero(lambda: str(selection.save(place / "selection")))
            run = describe(plan, task, metric) | {
                "status": DONE,
                **measured,
                "metrics": json.dumps(outcome.metrics),
                "selection_flops": charged[SELECT].flops,
                "selection_flops_spent": spent,
                "training_flops": charged[TRAIN].flops,
                "evaluation_flops": charged[EVALUATE].flops,
                "total_flops": total,
                "n_selected": int(selection.selected.sum()),
                "examples": charged[TRAIN].usages,
                "tokens": charged[TRAIN].tokens,
                "seconds": ranked + journal.seconds,
                "ledger": json.dumps(outcome.ledger.to_json()),
                "source_probability": json.dumps(selection.source_probability),
                "probability_course": json.dumps(monitor.course),
                "notes": json.dumps(selection.notes, default=str),
            }
            return RunRow(run, _selected(plan.key, selection), shown(plan.key, selection, task))


def _selecting(
    plan: CellPlan, task: Task, journals: Journals, monitor: Monitor
) -> tuple[Callable[[], tuple[Selection, float]], float]:
    """What selects, and the seconds that its ranking, which is made here if need be, has taken.

    The selection is charged as the grid says; it comes with the FLOPs spent on it.
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
    selection = selector.select(task, cell.budget, seed=cell.setting.seed, ledger=Ledger(), monitor=monitor)
    spent = selection.ledger.total(SELECT).flops
    return replace(selection, ledger=amortised(selection.ledger, cell.sharing)), spent


def describe(plan: CellPlan, task: Task, metric: str) -> dict[str, Any]:
    """What is known of a cell before it runs: columns of `runs`."""
    cell, setting = plan.cell, plan.cell.setting
    usage = task.costs.per_usage(task.pool, task.recipe.batch_size)
    return {
        "cell": plan.key,
        "task": setting.task or task.name,
        "model": setting.model,
        "n_parameters": float(trainable_size(task.costs.model)),
        "selector_parameters": float(trainable_size((task.proxy or task).costs.model)),
        "method": cell.label,
        "selector": cell.entry.method,
        "options": json.dumps(cell.entry.options),
        "budget": str(cell.budget),
        "budget_flops": cell.budget.flops(task),
        "count_selection": cell.budget.count_selection,
        "sharing": cell.sharing,
        "seed": setting.seed,
        "metric": metric,
        "maximised": metric in task.maximised,
        "full_flops": usage * len(task.pool),
        "n_pool": len(task.pool),
        "learning_rate": setting.train.learning_rate,
        "accounting": task.costs.accounting,
    }


def scored(task: Task, metric: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    """The columns of `runs` that say how good a trained model is by one metric.

    Raises:
        DataError: if that is no number.
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
    """Of a share of right or wrong answers on n test examples; None for other metrics."""
    return math.sqrt(score * (1 - score) / n) if metric in ("accuracy", "error") else None


def metric_of(task: Task, wanted: str | None) -> str:
    """The metric to compare by: the one that is wanted, or else accuracy, or else the task's own.

    Raises:
        ConfigError: if the task has no such metric.
    """
    few = task.test.subset(np.arange(min(N_SHOWN, len(task.test))), "test set")
    known: Mapping[str, float] = task.metrics(task.model(0), few)
    metric = wanted or ("accuracy" if "accuracy" in known else task.outer)
    if metric not in known:
        raise ConfigError(f"metric = {metric!r} is no metric of {task.name}: choose from {sorted(known)}")
    return metric


def _selected(key: str, selection: Selection) -> pa.Table:
    kept = pa.array(selection.selected)
    sources = (
        pa.nulls(len(selection.ids), pa.string()) if selection.sources is None else selection.sources.cast(pa.string())
    )
    n = int(selection.selected.sum())
    columns = {"id": selection.ids, "source": sources, "rank": pa.array(selection.rank)}
    return pa.table({"cell": pa.array([key] * n, pa.string()), **{k: v.filter(kept) for k, v in columns.items()}})


def shown(key: str, selection: Selection, task: Task) -> list[dict[str, Any]]:
    """A few of the best examples that were kept and the worst that were left out, as a reader sees them."""
    order = np.argsort(selection.rank, kind="stable")
    kept = order[selection.selected[order]][:N_SHOWN]
    left = order[~selection.selected[order]][::-1][:N_SHOWN]
    positions = np.concatenate([kept, left])
    batch = task.pool.batch(positions)
    images = batch.inputs.get("images")
    texts = task.describe(task.pool, positions)
    names: tuple[str, ...] = getattr(task, "classes", ())
    labels = [names[i] if names else None for i in batch.labels.tolist()] if batch.labels.ndim == 1 else None
    return [
        {
            "cell": key,
            "id": identity,
            "kept": i < len(kept),
            "score": float(selection.score[positions[i]]),
            "label": None if labels is None else labels[i],
            "text": None if texts is None else texts[i],
            "image": None if images is None else _png(images[i]),
        }
        for i, identity in enumerate(task.pool.ids.take(positions).to_pylist())
    ]


def _png(image: torch.Tensor) -> bytes:
    """An image (C, H, W) of grey levels as PNG, of its first channel unless it has three."""
    pixels = image.to(torch.uint8).cpu().numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0]).save(stream, "PNG")
    return stream.getvalue()
