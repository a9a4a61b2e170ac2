"""Train a model, or K replicas of one, until the next step would exceed the budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from cads.data.training_batches import BatchStream
from cads.errors import NonFiniteError
from cads.runtime.checkpoint import State
from cads.runtime.journal import replay_or_run
from cads.runtime.processes import active_group
from cads.training.learners import SingleLearner, StackedReplicas, can_stack
from cads.training.loop import TrainingLoop, TrainingRun
from cads.training.replica_parallel import train_one_per_rank, train_stacked_chunks
from cads.training.result import TrainResult, stack_results
from cads.training.run_state import FULL_RUN, RunSegment, TrainState


class Trainer(TrainingLoop):
    """Trains on a task within budgets and charges a ledger for it.

    Several processes divide each batch of one model, or divide the replicas, each of which trains on one process. All
    processes end with all models and the same ledger. With `sharding` they divide the model too, and train replicas one
    after another.

    Args:
        task: whose model, losses, recipe and costs are used.
        ledger: charged for every step.
        monitor: shows progress and records curves.
    """

    def fit(
        self,
        model: nn.Module,
        draws: BatchStream,
        flops: float,
        *,
        seed: int,
        phase: str,
        stage: str,
        segment: RunSegment = FULL_RUN,
    ) -> TrainResult:
        """Train `model` in place on `draws` for at most `flops`, and at most the FLOPs that the ledger has left.

        Args:
            draws: the batches; a `cads.training.rider.Rider` decides on them while the run goes on.
            flops: spent by the whole run at its end, including earlier segments, which are not charged again.
            segment: of the run. A later segment continues with the step, the weights and the optimizer of the one
                before it, so that two segments with the same draws equal one run.

        Raises:
            BudgetError: if not even one step is affordable.
            CheckpointError: if the state to resume from is of another model.
            ConfigError: if there is nothing to train, or the model must be sharded and cannot be.
            DataError: if a batch has no answer token.
            NonFiniteError: if the loss or the gradient becomes NaN or infinite, before the update.
        """
        learner = SingleLearner(self.task, model)
        return self._run(self.prepare(learner, draws, flops, seed, phase, stage, segment))

    def restore(self, model: nn.Module, end: State, seconds: float) -> TrainResult:
        """Put the weights at the end of a finished run into `model`; nothing is trained or charged.

        Args:
            end: of the run of one model with the same frozen weights.
            seconds: that the run took, if known; otherwise 0.

        Raises:
            CheckpointError: if it is the state of another model.
            NonFiniteError: if that run met a loss or gradient that is NaN or infinite.
        """
        train_state = TrainState(SingleLearner(self.task, model), 1, self.accelerator.scaler)
        train_state.learner.to(self.accelerator.device).train()
        train_state.restore(end.detached(), None)
        if train_state.failure is not None:
            raise NonFiniteError(**train_state.failure)
        losses, spent = np.stack(train_state.losses), np.array(train_state.spent)
        return TrainResult([model], losses, spent, train_state.diverged, seconds, train_state.skipped)

    def fit_replicas(
        self,
        models: Sequence[nn.Module],
        draws: BatchStream,
        flops: float,
        *,
        seed: int,
        phase: str,
        stage: str,
        segment: RunSegment = FULL_RUN,
    ) -> TrainResult:
        """Train K models, each on its own stream of `draws`, each for at most `flops`.

        Dense models train as one batched model (`torch.func`). Other models train one after another, as do all models
        if the loss is scaled. Both ways give the same losses to 1e-5. A replica that diverges is marked, and does not
        affect the others.

        Args:
            segment: the first one of each run, which sets the horizon of its learning rate.
        """
        flops = min(flops, self.ledger.left / len(models))
        if self.batches(models[0], len(models)):
            run = self.prepare(StackedReplicas(self.task, models), draws, flops, seed, phase, stage, segment)
            return train_stacked_chunks(self, models, run) if self._distributed else self._run(run)
        fits = self.fit_one_by_one(models, draws, flops, seed=seed, phase=phase, stage=stage, segment=segment)
        return stack_results(list(models), fits)

    def fit_one_by_one(
        self,
        models: Sequence[nn.Module],
        draws: BatchStream,
        flops: float,
        *,
        seed: int,
        phase: str,
        stage: str,
        segment: RunSegment = FULL_RUN,
    ) -> list[TrainResult | None]:
        """Train K models for at most `flops` each, one after another, or one on each process; see `fit_replicas`.

        Returns:
            the result of each; None where it met a loss that is not finite.
        """
        replica_draws = [draws.for_streams(stream) for stream in draws.streams]
        if self._distributed:
            runs = [
                self.prepare(SingleLearner(self.task, model), draws_of_one, flops, seed, phase, stage, segment)
                for model, draws_of_one in zip(models, replica_draws, strict=True)
            ]
            return train_one_per_rank(self, runs)
        fits: list[TrainResult | None] = []
        for model, draws_of_one in zip(models, replica_draws, strict=True):
            try:
                fits.append(self.fit(model, draws_of_one, flops, seed=seed, phase=phase, stage=stage, segment=segment))
            except NonFiniteError:
                fits.append(None)
        return fits

    def batches(self, model: nn.Module, count: int) -> bool:
        """Whether `fit_replicas` trains `count` replicas of `model` as one batched model."""
        # Not with a scaler: it would skip the update of all replicas if one of them overflows.
        one_by_one = self.accelerator.scaler is not None or self._skips or self._shards
        mode = self.task.recipe.replicas
        return mode == "batched" or (mode == "auto" and count > 1 and can_stack(model) and not one_by_one)

    @property
    def _distributed(self) -> bool:
        """Whether several processes divide the replicas."""
        return active_group().size > 1 and not self._shards

    def _run(self, run: TrainingRun) -> TrainResult:
        state = replay_or_run("training", run.journal_key, self.ledger, lambda progress: self._train(run, progress))
        return self.finish(run, state)
