"""CADS as it trains: the outer loop rides on the training of the final model; see `docs/online.md`.

    min_s  L_val(theta) + alpha E_m [ L_tr(theta; m) - l*_C(m) ],   m ~ p(.; s)

theta is trained on batches of target and pool, the pool's examples drawn by s. The Rao-Blackwellised gradient in s
needs the losses of the examples of a step, which the step computes anyway. So s moves at every step, and nothing is
trained twice: one run, one budget, which covers everything.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import TRAIN, Ledger, PlannedLedger
from cads.data.balanced_stream import balanced_stream
from cads.data.draws import draw_by_source
from cads.data.token_batches import by_id
from cads.data.training_batches import BatchStream
from cads.errors import ConfigError, DataError
from cads.monitor import Monitor
from cads.policies.label_odds import LabelOdds
from cads.runtime.checkpoint import State
from cads.scoring.pool_scores import reading_flops
from cads.scoring.sharded import ShardedScoring
from cads.search.inner_costs import PlannedInnerLoop
from cads.search.inner_runs import InnerLoop
from cads.search.source_order import in_name_order
from cads.seeding import derive
from cads.selection import Selection
from cads.selectors.online.history import PolicyHistory
from cads.selectors.online.opening import FIRST_PROBE, PROBE, Opening, opening_of
from cads.selectors.online.rider import MEMORY, OnlineRider
from cads.selectors.online.schedule import FROM_SCRATCH, PRETRAINED, OnlineConstants
from cads.selectors.online.signal import SourceExcess
from cads.selectors.online.strata import Strata
from cads.task import Task
from cads.training.result import TrainResult
from cads.training.run_state import OPTIMIZER, RIDER, RunSegment

log = logging.getLogger(__name__)

Granularity = Literal["source", "example"]
STAGE = "final model"


@dataclass
class Cads:
    """CADS as it trains: one budget covers everything. The final model and the probabilities come from one run.

    Raises:
        ConfigError: if an option is out of range.
    """

    granularity: Granularity = "example"
    """What has a probability of its own: each `source`, or each `example` beside its source."""
    train_on_target: bool = True
    """Train on the target too. If not, the target steers alone, as published: a model of it, for 4 % of the budget at
    most, tells sources apart, and the final model sees the pool only."""

    method: ClassVar[str] = "cads"
    granularities: ClassVar[tuple[str, ...]] = get_args(Granularity)

    def __post_init__(self) -> None:
        if self.granularity not in self.granularities:
            raise ConfigError(f"granularity = {self.granularity!r}: choose from {list(self.granularities)}")

    def constants(self, task: Task) -> OnlineConstants:
        """The constants of a run on a task."""
        return PRETRAINED if task.pretrained else FROM_SCRATCH

    def plan(self, task: Task, budget: Budget) -> PlannedLedger:
        """What `select` would charge to "select": the probes. All else is the training itself."""
        self._check(task)
        costs = PlannedInnerLoop(task, budget.flops(task))
        check_step(task, costs.ledger.left)
        opening = opening_of(costs, self.constants(task), costs.ledger.left, on_target=self.train_on_target)
        for stage in opening.stages():
            costs.charge(stage)
        return costs.ledger

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Train the final model, and learn what to train on; see `cads.selector.Selector`.

        Returns:
            a Selection with the probabilities at the end of the run, and the run in `trained`.
        """
        self._check(task)
        check_step(task, budget.flops(task))
        run_ledger = Ledger(limit=budget.flops(task))
        run = _OnlineRun(self, InnerLoop(in_name_order(task), run_ledger, monitor or Monitor()), seed)
        try:
            fit = run.train()
        finally:
            ledger.merge(run_ledger)
        fields = {"method": self.method, "seed": seed, "budget": budget, "ledger": ledger, "config": asdict(self)}
        return replace(run.selection(fit, fields), pool_hash=task.pool.content_hash)

    def sharded(self, seed: int) -> ShardedScoring:
        """The probe file by file, and a sample by it; see `cads.selectors.online.sharded_probe`."""
        from cads.selectors.online.sharded_probe import ShardedProbe

        return ShardedProbe(self.method, asdict(self))

    def _check(self, task: Task) -> None:
        """Refuse a pool without sources if sources are what is chosen.

        Raises:
            DataError: with the remedy.
        """
        if self.granularity == "source" and task.pool.sources is None:
            raise DataError(
                f"the {task.pool.name} has no sources: name a source column, or use the method cads, "
                "whose granularity example needs none"
            )


