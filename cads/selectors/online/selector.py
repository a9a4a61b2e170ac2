"""CADS as it trains: the outer loop rides on the training of the final model; see `docs/online.md`.

    min_s  L_val(theta) + alpha E_m [ L_tr(theta; m) - l*_C(m) ],   m ~ p(.; s)

theta is trained on batches of target and pool, the pool's examples drawn by s. The Rao-Blackwellised gradient in s
needs the losses of the examples of a step, which the step computes anyway. So s moves every few steps, and nothing is
trained twice: one run, one budget, which covers everything.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import TRAIN, Ledger, PlannedLedger
from cads.data.token_batches import device_type
from cads.data.training_batches import BatchStream
from cads.errors import ConfigError, DataError
from cads.monitor import Monitor
from cads.runtime.checkpoint import State
from cads.scoring.pool_scores import reading_flops
from cads.scoring.sharded import ShardedScoring
from cads.search.inner_costs import InnerLoopCosts, PlannedInnerLoop
from cads.search.inner_runs import InnerLoop
from cads.search.source_order import in_name_order
from cads.seeding import derive
from cads.selection import Selection
from cads.selectors.online.likeness import LIKENESS
from cads.selectors.online.opening import FIRST_PROBE, PROBE, Opening, opening_of
from cads.selectors.online.run import OnlineRun
from cads.selectors.online.schedule import FROM_SCRATCH, PRETRAINED, MixedPart, OnlineConstants, mixture
from cads.selectors.online.signal import SourceExcess
from cads.selectors.online.strata import source_count
from cads.task import Task
from cads.training.device_settings import loading_workers
from cads.training.result import TrainResult
from cads.training.run_state import OPTIMIZER, RIDER, RunSegment

log = logging.getLogger(__name__)

Granularity = Literal["source", "group", "example"]
STAGE = "final model"
TARGET_ALONE = "the budget buys the target alone"
TARGET_AND_NEAR = "the budget buys the target, and what of the pool is of its kind"


@dataclass
class Cads:
    """CADS as it trains: one budget covers everything. The final model and the probabilities come from one run.

    Raises:
        ConfigError: if an option is out of range.
    """

    granularity: Granularity = "example"
    """What has a probability of its own: each `source`, each `group` of a source whose examples are alike, or each
    `example`. Without sources, `example` has groups too."""
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
        self.check(task)
        costs = PlannedInnerLoop(task, budget.flops(task))
        check_step(task, costs.ledger.left)
        opening = self.opening(costs)
        for stage in opening.stages():
            costs.charge(stage)
        costs.ledger.rides = True
        left, constants, size = costs.ledger.left, self.constants(task), task.recipe.batch_size
        target, pool = (MixedPart(len(part), task.costs.per_usage(part, size)) for part in (task.target, task.pool))
        if opening.first and opening.first + size * target.usage > left:
            costs.ledger.kept, costs.ledger.note = 0, TARGET_ALONE
        if opening.mixed and mixture(constants, target=target, near=MixedPart(0, 0.0), rest=pool, flops=left).rest == 0:
            costs.ledger.kept, costs.ledger.note = (None, TARGET_AND_NEAR) if opening.near else (0, TARGET_ALONE)
        passes = constants.stop_passes
        if passes is not None:
            once = pool.flops + target.flops * self.train_on_target
            costs.ledger.most_training = opening.first + passes * once
            if opening.mixed and not opening.near:
                costs.ledger.most_training = mixture(
                    constants, target=target, near=MixedPart(0, 0.0), rest=pool, flops=costs.ledger.most_training
                ).flops
            costs.ledger.end = f"as pretrained models are trained for {passes:g} passes at most"
        return costs.ledger

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Train the final model, and learn what to train on; see `cads.selector.Selector`.

        Returns:
            a Selection with the probabilities at the end of the run, and the run in `trained`.
        """
        self.check(task)
        if (
            self.granularity == "example"
            and source_count(task.pool) < 2
            and task.guess_loss is None
            and not task.descriptor_flops
        ):
            log.warning(
                "%s has neither sources nor classes, so that %s has nothing to weigh: it trains on all of target and "
                "pool alike. Name the sources of the pool, or use a ranking, such as loss, less or embedding",
                task.name,
                self.method,
            )
        check_step(task, budget.flops(task))
        run_ledger = Ledger(limit=budget.flops(task))
        run = _TrainedRun(self, InnerLoop(in_name_order(task), run_ledger, monitor or Monitor()), seed)
        try:
            fit = run.train()
        finally:
            ledger.merge(run_ledger)
        assert fit.state is not None
        selection = run.draws.selection(
            method=self.method, budget=budget, ledger=ledger, config=asdict(self), trained=finished(fit.state)
        )
        return replace(selection, pool_hash=task.pool.content_hash)

    def draws(self, task: Task, monitor: Monitor, seed: int) -> OnlineRun:
        """The draws of a run on a task with its sources in the order of their names."""
        by_example = self.granularity == "example"
        on_target, constants = self.train_on_target, self.constants(task)
        return OnlineRun(task, constants, monitor, seed, by_example=by_example, on_target=on_target)

    def opening(self, costs: InnerLoopCosts) -> Opening:
        """The opening of a run on what is left of a budget."""
        no_sources, divides = source_count(costs.task.pool) < 2, self.granularity != "source"
        by_likeness = self.granularity == "group" or (self.granularity == "example" and no_sources)
        constants, left, on_target = self.constants(costs.task), costs.ledger.left, self.train_on_target
        return opening_of(costs, constants, left, on_target=on_target, by_likeness=by_likeness, divides=divides)

    def sharded(self, seed: int) -> ShardedScoring:
        """The probe file by file, and a sample by it; see `cads.selectors.online.sharded_probe`."""
        from cads.selectors.online.sharded_probe import ShardedProbe

        return ShardedProbe(self.method, asdict(self))

    def check(self, task: Task) -> None:
        """Refuse a pool without sources if sources are what is chosen, and one that nothing divides into groups.

        Raises:
            DataError: with the remedy.
        """
        if self.granularity == "source" and task.pool.sources is None:
            raise DataError(
                f"the {task.pool.name} has no sources: name a source column, or use the method cads, "
                "whose granularity example needs none"
            )
        if self.granularity == "group" and not task.descriptor_flops:
            raise DataError(
                f"granularity = group: {task.name} has nothing that tells groups of examples apart (images and texts "
                "have); use granularity = example, or source with a source column"
            )


