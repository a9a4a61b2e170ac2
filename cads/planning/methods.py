"""The cost of each of several methods, and the FLOPs that it leaves for training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import SELECT, PlannedLedger
from cads.errors import BudgetError, CadsError, ConfigError
from cads.planning.ccds import PUBLISHED, CcdsCost
from cads.planning.memory import forward_memory, kept_memory, training_memory
from cads.planning.plan import MethodPlan, Plan
from cads.planning.ranking_time import time_ranking
from cads.planning.timing import GIVEN, Timing, given_timing, time_training
from cads.registry import SELECTORS, build_selector, names
from cads.scoring.ranker import Ranker
from cads.task import Task
from cads.tasks.language.shapes import ShapeOnlyLanguageTask
from cads.tasks.language.task import LanguageTask
from cads.training.device_settings import device_settings
from cads.training.speed import measuring_seconds

TIMED_SHARE = 0.1
"""Share of the time of a run from which on a plan of many methods times a ranking."""
RIDER_TIME = 1.15
"""Time of a training step of `cads` beside that of a plain one (experiments/results/step_time.md: 1.08 to 1.19)."""


class Plannable(Protocol):
    """A selector or a published method, with a planned ledger."""

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """The planned cost of selection, by stage."""
        ...


def plan_methods(
    task: Task,
    budget: Budget,
    methods: Sequence[str] | None = None,
    *,
    selectors: Mapping[str, Plannable] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    flops_per_second: float | None = None,
    with_start_up: bool = False,
) -> Plan:
    """The plan of each method; nothing is trained but a throw-away model, for some steps that are timed.

    Args:
        budget: of training.
        methods: names; None for all known methods. Those that do not apply are then listed with the reason.
        selectors: selectors that exist already, by name of the method.
        options: of the selectors that are yet to be built, by name of the method.
        flops_per_second: of this machine, for the times; None to time some steps, or else matrix products.
        with_start_up: whether this process was begun for the plan, and its age is the start-up of a run.

    Raises:
        ConfigError: if a method of `methods` is unknown, or does not apply to this task.
        BudgetError: if the budget does not buy one step, or is a time, and no steps can be timed.
    """
    timing = given_timing(flops_per_second) if flops_per_second is not None else None
    if timing is None:
        timing = time_training(task, with_start_up=with_start_up)
    if budget.unit == "seconds":
        budget = _in_flops(budget, timing)
    # Selectors read their examples to plan costs. A task of shapes alone has none: published costs replace them.
    ready_selectors = {**(PUBLISHED if isinstance(task, ShapeOnlyLanguageTask) else {}), **(selectors or {})}
    plannable: dict[str, Plannable] = {}
    refused: dict[str, str] = {}
    for name in sorted({*names(SELECTORS), *ready_selectors}) if methods is None else methods:
        try:
            plannable[name] = ready_selectors.get(name) or build_selector(name, (options or {}).get(name))
        except ConfigError as error:
            if methods is not None:
                raise
            refused[name] = str(error)
    plan = make_plan(task, budget, plannable, timing=timing, strict=methods is not None, time_rankings=True)
    plan.refused.update(refused)
    return plan


def _in_flops(budget: Budget, timing: Timing) -> Budget:
    """A time in FLOPs, by the speed that was measured or given.

    Raises:
        BudgetError: if no training was timed.
    """
    if not timing.is_timed and timing.rate_from != GIVEN:
        raise BudgetError(
            f"what {budget} buy cannot be told, as no training was timed ({timing.rate_from}): give the speed that "
            "`cads train` measures and says, such as --flops_per_second 1e12; or a budget in FLOPs, usages, epochs or "
            "tokens"
        )
    # A run measures the speed in its time; a speed that is given is taken as it is.
    seconds = budget.amount - (measuring_seconds(budget.amount) if timing.is_timed else 0.0)
    return replace(budget, amount=float(math.floor(seconds * timing.flops_per_second)), unit="FLOPs")


def make_plan(
    task: Task,
    budget: Budget,
    methods: Mapping[str, Plannable],
    *,
    flops_per_second: float | None = None,
    timing: Timing | None = None,
    strict: bool = False,
    time_rankings: bool = False,
) -> Plan:
    """Plan every method. Nothing is trained, but for rankings of few examples if `time_rankings`.

    Args:
        task: without data or weights (`TaskConfig.meta`); its accounting is the plan's.
        budget: for training, or for selection and training.
        methods: by name.
        flops_per_second: rate of computation, for the times; or `timing`, one of the two.
        timing: what was measured of a run.
        strict: raise if a method cannot be planned, rather than list it in `refused`.
        time_rankings: time rankings whose selection is at least `TIMED_SHARE` of the run, and with `strict` all.

    Raises:
        ConfigError: if `flops_per_second` is not positive, or (if `strict`) a method does not support the
            accounting.
        BudgetError: if the budget does not cover one step of training.
    """
    if timing is None:
        timing = given_timing(flops_per_second)
    rows, refused = [], {}
    total = budget.flops(task)
    check_step(task, total)
    for name, method in methods.items():
        try:
            row = _plan_method(name, method, task, budget, total, timing)
            if time_rankings and isinstance(method, Ranker):
                row = _with_ranking_time(row, method, timing, TIMED_SHARE * (not strict))
            rows.append(row)
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
        flops_per_second=timing.flops_per_second,
        rate_from=timing.rate_from,
        methods=rows,
        refused=refused,
        start_up=timing.start_up,
        sources=0 if task.pool.sources is None else len(task.pool.source_names),
        target=len(task.target),
        device="" if timing.rate_from == GIVEN else _device(task),
    )


def _device(task: Task) -> str:
    """The device of this process, and what training does there."""
    said = str(device_settings(task.recipe))
    if not isinstance(task, LanguageTask):
        return said
    return f"{said}; attention: {task.models.attention or 'sdpa, where the model has it'}"


def _plan_method(name: str, method: Plannable, task: Task, budget: Budget, total: float, timing: Timing) -> MethodPlan:
    """The plan of one method; `total`: FLOPs of the budget."""
    ledger = method.plan(task, budget)
    selection_flops = ledger.total(SELECT).flops
    train_flops, note = total, ledger.note
    if budget.count_selection:
        train_flops = max(0.0, total - selection_flops)
        step = task.costs.per_usage(task.pool, task.recipe.batch_size) * task.recipe.batch_size
        if train_flops < step:
            note = f"it does not fit: selection costs {selection_flops:.4g} FLOPs, and the budget is {total:.4g}"
    ends_early = ledger.most_training < train_flops
    train_flops = min(train_flops, ledger.most_training)
    n, usage = len(task.pool), task.costs.per_usage(task.pool, task.recipe.batch_size)
    usages = train_flops / usage
    train_seconds = train_flops / timing.flops_per_second * (RIDER_TIME if ledger.rides and timing.is_timed else 1.0)
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
        seconds=selection_flops / timing.flops_per_second + train_seconds + (timing.start_up or 0.0),
        memory=_memory(task, ledger, timing),
        size_ratio=ratio,
        needed_ratio=None if ratio is None or not isinstance(method, CcdsCost) else method.needed_ratio,
        note=note,
        kept=ledger.kept,
        rides=ledger.rides,
        end=f"it ends at {ledger.most_training / total:.0%} of it, {ledger.end}" if ends_early else "",
    )


def _with_ranking_time(row: MethodPlan, ranker: Ranker, timing: Timing, least_share: float) -> MethodPlan:
    """The plan with the time of its ranking as measured; as it is if that is too small a share, or is not measured."""
    at_training_speed = row.selection / timing.flops_per_second
    if timing.sample is None or not row.selection or at_training_speed < least_share * row.seconds:
        return row
    measured = time_ranking(ranker, timing.sample, timing.flops_per_second / timing.scale)
    if measured is None:
        return row
    seconds = row.seconds - at_training_speed + measured.seconds(row.selection / timing.scale)
    return replace(row, seconds=seconds, is_timed=True)


def _memory(task: Task, ledger: PlannedLedger, timing: Timing) -> dict[str, float]:
    """Peak bytes of training and of selection, by these names."""
    training = timing.resident + training_memory(task).total
    if timing.peak is not None:
        training = max(training, timing.peak)
    if ledger.rides and timing.resident:
        # Kept in the memory of the process, also where the model trains on another device.
        training += kept_memory(task)
    peaks = [training_memory(t, models).total for t, models in ledger.trained]
    peaks += [forward_memory(t).total for t in ledger.scored]
    return {"training": training, **({"selection": timing.resident + max(peaks)} if peaks else {})}
