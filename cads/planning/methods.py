"""The cost of each of several methods, and the FLOPs that it leaves for training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from cads.accounting.budget import Budget
from cads.accounting.throughput import matmul_flops_per_second
from cads.errors import BudgetError, ConfigError
from cads.planning.ccds import PUBLISHED
from cads.planning.plan import Plan, Plannable, make_plan
from cads.registry import SELECTORS, build_selector, names
from cads.task import Task
from cads.tasks.language.shapes import ShapeOnlyLanguageTask


def plan_methods(
    task: Task,
    budget: Budget,
    methods: Sequence[str] | None = None,
    *,
    selectors: Mapping[str, Plannable] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    flops_per_second: float | None = None,
) -> Plan:
    """The plan of each method; nothing is trained.

    Args:
        budget: of training; a time needs `flops_per_second`.
        methods: names; None for all known methods. Those that do not apply are then listed with the reason.
        selectors: selectors that exist already, by name of the method.
        options: of the selectors that are yet to be built, by name of the method.
        flops_per_second: of this machine, for the times; None to measure it.

    Raises:
        ConfigError: if a method of `methods` is unknown, or does not apply to this task.
        BudgetError: if the budget does not buy one step, or is a time and `flops_per_second` is not given.
    """
    if budget.unit == "seconds":
        if flops_per_second is None:
            raise BudgetError(
                f"a plan trains nothing and cannot tell what {budget} buy: give flops_per_second, which `cads train` "
                "measures and says, or a budget in FLOPs, usages, epochs or tokens"
            )
        budget = replace(budget, amount=float(math.floor(budget.amount * flops_per_second)), unit="FLOPs")
    rate, rate_from = flops_per_second, "given"
    if rate is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        rate, rate_from = matmul_flops_per_second(device, task.recipe.precision), f"matrix products on this {device}"
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
    plan = make_plan(task, budget, plannable, flops_per_second=rate, rate_from=rate_from, strict=methods is not None)
    plan.refused.update(refused)
    return plan
