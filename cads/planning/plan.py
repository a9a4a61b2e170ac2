"""The plan of a budget, before anything is spent: the cost of each method's selection, and what remains to train."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import SELECT, PlannedLedger
from cads.accounting.stage_labels import stage_label
from cads.accounting.units import duration, size
from cads.errors import CadsError, ConfigError
from cads.planning.ccds import CcdsCost
from cads.planning.memory import forward_memory, training_memory
from cads.task import Task
from cads.tasks.language.shapes import ShapeOnlyLanguageTask

SOURCE = "Yin and Rush, ICLR 2025, arXiv 2410.16208"
"""Source of the size ratios."""


class Plannable(Protocol):
    """A selector or a published method, with a planned ledger."""

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """The planned cost of selection, by stage."""
        ...


@dataclass(frozen=True)
class MethodPlan:
    """The plan of one method at the budget.

    Attributes:
        method: its name.
        stages: FLOPs of each stage of selection, by its name in ledgers.
        selection: FLOPs of all stages. training: FLOPs that remain for training.
        share: selection over the budget; above 1 if selection is not part of the budget and costs more.
        usages: examples seen in training, with repetitions. examples: examples of the pool that can be seen.
        tokens, epochs: of the usages.
        seconds: selection and training at the given FLOP/s.
        memory: peak bytes of training and of selection, by these names.
        size_ratio: parameters of the trained model over those of the scorer.
        needed_ratio: the size ratio from which on the method was found compute-optimal.
        note: a remark for the reader.
    """

    method: str
    stages: dict[str, float]
    selection: float
    training: float
    share: float
    usages: float
    examples: float
    tokens: float
    epochs: float
    seconds: float
    memory: dict[str, float]
    size_ratio: float | None = None
    needed_ratio: float | None = None
    note: str = ""

    @property
    def in_range(self) -> bool | None:
        """Whether the size ratio is at least `needed_ratio`; None if one of them is not known."""
        if self.size_ratio is None or self.needed_ratio is None:
            return None
        return self.size_ratio >= self.needed_ratio


@dataclass(frozen=True)
class Plan:
    """The plan of a budget for several methods.

    Attributes:
        task: its name. accounting: of all FLOPs. budget: as given. flops: the budget.
        count_selection: whether the budget covers selection.
        pool: number of examples. pool_tokens: D, their tokens. usage: FLOPs of one example in training.
        flops_per_second: rate of computation, for the times. rate_from: source of the rate, in words.
        methods: one plan for each method. refused: why a method has no plan, by method.
    """

    task: str
    accounting: str
    budget: str
    flops: float
    count_selection: bool
    pool: int
    pool_tokens: float
    usage: float
    flops_per_second: float
    rate_from: str
    methods: list[MethodPlan]
    refused: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON; in FLOPs, seconds and bytes."""
        record = asdict(self)
        for row, method in zip(record["methods"], self.methods, strict=True):
            row["in_range"] = method.in_range
        return {**record, "ratio_source": SOURCE}

    def table(self) -> Group:
        """The plan for the terminal, at most 100 columns wide."""
        covers = "selection and training" if self.count_selection else "training; selection comes on top"
        head = (
            f"{self.task}\n{self.budget} = {self.flops:.4g} FLOPs for {covers}\n"
            f"{self.accounting} accounting; pool of {self.pool:,} examples, D = {self.pool_tokens:.4g} tokens "
            f"({self.pool_tokens / self.pool:.4g} each)\n"
            f"Training on one example costs {self.usage:.4g} FLOPs.\n"
            f"Time at {self.flops_per_second:.3g} FLOP/s ({self.rate_from}), the least it can take."
        )
        return Group(Text(head), self._methods(), self._stages(), Text(self._remarks()))

    def _methods(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column("method", no_wrap=True)
        for column in ("select", "share", "train", "examples", "tokens", "epochs", "time", "memory", "ratio"):
            table.add_column(column, justify="right", no_wrap=True)
        for m in self.methods:
            table.add_row(
                m.method,
                f"{m.selection:.3e}" if m.selection else "0",
                f"{m.share:.1%}",
                f"{m.training:.3e}",
                f"{m.examples:,.0f}",
                f"{m.tokens:.3g}",
                f"{m.epochs:.3g}",
                duration(m.seconds),
                size(max(m.memory.values())),
                _ratio(m),
            )
        return table

    def _stages(self) -> Table:
        table = Table(title="Selection by stage, FLOPs", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
        table.add_column("method", no_wrap=True)
        table.add_column("stage")
        table.add_column("FLOPs", justify="right", no_wrap=True)
        for m in self.methods:
            for stage, flops in m.stages.items():
                table.add_row(m.method, stage_label(stage), f"{flops:.3e}")
        return table

    def _remarks(self) -> str:
        lines = [f"{m.method}: {m.note}" for m in self.methods if m.note]
        lines += [f"{name} has no plan: {reason}" for name, reason in self.refused.items()]
        if any(m.needed_ratio for m in self.methods):
            lines.append(
                "ratio: size of the trained model over the scorer's, and from which one on the method was found "
                f"compute-optimal ({SOURCE})"
            )
        lines.append(
            "memory: weights, gradients, optimizer state, and what is kept for the backward pass, in closed form"
        )
        return "\n".join(lines)


def make_plan(
    task: Task,
    budget: Budget,
    methods: Mapping[str, Plannable],
    *,
    flops_per_second: float,
    rate_from: str = "given",
    strict: bool = False,
) -> Plan:
    """Plan every method. Nothing is trained.

    Args:
        task: without data or weights (`TaskConfig.meta`); its accounting is the plan's.
        budget: for training, or for selection and training.
        methods: by name.
        flops_per_second: rate of computation, for the times. rate_from: source of the rate, in words.
        strict: raise if a method cannot be planned, rather than list it in `refused`.

    Raises:
        ConfigError: if `flops_per_second` is not positive, or (if `strict`) a method does not support the
            accounting.
        BudgetError: if the budget does not cover one step of training.
    """
    if not (math.isfinite(flops_per_second) and flops_per_second > 0):
        raise ConfigError(f"flops_per_second = {flops_per_second}: it must be positive and finite")
    rows, refused = [], {}
    total = budget.flops(task)
    check_step(task, total)
    for name, method in methods.items():
        try:
            rows.append(_plan_method(name, method, task, budget, total, flops_per_second))
        except CadsError as error:
            if strict:
                raise
            refused[name] = str(error)
    return Plan(
        task=task.name,
        accounting=task.costs.accounting,
        budget=str(budget),
        flops=total,
        count_selection=budget.count_selection,
        pool=len(task.pool),
        pool_tokens=task.costs.tokens_per_example(task.pool) * len(task.pool),
        usage=task.costs.per_usage(task.pool, task.recipe.batch_size),
        flops_per_second=flops_per_second,
        rate_from=rate_from,
        methods=rows,
        refused=refused,
    )


def _plan_method(name: str, method: Plannable, task: Task, budget: Budget, total: float, rate: float) -> MethodPlan:
    """The plan of one method; `total`: FLOPs of the budget, `rate`: FLOP/s."""
    ledger = method.plan(task, budget)
    selection_flops = ledger.total(SELECT).flops
    train_flops, note = total, ledger.note
    if budget.count_selection:
        train_flops = max(0.0, total - selection_flops)
        step = task.costs.per_usage(task.pool, task.recipe.batch_size) * task.recipe.batch_size
        if train_flops < step:
            note = f"it does not fit: selection costs {selection_flops:.4g} FLOPs, and the budget is {total:.4g}"
    n, usage = len(task.pool), task.costs.per_usage(task.pool, task.recipe.batch_size)
    usages = train_flops / usage
    memory = {"training": training_memory(task).total}
    peaks = [training_memory(t, models).total for t, models in ledger.trained]
    peaks += [forward_memory(t).total for t in ledger.scored]
    if peaks:
        memory["selection"] = max(peaks)
    ratio = None
    if isinstance(method, CcdsCost) and method.needed_ratio and isinstance(task, ShapeOnlyLanguageTask):
        ratio = task.size / task.scorer.size
    return MethodPlan(
        method=name,
        stages={stage: entry.flops for (_, stage), entry in ledger.entries.items()},
        selection=selection_flops,
        training=train_flops,
        share=selection_flops / total,
        usages=usages,
        examples=min(float(n), usages),
        tokens=usages * task.costs.tokens_per_example(task.pool),
        epochs=usages / n,
        seconds=(selection_flops + train_flops) / rate,
        memory=memory,
        size_ratio=ratio,
        needed_ratio=None if ratio is None or not isinstance(method, CcdsCost) else method.needed_ratio,
        note=note,
    )


def _ratio(m: MethodPlan) -> str:
    """The size ratio against the needed one, in words."""
    if m.size_ratio is None:
        return "-"
    return f"{m.size_ratio:.3g} {'>=' if m.in_range else '<'} {m.needed_ratio:g}"