class _OnlineRun:
    """One run: the target alone, a probe of the sources, then target and pool together."""

    def __init__(self, selector: Cads, inner: InnerLoop, seed: int) -> None:
        self._selector, self._inner, self._seed = selector, inner, seed
        self._task = task = inner.task
        self._constants = selector.constants(task)
        self._target_stream = balanced_stream(
            by_id(task.target), task.groups(task.target), derive(seed, "target order")
        )
        self._rider: OnlineRider | None = None

    def train(self) -> TrainResult:
        """The whole run."""
        task, inner, constants = self._task, self._inner, self._constants
        on_target = self._selector.train_on_target
        opening = opening_of(inner, constants, inner.ledger.left, on_target=on_target)
        probes = self._probes(opening)
        before = np.zeros(len(probes))
        if constants.drop and len(probes):
            before = inner.losses(task.model(self._model_seed), probes, stage=FIRST_PROBE)
        fit, steering = None, None
        if on_target:
            probing = reading_flops(task.costs.forward, task.pool, probes) if len(probes) else 0.0
            horizon = inner.ledger.left - probing
            fit = self._train_on_target(opening.first, horizon)
            if fit is not None and float(fit.flops[-1]) + self._step_flops > horizon:
                return fit
        elif len(probes):
            steering = inner.fit_target(opening.theta, seed=derive(self._seed, "theta"), stage="theta")
        strata = Strata.of(task)
        excess = SourceExcess(strata.n_sources, strata.n_groups, MEMORY)
        if len(probes):
            model = steering or (task.model(self._model_seed) if fit is None else fit.models[0])
            signal = inner.losses(model, probes, stage=PROBE) - before
            excess.add(signal, strata.sources[probes], strata.groups[probes], np.ones(len(probes)))
        if not on_target:
            horizon = inner.ledger.left
        return self._train_on_both(strata, excess, fit, horizon, by_source=bool(len(probes)))

    def selection(self, fit: TrainResult, fields: dict[str, Any]) -> Selection:
        """What was trained on, and the finished run."""
        pool, rider = self._task.pool, self._rider
        assert fit.state is not None
        fields = {**fields, "trained": finished(fit.state)}
        if rider is None:
            none = np.zeros(len(pool), dtype=bool)
            notes = {"course": "the budget bought the target alone"}
            return Selection.from_pool(pool, selected=none, target_fraction=1.0, notes=notes, **fields)
        probability = rider.probabilities()
        rider.history.finish(pool, probability, self._task.describe)
        shares = rider.source_weights.tolist() if pool.sources is not None else []
        return Selection.from_pool(
            pool,
            selected=np.ones(len(pool), dtype=bool),
            score=probability,
            probability=probability,
            weighted=True,
            source_probability=dict(zip(pool.source_names, shares, strict=False)),
            target_fraction=min(rider.target_share, self._constants.most_target),
            notes={"course": rider.history.to_json()},
            **fields,
        )

    @property
    def _model_seed(self) -> int:
        return derive(self._seed, "final model")

    @property
    def _step_flops(self) -> float:
        """A mean step on the target."""
        batch_size = self._task.recipe.batch_size
        return batch_size * self._task.costs.per_usage(self._task.target, batch_size)

    def _probes(self, opening: Opening) -> np.ndarray:
        """Positions whose losses tell sources apart; empty if there is nothing to tell, or no model that can."""
        if not opening.per_source:
            return np.empty(0, dtype=np.int64)
        return np.concatenate(draw_by_source(self._task.pool, opening.per_source, derive(self._seed, "probe")))

    def _train_on_target(self, first: float, horizon: float) -> TrainResult | None:
        """The first phase of `first` FLOPs; None without one. If little more is affordable, it takes everything."""
        if not first:
            return None
        self._inner.monitor.status(f"target first: {len(self._task.target):,} examples")
        flops = horizon if first + self._step_flops > horizon else first
        draws = BatchStream(
            self._task.pool,
            [],
            self._task.recipe.batch_size,
            target=self._task.target,
            target_fraction=1.0,
            target_stream=self._target_stream,
            seed=derive(self._seed, "target order"),
        )
        return self._fit(draws, flops, RunSegment(horizon=horizon, keep=True))

    def _train_on_both(
        self, strata: Strata, excess: SourceExcess, fit: TrainResult | None, horizon: float, *, by_source: bool
    ) -> TrainResult:
        task, batch_size = self._task, self._task.recipe.batch_size
        spent, steps = (0.0, 0) if fit is None else (float(fit.flops[-1]), len(fit.losses))
        usage = task.costs.per_usage(task.pool, batch_size)
        guess = None if self._selector.granularity == "source" else task.guess_loss
        sizes = np.bincount(strata.sources, minlength=strata.n_sources)
        n_steps = int((horizon - spent) / usage / batch_size)
        names, monitor = task.pool.source_names, self._inner.monitor
        history = PolicyHistory(monitor, names, sizes, strata.group_shares, n_steps, steps)
        self._rider = OnlineRider(
            task.pool,
            task.target,
            strata,
            target_stream=self._target_stream,
            target_start=steps * batch_size,
            excess=excess,
            odds=None if guess is None else LabelOdds(strata.n_sources, guess, MEMORY),
            by_source=by_source,
            on_target=self._selector.train_on_target,
            batch_size=batch_size,
            workers=task.recipe.workers,
            constants=self._constants,
            history=history,
            seed=derive(self._seed, "batches"),
        )
        end = horizon
        if self._constants.stop_passes is not None:
            n_distinct = self._rider.n_effective + (len(task.target) if self._selector.train_on_target else 0)
            end = min(horizon, spent + self._constants.stop_passes * n_distinct * usage)
        planned = horizon if end < horizon else None
        start = None if fit is None else fit.state
        return self._fit(self._rider, end, RunSegment(start=start, horizon=end, keep=True, planned=planned))

    def _fit(self, draws: BatchStream, flops: float, segment: RunSegment) -> TrainResult:
        model, seed = self._task.model(self._model_seed), derive(self._seed, "training")
        return self._inner.trainer.fit(model, draws, flops, seed=seed, phase=TRAIN, stage=STAGE, segment=segment)


def finished(state: State) -> State:
    """The end of a run, from which nothing is trained further: its weights, without the state of the optimizer."""
    tensors = {name: x for name, x in state.tensors.items() if not name.startswith((OPTIMIZER, RIDER))}
    return State(state.values, tensors)
