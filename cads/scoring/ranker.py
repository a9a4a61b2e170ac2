"""Rankers score every example of a pool once, and cut the ranking to any budget: base of the cost-aware baselines."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import SELECT, Ledger, PlannedLedger
from cads.data.hashing import add_tensors
from cads.data.ids import best_first
from cads.data.pool import Pool
from cads.data.target_share import TargetFraction
from cads.monitor import Monitor
from cads.runtime.processes import active_group
from cads.scoring.cut import CUT_OPTIONS, Cut, left_to_train, target_usage
from cads.scoring.ranking import FILES, Ranking
from cads.scoring.reference_models import proxy_of
from cads.scoring.stages import RankingStage
from cads.selection import Selection
from cads.selection_files import check_folder
from cads.task import Task


@dataclass
class Ranker(ABC):
    """A selector that scores the whole pool once, and keeps the best examples that the budget pays for.

    The examples kept are a prefix of the ranking, so a smaller budget keeps a subset of those of a larger one.
    """

    fraction: float | None = None
    """Share of the pool to keep, by what its examples cost; null to let the budget decide."""
    epochs: float = 4.0
    """Passes over the examples kept that the budget pays for: up to four are nearly as good as fresh data
    (Muennighoff et al., 2023, arXiv 2305.16264)."""
    target_fraction: TargetFraction = 0.0
    """Share of each batch of the final training that is drawn from the target; 0, as published: the pool alone.
    "by size", as in `cads`: the target's share of itself and the examples kept, at most 0.6."""

    method: ClassVar[str]
    """Name of the method."""
    reads_model: ClassVar[bool] = True
    """Whether the scores depend on the weights of the task's model."""

    def __post_init__(self) -> None:
        self.cut.check()

    @abstractmethod
    def rank(self, task: Task, *, seed: int, ledger: Ledger, monitor: Monitor | None = None) -> Ranking:
        """Carry out the stages: score every example of `task.pool`, charging `ledger`; independent of the budget."""

    @abstractmethod
    def stages(self, scorer: Task) -> Sequence[RankingStage]:
        """What `rank` does with the models and examples of `scorer`, in order; see `cads.scoring.stages`.

        Raises:
            ConfigError: if the method does not apply to this task.
        """

    def scorer_of(self, task: Task) -> Task:
        """The task that examples are scored in: its proxy, if it has one and the scores depend on a model's weights.

        Raises:
            ConfigError: as `proxy_of`.
        """
        return proxy_of(task) if self.reads_model else task

    def rank_plan(self, task: Task) -> PlannedLedger:
        """What `rank` would charge, by stage; nothing is trained and no example is scored.

        Raises:
            ConfigError: if the method does not apply to this task.
        """
        scorer, ledger = self.scorer_of(task), PlannedLedger()
        for stage in self.stages(scorer):
            stage.charge(scorer, ledger)
        return ledger

    def rank_once(
        self, task: Task, folder: Path | str, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Ranking:
        """The ranking stored in `folder` if its provenance hash matches, or else a new one, which is stored there.

        For scripts that cut one ranking to many budgets; studies keep rankings in their tables. The ledger is charged
        what the ranking costs, also if it is read from the folder.

        Raises:
            SelectionError: if `folder` holds something else than a ranking.
        """
        folder, provenance_hash, world = Path(folder), self.provenance_hash(task, seed), active_group()
        world.on_rank_zero(lambda: check_folder(folder, FILES))
        if world.on_rank_zero((folder / FILES[0]).exists):
            stored = world.locally(lambda: Ranking.load(folder))
            if stored.provenance_hash == provenance_hash:
                ledger.merge(stored.ledger)
                return stored
        ranking_ledger = Ledger()
        try:
            ranking = self.rank(task, seed=seed, ledger=ranking_ledger, monitor=monitor)
        finally:
            ledger.merge(ranking_ledger)
        ranking = replace(ranking, provenance_hash=provenance_hash)
        world.on_rank_zero(lambda: str(ranking.save(folder)))
        return ranking

    def provenance_hash(self, task: Task, seed: int) -> str:
        """A hash of all that scores depend on: method, options, seed, pool, target and its subtasks, recipe, model."""
        scorer = proxy_of(task)
        options = {name: value for name, value in asdict(self).items() if name not in CUT_OPTIONS}
        pools = [part.content_hash for t in (task, scorer) for part in (t.pool, t.target)]
        recipe = scorer.recipe.result_fields()
        settings = [self.method, options, seed, task.name, scorer.name, task.accounting, recipe, pools]
        # The subtasks are not part of the content of a pool.
        subtasks = scorer.subtasks(scorer.target)
        settings.append(None if subtasks is None else np.asarray(subtasks).tolist())
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        if self.reads_model:
            add_tensors(digest, scorer.model(seed).state_dict())
        return digest.hexdigest()

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Rank and cut; see `cads.selector.Selector`.

        Raises:
            BudgetError: if the budget must cover selection, and does not leave one step to train with.
        """
        left_to_train(task, budget, self.plan(task, budget).total(SELECT).flops, self.method)
        ranking = self.rank(task, seed=seed, ledger=ledger, monitor=monitor)
        return self.select_top(ranking, task, budget, ledger)

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """What `select` would charge; see `cads.selector.Selector`."""
        total = budget.flops(task)
        check_step(task, total)
        ledger = self.rank_plan(task)
        train_flops = total - ledger.total(SELECT).flops if budget.count_selection else total
        usage = task.costs.per_usage(task.pool, task.recipe.batch_size)
        ledger.kept = self.cut.planned_size(len(task.pool), usage, max(0.0, train_flops), lambda: target_usage(task))
        return ledger

    def select_top(self, ranking: Ranking, task: Task, budget: Budget, ledger: Ledger | None = None) -> Selection:
        """The best examples of `ranking`, best first, that the budget pays for.

        Args:
            ledger: what the selection is charged; None for what the ranking cost.
        """
        ledger = ranking.ledger if ledger is None else ledger
        train_flops = left_to_train(task, budget, ledger.total(SELECT).flops, self.method)
        score = ranking.scores_of(task.pool)
        selected = np.zeros(len(task.pool), dtype=bool)
        order = best_first(task.pool.ids, score)
        usages = task.costs.usages(task.pool)[order] + task.costs.optimizer_step / task.recipe.batch_size
        n_kept = self.cut.size(usages, train_flops, lambda: target_usage(task))
        selected[order[:n_kept]] = True
        return Selection.from_pool(
            task.pool,
            selected=selected,
            score=score,
            method=ranking.method,
            seed=ranking.seed,
            budget=budget,
            ledger=ledger,
            target_fraction=self.cut.target_share(len(task.target), n_kept),
            config=ranking.config | {name: getattr(self, name) for name in CUT_OPTIONS},
            notes=ranking.notes,
        )

    @property
    def cut(self) -> Cut:
        """How the ranking is cut."""
        return Cut(self.fraction, self.epochs, self.target_fraction)

    def ranking(
        self, task: Task, score: np.ndarray, *, seed: int, ledger: Ledger, pool: Pool | None = None, **notes: Any
    ) -> Ranking:
        """What `rank` returns for scores in the order of `pool` (the task's, or its scorer's), shape (N,)."""
        ids = (pool or task.pool).ids
        ranking = Ranking(ids, score, self.method, seed, ledger, task.pool.content_hash, asdict(self), notes)
        ranking.scores_of(task.pool)
        return ranking
