"""A run of `cads` whose steps another trainer takes: it draws each of them before, and learns from its losses after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from cads.accounting.budget import Budget, check_step
from cads.accounting.ledger import EVALUATE, SELECT, TRAIN, Ledger
from cads.data.window_loader import Rows
from cads.errors import BudgetError, CheckpointError, ConfigError
from cads.integrations.joint_examples import JointExamples, StepPrice
from cads.monitor import Monitor
from cads.runtime.checkpoint import State
from cads.scoring.pool_scores import reading_flops
from cads.search.inner_costs import InnerLoopCosts
from cads.search.source_order import in_name_order
from cads.seeding import derive
from cads.selection import Selection
from cads.selectors.online.likeness import LIKENESS
from cads.selectors.online.opening import FIRST_PROBE, PROBE
from cads.selectors.online.rider import OnlineRider, steps_drawn_together
from cads.selectors.online.selector import STAGE, Cads
from cads.task import Task
from cads.training.loop import segment_rate
from cads.training.run_state import RIDER

Probe = Callable[[np.ndarray, str], np.ndarray]
"""(positions in the pool, stage) -> losses of these examples under the model in training, nats; charged to the stage.
"""
BEFORE = "losses before"


@dataclass(frozen=True)
class DrawnStep:
    """The next step of a run.

    Attributes:
        numbers: of its examples among pool and target (`JointExamples`), int64, shape (B,).
        n_pool: how many of them are of the pool; they come first.
        price: of its examples. flops: of the step, the update included.
        rate: the learning rate by the recipe.
        log_odds: see `Batch.log_odds`, float32, shape (B,); None if all examples count alike.
    """

    numbers: np.ndarray
    n_pool: int
    price: StepPrice
    flops: float
    rate: float
    log_odds: np.ndarray | None


class SteppedRun:
    """One run of the method `cads`: the target alone, a probe of the sources, then target and pool together.

    It does what `cads train` does, step by step: `begin` or `restore`, then `take` before and `finish` after each step,
    until `over`.

    Args:
        task: data, costs and recipe.
        selector: with its options.
        budget: of the whole run. seed: of everything that is drawn.
        monitor: shows the course of the probabilities.

    Attributes:
        ledger: of the run. spent: FLOPs of training so far. steps: taken so far.

    Raises:
        BudgetError: if the budget does not buy one step.
        DataError: if sources are chosen and the pool has none.
    """

    def __init__(self, task: Task, selector: Cads, budget: Budget, *, seed: int, monitor: Monitor) -> None:
        selector.check(task)
        check_step(task, budget.flops(task))
        self._given, self.task, self._selector = task, in_name_order(task), selector
        self.budget, self.ledger = budget, Ledger(limit=budget.flops(task))
        self.examples = JointExamples(self.task)
        self.draws = selector.draws(self.task, monitor, seed)
        costs = InnerLoopCosts(self.task, self.ledger)
        self._opening = selector.opening(costs)
        self._probes = self.draws.probes(self._opening)
        self._target_draws = self.draws.target_draws()
        self.steps, self.spent = 0, 0.0
        self._horizon = self._limit = self._end = self._spent_on_target = 0.0
        self._steps_on_target = 0
        self._before = np.zeros(len(self._probes))
        self._next: tuple[Rows, StepPrice, float] | None = None
        self._probe: Probe | None = None
        self._micro = self.batch_size

    @property
    def batch_size(self) -> int:
        """Examples in a step."""
        return self.task.recipe.batch_size

    @property
    def window(self) -> int:
        """Number of steps that are drawn together."""
        return steps_drawn_together(self.task.pool, self.task.target, self.batch_size)

    @property
    def most_steps(self) -> int:
        """Steps that the budget buys if all examples cost as little as the cheapest."""
        cheapest = self.batch_size * self.examples.cheapest + self.task.costs.optimizer_step
        return int(self.budget.flops(self.task) / cheapest * (1 + 1e-9))

    @property
    def weighs(self) -> bool:
        """Whether examples are weighed by the odds that their labels are right."""
        return self._selector.granularity == "example" and self.task.guess_loss is not None

    @property
    def over(self) -> bool:
        """Whether no further step is affordable."""
        return self._next is None

    def begin(self, probe: Probe, micro_size: int) -> None:
        """Begin the run.

        Args:
            probe: measures losses. micro_size: examples that are padded together.

        Raises:
            BudgetError: if not one step is affordable.
            ConfigError: if it has begun before.
        """
        if self.ledger.entries:
            raise ConfigError("this selection has been trained with: make a new one, or resume from a checkpoint")
        self._probe, self._micro = probe, micro_size
        if self._opening.comparing:
            self.ledger.charge(SELECT, LIKENESS, self._opening.comparing)
            self.draws.compare(self._opening)
        if self.draws.constants.drop and len(self._probes):
            self._before = probe(self._probes, FIRST_PROBE)
        probing = 0.0
        if len(self._probes):
            probing = reading_flops(self.task.costs.forward, self.task.pool, self._probes)
        self._horizon = self.ledger.left - probing
        self._limit = min(self.draws.target_flops(self._opening, self._horizon), self.ledger.left)
        self._prepare()

    def upcoming(self) -> list[np.ndarray]:
        """Numbers of the examples of the next steps, as far as they are known; shape (B,) each.

        Those beyond the budget are among them: `over` says when to stop.
        """
        if self._next is None:
            return []
        if self._rider is not None:
            return [self.examples.numbers(rows) for rows in self._rider.upcoming]
        ahead, spent = [], self.spent
        # What comes after the first phase depends on its losses.
        for step in range(self.steps, self.steps + self.window - self.steps % self.window):
            numbers = self.examples.numbers(self._target_draws.rows(step))
            spent += self.examples.price(numbers, self._micro).usage + self.task.costs.optimizer_step
            if spent > self._limit:
                break
            ahead.append(numbers)
        return ahead

    def take(self) -> DrawnStep:
        """The next step, which is then to be trained on."""
        assert self._next is not None, "the run is over"
        rows, price, flops = self._next
        log_odds = None
        if self._rider is not None:
            self._rider.draw()
            log_odds = self._rider.log_odds()
        return DrawnStep(self.examples.numbers(rows), len(rows[0]), price, flops, self._rate(flops), log_odds)

    def dropout_seed(self, rank: int) -> int:
        """The seed of the dropout of the next step in the process of this rank: that of `cads train`."""
        return derive(self.draws.training_seed, self.steps, *(("process", rank) if rank else ()))

    def finish(self, step: DrawnStep, losses: np.ndarray, seconds: float) -> None:
        """Charge for a step, learn from the losses of its examples (nats, shape (B,)), and draw the next one."""
        price = step.price
        self.ledger.charge(
            TRAIN,
            STAGE,
            step.flops,
            usages=len(step.numbers),
            tokens=price.tokens,
            answer_tokens=price.answer_tokens,
            seconds=seconds,
        )
        self.spent += step.flops
        self.steps += 1
        if self._rider is not None:
            self._rider.observe(losses)
        self._prepare()

    def charge_forward(self, flops: float, stage: str) -> None:
        """Charge for a forward pass that measures and teaches nothing; it is not part of the budget."""
        self.ledger.charge(EVALUATE, stage, flops)

    def selection(self) -> Selection:
        """What was trained on so far. It holds no model: that is in the trainer."""
        selection = self.draws.selection(
            method=self._selector.method,
            budget=self.budget,
            ledger=self.ledger,
            config=asdict(self._selector),
            trained=None,
        )
        selection.pool_hash = self._given.pool.content_hash
        return selection

    def state(self) -> State:
        """All that a later process needs to go on after the last step that was finished."""
        values: dict[str, Any] = {
            "fingerprint": self.fingerprint(),
            "ledger": self.ledger.to_json(),
            "spent": self.spent,
            "steps": self.steps,
            "horizon": self._horizon,
            "limit": self._limit,
            "end": self._end,
            "spent on target": self._spent_on_target,
            "steps on target": self._steps_on_target,
        }
        tensors = {BEFORE: torch.from_numpy(self._before)}
        if self._rider is not None:
            tensors |= {RIDER + name: x for name, x in self._rider.state().items()}
        return State(values, tensors)

    def restore(self, state: State, probe: Probe, micro_size: int) -> None:
        """Go on from `state`.

        Raises:
            CheckpointError: if it is the state of another run, or damaged.
        """
        if state.values.get("fingerprint") != self.fingerprint():
            raise CheckpointError(
                "the checkpoint is of another selection: data, budget, seed, recipe or options differ; resume with "
                "those of the run that wrote it, or begin anew"
            )
        self.draws.rider = None
        try:
            self._restore(state)
        except (KeyError, TypeError, ValueError, BudgetError) as error:
            raise CheckpointError(f"the state of the selection is corrupt: {type(error).__name__}: {error}") from error
        self._probe, self._micro = probe, micro_size
        self._prepare()

    def _restore(self, state: State) -> None:
        values, tensors = state.values, state.tensors
        self.spent, self.steps = float(values["spent"]), int(values["steps"])
        self._horizon, self._limit, self._end = (float(values[name]) for name in ("horizon", "limit", "end"))
        self._spent_on_target, self._steps_on_target = float(values["spent on target"]), int(values["steps on target"])
        self._before = tensors[BEFORE].numpy().reshape(self._before.shape).copy()
        self.ledger.entries.clear()
        self.ledger.merge(Ledger.from_json(values["ledger"]))
        rider_tensors = {n.removeprefix(RIDER): x for n, x in tensors.items() if n.startswith(RIDER)}
        if self._opening.comparing:
            self.draws.compare(self._opening)
        if rider_tensors:
            nothing = np.empty(0, dtype=np.int64)
            rider, _ = self._begin_both(np.empty(0), nothing)
            rider.restore(rider_tensors)

    def fingerprint(self) -> str:
        """A hash of all that the run depends on, beside the losses."""
        recipe = self.task.recipe.result_fields()
        parts = [self.task.identity, str(self.budget), self.ledger.limit, asdict(self._selector), recipe]
        seeds = [self.draws.model_seed, self.draws.training_seed]
        return hashlib.sha256(json.dumps([*parts, seeds], sort_keys=True, default=str).encode()).hexdigest()

    @property
    def _rider(self) -> OnlineRider | None:
        return self.draws.rider

    def _rate(self, flops: float) -> float:
        """The learning rate in the middle of a step."""
        spent, recipe = self.spent + flops / 2, self.task.recipe
        if self._rider is None:
            return segment_rate(recipe, spent, horizon=self._horizon, planned=None, before=0.0)
        planned = self._horizon if self._end < self._horizon else None
        return segment_rate(recipe, spent, horizon=self._end, planned=planned, before=self._spent_on_target)

    def _prepare(self) -> None:
        """Find the next step, if one is affordable."""
        if self._rider is None:
            if self._limit and self._affords(self._target_draws.rows(self.steps)):
                return
            if self._limit and (self._limit >= self._horizon or not self.steps):
                self._next = None
            else:
                self._leave_target()
        if self._rider is not None and not self._affords(self._rider.upcoming[0]):
            self._rider.learn()
        if self._next is None and not self.steps:
            raise BudgetError(
                f"{self._limit:.4g} FLOPs do not buy one step of {self.batch_size} examples: raise the budget or "
                "lower batch_size"
            )

    def _affords(self, rows: Rows) -> bool:
        """Whether a step on `rows` is affordable; then it is the next one."""
        price = self.examples.price(self.examples.numbers(rows), self._micro)
        flops = price.usage + self.task.costs.optimizer_step
        affordable = self.spent + flops <= self._limit
        self._next = (rows, price, flops) if affordable else None
        return affordable

    def _leave_target(self) -> None:
        """Probe the sources, and draw target and pool together from now on."""
        signal = self._before
        if len(self._probes):
            assert self._probe is not None
            signal = self._probe(self._probes, PROBE) - self._before
        self._spent_on_target, self._steps_on_target = self.spent, self.steps
        _, self._end = self._begin_both(signal, self._probes)
        self.draws.say_end(self._end, self._horizon)
        self._limit = min(self._end, self.spent + self.ledger.left)

    def _begin_both(self, signal: np.ndarray, probes: np.ndarray) -> tuple[OnlineRider, float]:
        return self.draws.begin_both(
            self.draws.excess(signal, probes),
            spent=self._spent_on_target,
            steps=self._steps_on_target,
            horizon=self._horizon,
            by_source=bool(len(self._probes)),
            workers=None,
        )
