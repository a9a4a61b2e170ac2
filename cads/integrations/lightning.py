"""The method `cads` inside Lightning's `Trainer`: one callback, which draws, weighs, charges and stops.

    selection = OnlineSelection(task, "3 epochs")
    model = selection.model()
    callback = LightningSelection(selection, model)
    Trainer(callbacks=[callback], max_epochs=1).fit(module, callback.loader())

`module` is yours: its `training_step` returns `callback.loss(outputs, labels)`, and its `configure_optimizers` may
return `callback.optimizer()`. One process, and no accumulation: see `docs/trainers.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from cads.errors import ConfigError
from cads.integrations.stepped_run import SteppedRun
from cads.integrations.transformers import OnlineSelection
from cads.training.optimizers import build_optimizer

PRECISIONS = {"no": "32-true", "bf16": "bf16-mixed"}
"""What a precision of the recipe is called there."""


class StepSampler(Sampler[list[int]]):
    """The numbers of the examples of each step, drawn when the step is due: of the whole run, in one epoch."""

    def __init__(self, run: SteppedRun) -> None:
        self._run = run

    def __len__(self) -> int:
        # With a length Lightning reads no batch ahead, which the step before would decide.
        return self._run.most_steps

    def __iter__(self) -> Iterator[list[int]]:
        while not self._run.over:
            for numbers in self._run.upcoming():
                if self._run.over:
                    return
                yield numbers.tolist()


class LightningSelection(lightning.Callback):
    """Goes with one training. Its state is in every checkpoint.

    Args:
        selection: the method with data, recipe and budget. model: that `module` trains, such as `selection.model()`.
    """

    def __init__(self, selection: OnlineSelection, model: nn.Module) -> None:
        self._run, self._steps = selection.stepped()
        self._parts, self._recipe, self._model = selection.parts(), selection.task.recipe, model
        self._stored: dict[str, Any] | None = None

    def loader(self) -> DataLoader[Any]:
        """The examples of each step: the arguments of the model, and `labels`. It takes the place of your loader."""
        parts = self._parts
        return DataLoader(
            parts["train_dataset"], batch_sampler=StepSampler(self._run), collate_fn=parts["data_collator"]
        )

    def loss(self, outputs: Any, labels: Tensor) -> Tensor:
        """The loss of a training step, which is the weighed mean over its examples; see `example_losses`."""
        return self._steps.compute_loss(outputs, labels)

    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of the recipe."""
        return build_optimizer(self._recipe, self._model, fused=True)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin or resume the run.

        Raises:
            ConfigError: if the trainer would train otherwise than the recipe says.
        """
        expected = {
            "world_size": 1,
            "accumulate_grad_batches": 1,
            "gradient_clip_val": None,
            "precision": PRECISIONS.get(self._recipe.precision),
        }
        found = {name: getattr(trainer, name) for name in expected}
        wrong = [f"{name} = {found[name]}, not {x}" for name, x in expected.items() if x != found[name]]
        wrong += [f"accumulate = {self._recipe.accumulate} in the recipe, not 1"] if self._recipe.accumulate > 1 else []
        if wrong:
            raise ConfigError(
                f"the selection trains otherwise: {'; '.join(wrong)}. In Lightning it has one process and no "
                "accumulation; clip_norm and precision (no or bf16) of the recipe hold"
            )
        stored = None if self._stored is None else self._steps.unpacked(self._stored)
        # Lightning leaves models as they are, and those that were loaded are in evaluation mode.
        self._model.train()
        self._steps.begin(self._model, stored, self._recipe.batch_size, self._recipe.precision)
        trainer.should_stop = self._run.over

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Take the step, and set its learning rate."""
        step = self._steps.begin_step()
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = step.rate

    def on_before_optimizer_step(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Refuse what is not finite; weigh and clip the gradient."""
        self._steps.before_update(self._model, optimizer)
        if not self._run.weighs and self._recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._recipe.clip_norm)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Charge for the step, learn from it, and stop if the next one is not affordable."""
        self._steps.end_step()
        trainer.should_stop = trainer.should_stop or self._run.over

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say so if the trainer ended before the budget did."""
        self._steps.end(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The state of the run."""
        return self._steps.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of a checkpoint, from which `on_train_start` goes on."""
        self._stored = state_dict
