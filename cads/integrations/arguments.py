"""Which arguments of another trainer go with a selection."""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

from accelerate.data_loader import DataLoaderDispatcher
from transformers import TrainingArguments

from cads.errors import ConfigError
from cads.integrations.feeding import Collator, RunDataset, RunSequences
from cads.integrations.stepped_run import SteppedRun
from cads.recipe import TrainConfig
from cads.runtime.processes import active_group
from cads.tasks.language.task import LanguageTask

log = logging.getLogger(__name__)

CHECKPOINTING = "activation_checkpointing"
"""The argument of the trainer by which layers are recomputed; `gradient_checkpointing` in older releases."""
if CHECKPOINTING not in {field.name for field in fields(TrainingArguments)}:
    CHECKPOINTING = "gradient_checkpointing"


def check_arguments(args: TrainingArguments, run: SteppedRun, loader: Any) -> None:
    """Refuse arguments of the trainer with which it would not train as the selection draws.

    Args:
        run: whose steps it shall take. loader: its data loader.

    Raises:
        ConfigError: with the remedy.
    """
    recipe, size = run.task.recipe, active_group().size
    micro, accumulate = args.per_device_train_batch_size, args.gradient_accumulation_steps
    precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    settings = "take the arguments that `settings()` returns"
    check_unsupported(args)
    if args.max_steps <= 0:
        raise ConfigError(f"max_steps = {args.max_steps}: an epoch is a window of a few steps; {settings}")
    if args.world_size != size:
        raise ConfigError(
            f"the trainer knows of {args.world_size} processes, and {size} were started: {settings}, which say "
            "use_cpu where there is no GPU"
        )
    if micro * accumulate * size != run.batch_size:
        raise ConfigError(
            f"{micro} examples a device, {accumulate} times accumulated, in {size} processes are not the batch of "
            f"{run.batch_size} of the recipe: {settings}"
        )
    if precision != recipe.precision:
        raise ConfigError(
            f"precision = {precision!r} in the trainer, and {recipe.precision!r} in the recipe: {settings}"
        )
    if run.weighs and args.max_grad_norm:
        raise ConfigError(
            f"max_grad_norm = {args.max_grad_norm}: examples are weighed, and the gradient of their mean is known "
            "at the end of a step alone; set max_grad_norm = 0, and clip_norm in the recipe, by which it is clipped"
        )
    if recipe.non_finite != "stop":
        raise ConfigError("non_finite = 'skip': a trainer leaves out no batch; use 'stop'")
    checkpointing = isinstance(run.task, LanguageTask) and bool(run.task.settings.gradient_checkpointing)
    if bool(getattr(args, CHECKPOINTING)) != checkpointing:
        raise ConfigError(
            f"{CHECKPOINTING} = {getattr(args, CHECKPOINTING)}, and the task counts FLOPs with "
            f"{checkpointing}: {settings}"
        )
    if isinstance(loader, DataLoaderDispatcher) or args.accelerator_config.split_batches:
        raise ConfigError("dispatch_batches and split_batches do not go with the selection: leave them out")
    collate = getattr(loader.collate_fn, "data_collator", loader.collate_fn)
    if not isinstance(loader.dataset, RunDataset | RunSequences) or not isinstance(collate, Collator):
        raise ConfigError("the trainer has another data set or collator: give it all that `parts()` returns")


def check_unsupported(args: TrainingArguments) -> None:
    """Refuse arguments that go with no selection.

    Raises:
        ConfigError: naming the argument.
    """
    if args.n_gpu > 1:
        raise ConfigError(f"{args.n_gpu} devices in one process: start one process a device (torchrun)")
    for name in ("fsdp", "deepspeed", "auto_find_batch_size", "label_smoothing_factor", "neftune_noise_alpha"):
        if getattr(args, name, None):
            raise ConfigError(f"{name} = {getattr(args, name)!r} does not go with the selection: leave it out")
    if getattr(args, "train_sampling_strategy", "random") != "random":
        raise ConfigError(
            f"train_sampling_strategy = {args.train_sampling_strategy!r}: the selection draws the examples; leave it "
            "out"
        )


def warn_of_unused(args: TrainingArguments, recipe: TrainConfig) -> None:
    """Warn of arguments that differ from the recipe, where the optimizer is that of the recipe."""
    for name in ("learning_rate", "weight_decay"):
        if getattr(args, name) != getattr(recipe, name):
            log.warning(
                "%s = %s of the trainer has no effect: that of the recipe, %s, has; `parts()` without a model leaves "
                "the optimizer to the trainer",
                name,
                getattr(args, name),
                getattr(recipe, name),
            )
