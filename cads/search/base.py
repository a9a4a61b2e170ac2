"""The base class of selectors that search by trials, within the FLOPs that selection may spend."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import pyarrow as pa
import pyarrow.compute as pc

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger, PlannedLedger
from cads.accounting.stage_labels import stage_label
from cads.data.pool import Pool
from cads.errors import ConfigError, DataError, NotAffordableError
from cads.monitor import Monitor
from cads.scoring.reference_models import proxy_of
from cads.search.allowance import BudgetSplit, split_budget
from cads.search.choice import Choice
from cads.search.inner_costs import InnerLoopCosts, PlannedInnerLoop
from cads.search.inner_runs import InnerLoop
from cads.search.source_order import in_name_order
from cads.search.stages import Stages
from cads.selection import Selection
from cads.task import Objective, Task

log = logging.getLogger(__name__)

ALLOWANCE = 2.75
"""Selection FLOPs in units of the training budget, if the budget need not cover selection."""
NO_SEARCH_AFFORDABLE = "the allowance buys no trials: the full pool is returned"
FEWEST_TARGET_EXAMPLES = 20
"""Fewest examples of the target with which the guard compares a choice to the full pool. With fewer, two models that
are as good differ by chance about as much as selection gains."""
ONE_SOURCE = "the pool has one source, and nothing can be chosen among sources: the full pool is returned"


@dataclass
class Search(ABC):
    """A selector that compares candidates by trials, and returns the full pool if no candidate beats it.

    If the task names a proxy, the trials train the proxy: for as many usages, at the proxy's cost.
    """

    allowance: float | None = None
    """Selection FLOPs at most, in units of the training FLOPs; null: 2.75 times what training the scorer would take,
    and no more than 1/3 if the budget counts selection, or 1/12 for each pass it buys, up to 1. Where models are
    pretrained it is 1/6 for each pass, and up to 3 where less buys no search."""
    outer: str | Objective | None = None
    """The metric to minimise on the target, by name or, in Python, any function of task, model and pool; null for the
    task's own."""
    guard: bool = True
    """Return the full pool unless the choice beat it on the target. With fewer than 20 target examples the guard cannot
    tell: then nothing is searched, and the full pool is returned."""
    target_fraction: float | None = None
    """Share of each batch of the final training drawn from the target, as in `joint`, at least 0 and below 1; null: 0.
    Trials see none of it."""

    method: ClassVar[str]
    """Name of the method."""
    default_allowance: ClassVar[float] = ALLOWANCE
    """Selection FLOPs at most, in units of the training FLOPs, unless the options or the budget say otherwise."""

    def __post_init__(self) -> None:
        if self.target_fraction is not None and not 0 <= self.target_fraction < 1:
            raise ConfigError(f"target_fraction = {self.target_fraction}: it must be at least 0 and below 1")

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Choose what to train on; see `cads.selector.Selector`."""
        proxy = proxy_of(task)
        proxy.check_outer(self.outer)
        try:
            self._plan(task, budget)
            choice, pool = self._search(task, budget, seed, ledger, monitor or Monitor()), proxy.pool
        except NotAffordableError as error:
            log.warning("%s: %s", self.method, error)
            choice, pool = Choice.full_pool(task.pool, str(error)), task.pool
        selection = choice.selection(
            pool,
            method=self.method,
            seed=seed,
            budget=budget,
            ledger=ledger,
            config=asdict(self),
            target_fraction=self.target_fraction or 0.0,
        )
        return replace(_in_order(selection, task.pool), pool_hash=task.pool.content_hash)

    def _search(self, task: Task, budget: Budget, seed: int, ledger: Ledger, monitor: Monitor) -> Choice:
        """Search with the model of the proxy, within the part of `budget` that selection may spend."""
        proxy, split = self.split_budget(task, budget)
        selection_ledger = Ledger(limit=split.selection_flops)
        inner = InnerLoop(proxy, selection_ledger, monitor, self.outer or proxy.source_outer)
        try:
            return self.run_search(inner, split.train_flops, seed)
        finally:
            ledger.merge(selection_ledger)

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """What `select` would charge; see `cads.selector.Selector`."""
        try:
            return self._plan(task, budget)
        except NotAffordableError as error:
            return PlannedLedger(self.split_budget(task, budget)[1].selection_flops, str(error))

    def _plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """What the search would charge.

        Raises:
            NotAffordableError: if there is nothing to search, the guard cannot tell whether a choice is better, or the
                budget does not buy the search.
        """
        proxy, split = self.split_budget(task, budget)
        if has_one_source(task.pool):
            raise NotAffordableError(ONE_SOURCE)
        costs = PlannedInnerLoop(proxy, split.selection_flops)
        if self.guard and len(proxy.target) < FEWEST_TARGET_EXAMPLES:
            raise NotAffordableError(cannot_tell(len(proxy.target)))
        for stage in self.stages(costs, split.train_flops):
            costs.charge(stage)
        return costs.ledger

    def split_budget(self, task: Task, budget: Budget) -> tuple[Task, BudgetSplit]:
        """The task whose model is trained in trials, and the FLOPs of selection and training.

        Returns:
            the proxy, or the task itself if it names none, with its sources in the order of their names; and the split.
            Its `train_flops` are those of the final training if it trained the proxy: as many usages, at the proxy's
            cost.
        """
        proxy = proxy_of(task)
        ratio = 1.0
        if proxy is not task:
            usages = [t.costs.per_usage(t.pool, t.recipe.batch_size) for t in (proxy, task)]
            ratio = usages[0] / usages[1]
        proxy = in_name_order(proxy)
        min_flops = self.min_flops(PlannedInnerLoop(proxy, math.inf))
        split = split_budget(task, budget, self.allowance, self.default_allowance * ratio, min_flops)
        return proxy, BudgetSplit(split.train_flops * ratio, split.selection_flops)

    def min_flops(self, costs: InnerLoopCosts) -> float:
        """FLOPs of the smallest search, for which a pretrained model's budget gives up training; 0: for none."""
        return 0.0

    @abstractmethod
    def stages(self, costs: InnerLoopCosts, train_flops: float) -> Stages:
        """The stages of the search, for a final training of `train_flops`; see `cads.search.stages`.

        Raises:
            NotAffordableError: if the rest of the ledger's limit does not buy the search.
        """

    @abstractmethod
    def run_search(self, inner: InnerLoop, train_flops: float, seed: int) -> Choice:
        """Carry out the stages with the ledger of `inner`, and choose something to train on.

        Raises:
            NotAffordableError: as `stages`.
        """


