"""What a run of `cads` draws, and what comes of it; who takes its steps is left open."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.data.balanced_stream import balanced_stream
from cads.data.draws import draw_by_source
from cads.data.token_batches import by_id
from cads.data.training_batches import BatchStream
from cads.monitor import Monitor
from cads.policies.label_odds import LabelOdds
from cads.runtime.checkpoint import State
from cads.seeding import derive
from cads.selection import Selection
from cads.selectors.online.history import PolicyHistory
from cads.selectors.online.likeness import NEAR, likeness
from cads.selectors.online.opening import Opening
from cads.selectors.online.rider import MEMORY, OnlineRider
from cads.selectors.online.schedule import MixedPart, OnlineConstants, TargetMixture, mixture
from cads.selectors.online.signal import SourceExcess
from cads.selectors.online.strata import Strata, counted_once
from cads.task import Task

log = logging.getLogger(__name__)

EARLY = 0.995
"""Share of the budget below which the end of a run is said to be early."""


class OnlineRun:
    """The draws of one run: of the target alone, of examples that are probed, then of target and pool together.

    Args:
        task: whose examples are drawn, with its sources in the order of their names.
        constants: of the run.
        monitor: shows the course of the probabilities.
        seed: of all draws.
        by_example: whether each example has a probability of its own, beside its source.
        on_target: whether the target is trained on.

    Attributes:
        rider: draws target and pool together; None before `begin_both`.
        end: why the run ends before its budget does, in words; "" if it does not.
    """

    def __init__(
        self,
        task: Task,
        constants: OnlineConstants,
        monitor: Monitor,
        seed: int,
        *,
        by_example: bool,
        on_target: bool,
    ) -> None:
        self.task, self.constants, self.monitor = task, constants, monitor
        self.rider: OnlineRider | None = None
        self.end = ""
        self._seed, self._by_example, self._on_target = seed, by_example, on_target
        self._strata = Strata.of(task)
        self._likeness_weights = self._strata.likeness_weights
        self._target_stream = balanced_stream(
            by_id(task.target), task.groups(task.target), derive(seed, "target order")
        )

    @property
    def model_seed(self) -> int:
        """The seed of the initial weights."""
        return derive(self._seed, "final model")

    @property
    def training_seed(self) -> int:
        """The seed of the training: with the number of a step, of its dropout."""
        return derive(self._seed, "training")

    @property
    def step_flops(self) -> float:
        """A mean step on the target."""
        batch_size = self.task.recipe.batch_size
        return batch_size * self.task.costs.per_usage(self.task.target, batch_size)

    def probes(self, opening: Opening) -> np.ndarray:
        """Positions whose losses tell sources apart; empty if there is nothing to tell, or no model that can."""
        if not opening.per_source:
            return np.empty(0, dtype=np.int64)
        return np.concatenate(draw_by_source(self.task.pool, opening.per_source, derive(self._seed, "probe")))

    def target_flops(self, opening: Opening, horizon: float) -> float:
        """FLOPs of the first phase, on the target alone; if little more is affordable, it takes all of `horizon`."""
        if opening.mixed:
            return horizon if self.mixture(horizon).target_share == 1 else 0.0
        return horizon if opening.first + self.step_flops > horizon else opening.first

    def target_draws(self) -> BatchStream:
        """The batches of the first phase."""
        return BatchStream(
            self.task.pool,
            [],
            self.task.recipe.batch_size,
            target=self.task.target,
            target_fraction=1.0,
            target_stream=self._target_stream,
            seed=derive(self._seed, "target order"),
        )

    def compare(self, opening: Opening) -> None:
        """Tell examples of the pool apart by how much they look like the target."""
        self.monitor.status("comparing pool and target")
        alike = likeness(self.task, self._strata, self._seed, near=opening.near)
        if alike is None:
            return
        self._strata = self._strata.told_apart(alike.codes, alike.weights)
        for group, weight in enumerate(alike.weights.tolist()):
            self.monitor.scalar(f"likeness_weight/{group}", weight, 0)

    def mixture(self, flops: float) -> TargetMixture:
        """How target and pool are mixed from the start in a run of `flops`, after `compare`."""
        task, strata = self.task, self._strata
        counted = counted_once(task.pool) * strata.likeness_weights[strata.likeness]
        usages = task.costs.usages(task.pool) + task.costs.optimizer_step / task.recipe.batch_size
        near = strata.likeness >= NEAR
        return mixture(
            self.constants,
            target=MixedPart(len(task.target), task.costs.per_usage(task.target, task.recipe.batch_size)),
            near=MixedPart.of(counted[near], usages[near]),
            rest=MixedPart.of(counted[~near], usages[~near]),
            flops=flops,
        )

    def excess(self, signal: np.ndarray, probes: np.ndarray) -> SourceExcess:
        """The signal of the sources after the losses of `probes` (positions), or their fall: nats, shape (n,)."""
        strata = self._strata
        excess = SourceExcess(strata.n_sources, strata.n_groups, MEMORY)
        if len(probes):
            excess.add(signal, strata.sources[probes], strata.groups[probes], np.ones(len(probes)))
        return excess

    def begin_both(
        self,
        excess: SourceExcess,
        *,
        spent: float,
        steps: int,
        horizon: float,
        by_source: bool,
        workers: int | None,
    ) -> tuple[OnlineRider, float]:
        """Draw target and pool together from now on.

        Args:
            excess: the signal so far. spent: FLOPs so far. steps: so far. horizon: FLOPs of the whole run.
            by_source: whether sources get weights of their own. workers: see `OnlineRider`.

        Returns:
            the rider, and the FLOPs at which the run ends.
        """
        task, batch_size, strata = self.task, self.task.recipe.batch_size, self._strata
        usage = task.costs.per_usage(task.pool, batch_size)
        guess = task.guess_loss if self._by_example else None
        sizes = np.bincount(strata.sources, minlength=strata.n_sources)
        n_steps = int((horizon - spent) / usage / batch_size)
        share, end = None, horizon
        if self.constants.mixed_lead and self._on_target and not steps:
            mixed = self.mixture(horizon - spent)
            share, end = mixed.target_share, min(horizon, spent + mixed.flops)
            # Beside likeness nothing decides how often an example comes, not even the length of the target's answers.
            weights = strata.likeness_weights.copy()
            if share < 1:
                weights[:NEAR] *= mixed.rest
            strata = strata.told_apart(strata.likeness, weights / weights.max())
            strata = strata.as_they_come(counted_once(task.pool))
        self._likeness_weights = strata.likeness_weights
        history = PolicyHistory(self.monitor, task.pool.source_names, sizes, strata.group_shares, n_steps, steps)
        self.rider = OnlineRider(
            task.pool,
            task.target,
            strata,
            target_stream=self._target_stream,
            target_start=steps * batch_size,
            excess=excess,
            odds=None if guess is None else LabelOdds(strata.n_sources, guess, MEMORY),
            by_source=by_source,
            on_target=self._on_target,
            batch_size=batch_size,
            workers=workers,
            constants=self.constants,
            history=history,
            seed=derive(self._seed, "batches"),
            n_rows=(horizon - spent) / usage,
            fixed_share=share,
        )
        passes = self.constants.stop_passes
        what = "the target and its kind" if share is not None else "target and what of the pool is drawn"
        if passes is not None and share is None:
            once = self.rider.n_effective * usage
            if self._on_target:
                once += len(task.target) * task.costs.per_usage(task.target, batch_size)
            end = min(horizon, spent + passes * once)
        if passes is not None and end < EARLY * horizon:
            self.end = (
                f"training ended after {passes:g} passes over {what}: "
                "a pretrained model learns by heart what comes more often"
            )
        return self.rider, end

    def say_end(self, end: float, horizon: float) -> None:
        """Say that a run will end at `end` FLOPs of `horizon`, if that is early."""
        if self.end:
            log.warning("%s (at %.0f %% of the budget)", self.end.replace("ended", "ends"), 100 * end / horizon)

    def selection(
        self, *, method: str, budget: Budget, ledger: Ledger, config: dict[str, Any], trained: State | None
    ) -> Selection:
        """What was trained on, and the finished run, if it is known."""
        pool, rider = self.task.pool, self.rider
        fields: dict[str, Any] = {
            "method": method,
            "seed": self._seed,
            "budget": budget,
            "ledger": ledger,
            "config": config,
            "trained": trained,
        }
        if rider is None:
            none = np.zeros(len(pool), dtype=bool)
            notes = {"course": "the budget bought the target alone"}
            return Selection.from_pool(pool, selected=none, target_fraction=1.0, notes=notes, **fields)
        probability = rider.probabilities()
        rider.history.finish(pool, probability, self.task.describe)
        shares = rider.source_weights.tolist() if pool.sources is not None else []
        return Selection.from_pool(
            pool,
            selected=self._likeness_weights[self._strata.likeness] > 0,
            score=probability,
            probability=probability,
            weighted=True,
            source_probability=dict(zip(pool.source_names, shares, strict=False)),
            target_fraction=rider.target_share,
            notes=self._notes() | {"course": rider.history.to_json()},
            **fields,
        )

    def _notes(self) -> dict[str, Any]:
        """Why the run ended early; and of each group by likeness to the target its share of the pool and weight."""
        weights, notes = self._likeness_weights, {"end": self.end} if self.end else {}
        if len(weights) < 2:
            return notes
        shares = np.bincount(self._strata.likeness, minlength=len(weights)) / len(self.task.pool)
        told = {"shares": shares.round(4).tolist(), "weights": weights.round(4).tolist()}
        if len(weights) > NEAR:
            told["near"] = int(np.count_nonzero(self._strata.likeness == NEAR))
        return notes | {"likeness": told}
