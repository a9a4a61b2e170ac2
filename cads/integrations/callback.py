"""The callback of a run in `transformers.Trainer`: it draws each step, learns from it, and ends at the budget."""

from __future__ import annotations

import base64
import logging
import time
import zlib
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy

from cads.errors import CheckpointError, ConfigError, NonFiniteError
from cads.integrations.arguments import check_arguments, warn_of_unused
from cads.integrations.example_losses import ExampleLosses
from cads.integrations.feeding import RunSampler, joined_losses
from cads.integrations.stepped_run import DrawnStep, SteppedRun
from cads.runtime.checkpoint import State
from cads.runtime.processes import active_group
from cads.scoring.pool_scores import score_pool
from cads.tasks.language.task import LanguageTask
from cads.training.gradient import example_weights

log = logging.getLogger(__name__)

METRICS, VALIDATION = "metrics of the trainer", "validation by the trainer"
"""Stages of the ledger."""


class BudgetSchedule(LRScheduler):
    """The learning rate of the recipe, which follows the FLOPs that are spent; `SelectionCallback` sets it."""

    def get_lr(self) -> list[float | Tensor]:
        """The present rates."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def set_rate(self, rate: float) -> None:
        """Train at `rate` from now on."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self._last_lr = self.get_lr()


class SelectionCallback(TrainerCallback, ExportableState):
    """Goes with one training: it draws before each step, learns after it, and stops the trainer at the budget.

    Its state is in `trainer_state.json` of every checkpoint.

    Args:
        run: whose steps the trainer takes. None: for the trainer, which makes callbacks anew on request.
        losses: of each example.
    """

    def __init__(self, run: SteppedRun | None = None, losses: ExampleLosses | None = None) -> None:
        self._run, self._losses = run, losses
        self._step: DrawnStep | None = None
        self._parts: list[Tensor] = []
        self._weight_sums: list[Tensor] = []
        self._observed = np.empty(0)
        self._micro, self._started = 0, 0.0
        self._precision, self._scaled_by_trainer, self._is_probing = "no", True, False
        self._passes = 0
        self._hook: RemovableHandle | None = None

    # ---- the loss

    def compute_loss(self, outputs: Any, labels: Tensor | None, num_items_in_batch: Any = None) -> Tensor:
        """The part of a micro-batch in the loss of a step, which is the weighed mean over its examples.

        In an evaluation: the mean over its examples.

        Args:
            outputs, labels: see `example_losses`. num_items_in_batch: not None where the trainer multiplies the loss by
                the number of processes.
        """
        assert self._losses is not None
        losses = self._losses(outputs, labels)
        if not torch.is_grad_enabled():
            return losses.mean()
        step = self._step
        if step is None or len(losses) != self._micro:
            raise ConfigError(
                f"a micro-batch of {len(losses)} examples that the selection did not draw: give the trainer all of "
                "`parts()`: the data set, the collator, the loss and the callback"
            )
        own = self._own_numbers(len(self._parts))
        if (token_weights := self._token_weights(step.numbers)) is not None:
            losses = losses * torch.from_numpy(token_weights[own]).to(losses.device)
        self._parts.append(losses.detach())
        n = len(step.numbers)
        # A trainer with several processes takes the mean of their gradients.
        scale = active_group().size if num_items_in_batch is None or not self._scaled_by_trainer else 1
        if step.log_odds is None:
            return losses.sum() / n * scale
        weights = example_weights(losses, torch.from_numpy(step.log_odds[own]).to(losses.device))
        assert weights is not None
        self._weight_sums.append(weights.sum())
        return (losses * weights).sum() / n * scale

    # ---- the course of the training

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the arguments, begin or resume the run, and give the data loader its sampler."""
        run, model, loader = self.run, kwargs["model"], kwargs["train_dataloader"]
        check_arguments(args, run, loader)
        if isinstance(kwargs.get("lr_scheduler"), BudgetSchedule):
            warn_of_unused(args, run.task.recipe)
        self._scaled_by_trainer = bool(args.average_tokens_across_devices)
        stored = self._stored(state) if state.global_step else None
        precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
        self.begin(model, stored, args.per_device_train_batch_size, precision)
        sampler = RunSampler(run)
        if state.global_step:
            if run.steps != state.global_step:
                raise CheckpointError(f"the checkpoint has {state.global_step} steps, and its selection {run.steps}")
            if not args.ignore_data_skip:
                sampler.skipped = state.global_step % run.window * run.batch_size
        loader.set_sampler(sampler)
        control.should_training_stop = run.over
        state.max_steps = min(state.max_steps, run.most_steps)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the next step: its examples, its learning rate and its seed."""
        step = self.begin_step()
        if isinstance(schedule := kwargs.get("lr_scheduler"), BudgetSchedule):
            schedule.set_rate(step.rate)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `before_update`."""
        self.before_update(kwargs["model"], kwargs["optimizer"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Charge for the step, learn from it, and stop if the next one is not affordable."""
        self.end_step()
        if self.run.over:
            control.should_training_stop = True
            # As the trainer does where `max_steps` ends it.
            if args.save_strategy == SaveStrategy.STEPS:
                control.should_save = True

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See `end`."""
        self.end(state.global_step)

    # ---- a step, in any trainer

    def begin(self, model: nn.Module, stored: State | None, micro: int, precision: str) -> None:
        """Begin the run with a model, or go on from the state that is stored.

        Args:
            micro: examples in a micro-batch of a process. precision: no, bf16 or fp16.
        """
        self._micro, self._precision = micro, precision
        self._remove_hook()
        self._hook = model.register_forward_pre_hook(self._count_forward, with_kwargs=True)
        probe = partial(self._probe, model)
        if stored is None:
            self.run.begin(probe, micro)
        else:
            self.run.restore(stored, probe, micro)

    def begin_step(self) -> DrawnStep:
        """Take the next step, and set the seed of its dropout."""
        self._step = step = self.run.take()
        self._parts, self._weight_sums, self._passes, self._started = [], [], 0, time.perf_counter()
        seed = self.run.dropout_seed(active_group().rank)
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_available():
            torch.cuda.manual_seed(seed)
        return step

    def before_update(self, model: nn.Module, optimizer: Any) -> None:
        """Read the losses of all processes, and refuse what is not finite; weigh and clip the gradient.

        Raises:
            NonFiniteError: before the weights are updated.
        """
        run, step = self.run, self._step
        assert step is not None
        self._observed = self._read()
        parameters = [p for p in model.parameters() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if step.log_odds is not None:
            self._weigh(gradients, step)
        if run.weighs:
            clip = run.task.recipe.clip_norm
            norm = nn.utils.clip_grad_norm_(parameters, float("inf") if clip is None else clip)
        else:
            norm = nn.utils.get_total_norm(gradients)
        # Where the loss is scaled, gradients are expected to overflow: such a step is skipped.
        if not np.isfinite(self._observed).all() or (self._precision != "fp16" and not bool(torch.isfinite(norm))):
            rate = optimizer.param_groups[0]["lr"]
            ids = run.examples.ids(step.numbers)
            raise NonFiniteError(
                f"loss {self._observed.mean():g} and gradient norm {float(norm):g} at step {run.steps} (learning rate "
                f"{rate:.3g}, examples {ids[:5]}{'...' if len(ids) > 5 else ''}): the weights were not updated; look "
                "at these examples, or lower the learning rate",
                step=run.steps,
                ids=ids,
                learning_rate=rate,
            )

    def end_step(self) -> None:
        """Charge for the step, and learn from it."""
        run, step = self.run, self._step
        assert step is not None
        # Beside a loss function, TRL computes its metrics by a pass of their own.
        if further := self._passes - len(self._parts):
            run.charge_forward(step.price.forward * further / len(self._parts), METRICS)
        self._step = None
        run.finish(step, self._observed, time.perf_counter() - self._started)

    def end(self, steps: int) -> None:
        """Say so if the trainer ended, after so many steps, before the budget did."""
        self._remove_hook()
        if not self.run.over:
            log.warning(
                "the trainer stopped at step %d with %.4g of %.4g FLOPs left: max_steps or another callback ended it; "
                "the learning rate of the recipe falls to its end at the budget",
                steps,
                self.run.ledger.left,
                self.run.ledger.limit,
            )

    # ---- the state in a checkpoint

    def state(self) -> dict[str, Any]:
        """The state of the run, for `trainer_state.json`."""
        if self._run is None:
            return {"args": {}, "attributes": {}}
        stored = self._run.state()
        tensors = {name: x.contiguous() for name, x in stored.tensors.items()}
        packed = base64.b64encode(zlib.compress(save(tensors))).decode()
        return {"args": {}, "attributes": {"stored": {"values": stored.values, "tensors": packed}}}

    def _stored(self, state: TrainerState) -> State:
        """The state of the run in that of the trainer.

        Raises:
            CheckpointError: if there is none, or it is damaged.
        """
        return self.unpacked(state.stateful_callbacks.get(type(self).__name__))

    def unpacked(self, entry: Any) -> State:
        """The state of the run in what `state` gave.

        Raises:
            CheckpointError: if there is none, or it is damaged.
        """
        if not isinstance(entry, dict) or "stored" not in entry.get("attributes", {}):
            raise CheckpointError(
                "the checkpoint has no state of a selection: it is of a training without it; begin anew, or resume "
                "from one that was trained with it"
            )
        stored = entry["attributes"]["stored"]
        try:
            return State(dict(stored["values"]), load(zlib.decompress(base64.b64decode(stored["tensors"]))))
        except (KeyError, TypeError, ValueError, zlib.error, SafetensorError) as error:
            raise CheckpointError(
                f"the state of the selection in the checkpoint is corrupt ({type(error).__name__}: {error}): "
                "resume from an earlier checkpoint"
            ) from error

    # ---- helpers of the above

    @property
    def run(self) -> SteppedRun:
        """The run.

        Raises:
            ConfigError: if the trainer has made this callback anew.
        """
        if self._run is None:
            raise ConfigError(
                "restore_callback_states_from_checkpoint = True makes callbacks anew, without the selection: leave it "
                "out; the selection resumes by itself"
            )
        return self._run

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _own_numbers(self, micro: int) -> slice:
        """Which examples of the step are in a micro-batch of this process."""
        group = active_group()
        start = (micro * group.size + group.rank) * self._micro
        return slice(start, start + self._micro)

    def _token_weights(self, numbers: np.ndarray) -> np.ndarray | None:
        """Answer tokens of examples over their mean number, float32, shape (B,); None if each counts alike."""
        task = self.run.task
        if not isinstance(task, LanguageTask) or task.settings.weighting != "token":
            return None
        counts = self.run.examples.answers(numbers)
        return np.asarray(counts / max(1.0, counts.mean()), dtype=np.float32)

    def _read(self) -> np.ndarray:
        """The losses of all examples of the step, float64, shape (B,), the same in all processes."""
        assert self._step is not None
        own, group = joined_losses(self._parts), active_group()
        if group.size == 1:
            return own
        losses = np.zeros(len(self._step.numbers))
        for micro in range(len(self._parts)):
            losses[self._own_numbers(micro)] = own[micro * self._micro : (micro + 1) * self._micro]
        return group.all_reduce_sum(losses)

    def _weigh(self, gradients: list[Tensor], step: DrawnStep) -> None:
        """Make the gradient that of the weighed mean, sum_i w_i l_i / sum_i w_i; see `cads.training.gradient`."""
        assert step.log_odds is not None
        if active_group().size == 1:
            total = torch.stack(self._weight_sums).sum()
        else:
            weights = example_weights(torch.from_numpy(self._observed), torch.from_numpy(step.log_odds))
            assert weights is not None
            total = weights.sum().to(gradients[0].device)
        torch._foreach_mul_(gradients, len(step.numbers) / total.clamp(min=1.0))

    def _probe(self, model: nn.Module, positions: np.ndarray, stage: str) -> np.ndarray:
        """The losses of pool examples under the model in training; charged to `stage`."""
        run, was_training = self.run, model.training
        model.eval()
        self._is_probing = True
        losses = score_pool(
            run.task.pool,
            partial(run.task.losses, model),
            run.task.costs.forward,
            ledger=run.ledger,
            stage=stage,
            device=next(model.parameters()).device,
            positions=positions,
            precision=self._precision,
        )
        self._is_probing = False
        model.train(was_training)
        return losses

    def _count_forward(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the model: count passes in a step, and charge for those of an evaluation."""
        if model.training:
            self._passes += 1
        elif not self._is_probing:
            given = (kwargs.get("input_ids"), *args, *kwargs.values())
            inputs = next(x for x in given if isinstance(x, Tensor))
            forward = self.run.examples.forward_flops(tuple(inputs.shape))
            self.run.charge_forward(forward * active_group().size, VALIDATION)