def has_one_source(pool: Pool) -> bool:
    """Whether all examples come from one source, so that there is no choice among sources."""
    return pool.sources is not None and len(pool.source_names) == 1


def _in_order(selection: Selection, pool: Pool) -> Selection:
    """The Selection in the order of `pool`; a proxy's pool may have another order."""
    positions = pc.index_in(pool.ids, value_set=selection.ids).to_numpy()
    return replace(
        selection,
        ids=pool.ids,
        score=selection.score[positions],
        probability=selection.probability[positions],
        selected=selection.selected[positions],
        sources=None if selection.sources is None else selection.sources.take(pa.array(positions)),
        origin=pool.origin,
    )


def check_reference(objective: float, stage: str) -> None:
    """Refuse to go on if the trial on the full pool, to which all others are compared, has no finite objective.

    Raises:
        DataError: naming the stage.
    """
    if not math.isfinite(objective):
        raise DataError(
            f"{stage_label(stage)}: the run on the full pool met a loss that is not finite, and nothing can be "
            "compared with it: lower the learning rate, or look at the pool"
        )


def guard_message(*, guard: bool, chosen: bool) -> str:
    """The guard's note on a search.

    Args:
        guard: whether the guard is on. chosen: whether the search returns its choice; if not, the full pool.
    """
    if guard:
        return "better than the full pool on the target" if chosen else "the full pool was not beaten"
    if chosen:
        return "the guard is off: the choice need not beat the full pool"
    return "the guard is off, but no choice ended with a finite objective: the full pool is returned"


def cannot_tell(n_target: int) -> str:
    """Why the guard does not compare a choice with the full pool on `n_target` target examples."""
    examples = "1 example" if n_target == 1 else f"{n_target} examples"
    return (
        f"the target has {examples}, and with fewer than {FEWEST_TARGET_EXAMPLES} the guard cannot tell whether a "
        "choice beats the full pool: the full pool is returned; give more target examples, or set guard = false"
    )