class _TrainedRun:
    """One run, trained by `cads.training.trainer`: the target alone, a probe of the sources, then target and pool."""

    def __init__(self, selector: Cads, inner: InnerLoop, seed: int) -> None:
        self._selector, self._inner, self._seed = selector, inner, seed
        self.draws = selector.draws(inner.task, inner.monitor, seed)

    def train(self) -> TrainResult:
        """The whole run."""
        inner, draws, constants = self._inner, self.draws, self.draws.constants
        task, on_target = inner.task, self._selector.train_on_target
        opening = self._selector.opening(inner)
        if opening.comparing:
            inner.learn(opening.comparing, LIKENESS)
            draws.compare(opening)
        probes = draws.probes(opening)
        before = np.zeros(len(probes))
        if constants.drop and len(probes):
            before = inner.losses(task.model(draws.model_seed), probes, stage=FIRST_PROBE)
        fit, steering = None, None
        if on_target:
            probing = reading_flops(task.costs.forward, task.pool, probes) if len(probes) else 0.0
            horizon = inner.ledger.left - probing
            alone = draws.target_flops(opening, horizon)
            fit = self._train_on_target(alone, horizon)
            if fit is not None and alone >= horizon:
                return fit
        elif len(probes):
            steering = inner.fit_target(opening.theta, seed=derive(self._seed, "theta"), stage="theta")
        signal = before
        if len(probes):
            model = steering or (task.model(draws.model_seed) if fit is None else fit.models[0])
            signal = inner.losses(model, probes, stage=PROBE) - before
        if not on_target:
            horizon = inner.ledger.left
        return self._train_on_both(draws.excess(signal, probes), fit, horizon, by_source=bool(len(probes)))

    def _train_on_target(self, flops: float, horizon: float) -> TrainResult | None:
        """The first phase of `flops`; None without one."""
        if not flops:
            return None
        self._inner.monitor.status(f"target first: {len(self._inner.task.target):,} examples")
        return self._fit(self.draws.target_draws(), flops, RunSegment(horizon=horizon, keep=True))

    def _train_on_both(
        self, excess: SourceExcess, fit: TrainResult | None, horizon: float, *, by_source: bool
    ) -> TrainResult:
        spent, steps = (0.0, 0) if fit is None else (float(fit.flops[-1]), len(fit.losses))
        workers = loading_workers(self._inner.task.recipe, device_type())
        rider, end = self.draws.begin_both(
            excess, spent=spent, steps=steps, horizon=horizon, by_source=by_source, workers=workers
        )
        self.draws.say_end(end, horizon)
        planned = horizon if end < horizon else None
        start = None if fit is None else fit.state
        fit = self._fit(rider, end, RunSegment(start=start, horizon=end, keep=True, planned=planned))
        rider.learn()
        return fit

    def _fit(self, draws: BatchStream, flops: float, segment: RunSegment) -> TrainResult:
        model, seed = self._inner.task.model(self.draws.model_seed), self.draws.training_seed
        return self._inner.trainer.fit(model, draws, flops, seed=seed, phase=TRAIN, stage=STAGE, segment=segment)


def finished(state: State) -> State:
    """The end of a run, from which nothing is trained further: its weights, without the state of the optimizer."""
    tensors = {name: x for name, x in state.tensors.items() if not name.startswith((OPTIMIZER, RIDER))}
    return State(state.values, tensors)
