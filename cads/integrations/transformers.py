"""The method `cads` inside `transformers.Trainer` and TRL's `SFTTrainer`: no subclass, and nothing is patched.

    selection = OnlineSelection(task, "3 epochs")
    model = selection.model()
    trainer = Trainer(model, TrainingArguments("out", **selection.settings()), **selection.parts(model))
    trainer.train()

The trainer gets a data set, a collator, a loss function, a callback, and an optimizer with its learning rate. The
callback draws each step before the trainer takes it, learns from the losses of its examples, and stops the trainer
where the budget ends. See `docs/trainers.md`.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import nn

from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.data.token_batches import device_type
from cads.errors import ConfigError
from cads.integrations.arguments import CHECKPOINTING
from cads.integrations.callback import BudgetSchedule, SelectionCallback
from cads.integrations.example_losses import ExampleLosses, example_losses
from cads.integrations.feeding import Collator, RunDataset, RunSequences
from cads.integrations.stepped_run import SteppedRun
from cads.integrations.tokenised import tokenised_task
from cads.monitor import Monitor
from cads.runtime.processes import active_group
from cads.selection import Selection
from cads.selectors.online.selector import Cads, Granularity
from cads.task import Task
from cads.tasks.language.task import LanguageTask
from cads.training.device_settings import loading_workers
from cads.training.optimizers import build_optimizer

__all__ = ["OnlineSelection", "SelectionCallback", "example_losses", "tokenised_task"]


class OnlineSelection:
    """The method `cads` for one training in another trainer.

    Args:
        task: data, model and recipe, such as `LanguageConfig(...).build(recipe)` or `tokenised_task(...)`.
        budget: FLOPs of the whole run, or text such as "3 epochs"; it covers what selection costs.
        seed: of everything that is drawn.
        granularity: what has a probability of its own, as in the method `cads`.
        losses: of each example from outputs and labels; None for those of language models and classifiers.
        monitor: shows the course of the probabilities; None for none.

    Attributes:
        task: as it is trained: the logits of a language model are computed at all positions.

    Raises:
        BudgetError: if the budget does not parse, is a time, or does not buy one step.
        ConfigError, DataError: if the method does not apply to the task.
    """

    def __init__(
        self,
        task: Task,
        budget: Budget | str | float,
        *,
        seed: int = 0,
        granularity: Granularity = "example",
        losses: ExampleLosses | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        self.task = with_full_logits(task)
        parsed = budget if isinstance(budget, Budget) else Budget.parse(budget)
        selector = Cads(granularity=granularity)
        self._run = SteppedRun(self.task, selector, parsed, seed=seed, monitor=monitor or Monitor())
        self._callback = SelectionCallback(self._run, losses or example_losses)

    @property
    def ledger(self) -> Ledger:
        """The account of every FLOP so far."""
        return self._run.ledger

    @property
    def max_steps(self) -> int:
        """Steps that the trainer may take: the budget ends it before.

        An epoch of the trainer is a window of steps that are drawn together, and two of them may be cut short.
        """
        return self._run.most_steps + 2 * self._run.window

    def model(self) -> nn.Module:
        """A fresh model with the initial weights of `cads train`."""
        return self.task.model(self._run.draws.model_seed)

    def settings(self) -> dict[str, Any]:
        """Arguments for `TrainingArguments` and `SFTConfig` that follow from recipe, budget and number of processes.

        Raises:
            ConfigError: if the batch cannot be divided among processes and micro-batches.
        """
        recipe, size = self.task.recipe, active_group().size
        micro, rest = divmod(recipe.batch_size, recipe.accumulate * size)
        if rest or not micro:
            raise ConfigError(
                f"batch_size = {recipe.batch_size} cannot be divided into {recipe.accumulate} micro-batches in each of "
                f"{size} processes: choose a multiple of {recipe.accumulate * size}"
            )
        workers = loading_workers(recipe, device_type())
        checkpointing = isinstance(self.task, LanguageTask) and bool(self.task.settings.gradient_checkpointing)
        return {
            "per_device_train_batch_size": micro,
            "gradient_accumulation_steps": recipe.accumulate,
            "max_steps": self.max_steps,
            # Where examples are weighed, the callback clips.
            "max_grad_norm": 0.0 if self._run.weighs else recipe.clip_norm or 0.0,
            "learning_rate": recipe.learning_rate,
            "weight_decay": recipe.weight_decay,
            "use_cpu": device_type() == "cpu",
            "bf16": recipe.precision == "bf16",
            "fp16": recipe.precision == "fp16",
            CHECKPOINTING: checkpointing,
            "dataloader_num_workers": workers,
            "dataloader_persistent_workers": workers > 0,
        }

    def parts(self, model: nn.Module | None = None) -> dict[str, Any]:
        """Arguments for `Trainer` and `SFTTrainer`: data set, collator, loss function and callback.

        Args:
            model: with it, the optimizer and the learning rate of the recipe too; without it, those of the trainer.
        """
        sequences = self._run.examples.are_tokens
        parts: dict[str, Any] = {
            "train_dataset": RunSequences(self._run) if sequences else RunDataset(self._run),
            "data_collator": Collator(self._run.task, self._run.examples),
            "compute_loss_func": self._callback.compute_loss,
            "callbacks": [self._callback],
        }
        if model is not None:
            fused = self.task.recipe.precision != "fp16"
            optimizer = build_optimizer(self.task.recipe, model, fused=fused)
            parts["optimizers"] = (optimizer, BudgetSchedule(optimizer))
        return parts

    def stepped(self) -> tuple[SteppedRun, SelectionCallback]:
        """The run and what takes its steps, for the callback of another trainer."""
        return self._run, self._callback

    def selection(self) -> Selection:
        """What was trained on so far, with the ledger. It holds no model: that is in the trainer."""
        return self._run.selection()


def with_full_logits(task: Task) -> Task:
    """The task with its FLOPs counted for logits at all positions, which other trainers compute."""
    if not isinstance(task, LanguageTask) or task.full_logits:
        return task
    other = copy.copy(task)
    other.settings = replace(task.settings, trainer_compatible=True)
    # Counted with the logits of answers alone.
    vars(other).pop("costs", None)
    return other
