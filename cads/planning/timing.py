"""How fast this machine trains a task, and what time and memory a run takes beside: by a few steps that are timed."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from cads.accounting.ledger import SELECT, Ledger
from cads.accounting.throughput import matmul_flops_per_second
from cads.data.streams import ShuffledStream
from cads.data.token_batches import device_type, lengths
from cads.data.training_batches import BatchStream
from cads.errors import CadsError, ConfigError
from cads.planning.memory import training_memory
from cads.runtime.process_usage import age, free_memory, memory, peak_memory
from cads.runtime.processes import world_group
from cads.task import Task
from cads.training.device_settings import prepare_device
from cads.training.speed import TrainingSpeed, measure_speed
from cads.training.trainer import Trainer

log = logging.getLogger(__name__)

GIVEN = "given"
"""Source of a speed that no machine was asked for."""
SECONDS = 2.0
"""Seconds for which steps are timed."""
LONG_STEP, LONGEST_STEP = 0.25, 4.0
"""Seconds of a step at the speed of matrix products, from which on few steps are timed, and none."""
MEMORY_SHARE = 0.8
"""Share of the free memory that training may need to be timed."""
STAGE = "speed test"
TESTED = 256
"""Test examples on which the test is timed."""


@dataclass(frozen=True)
class Timing:
    """How fast training is, and what a run takes beside it.

    Attributes:
        flops_per_second: of training steps. rate_from: where that comes from, in words.
        start_up: seconds before and after training: libraries, data, model, test. None if they are not known.
        resident: bytes of the process beside the model and its training; 0 if they are not counted.
        peak: bytes at the peak of a training on the longest examples; None if that was not measured.
        sample: the task whose steps were timed; None if none were.
        scale: FLOPs of the task that is planned for over those of `sample`, for the same step.
    """

    flops_per_second: float
    rate_from: str
    start_up: float | None = None
    resident: float = 0.0
    peak: float | None = None
    sample: Task | None = None
    scale: float = 1.0

    @property
    def is_timed(self) -> bool:
        """Whether steps of the task were timed."""
        return self.peak is not None


def given_timing(flops_per_second: float | None) -> Timing:
    """The timing of a speed that is given.

    Raises:
        ConfigError: if it is not a positive number.
    """
    if flops_per_second is None or not (math.isfinite(flops_per_second) and flops_per_second > 0):
        raise ConfigError(f"flops_per_second = {flops_per_second}: it must be positive and finite")
    return Timing(flops_per_second, GIVEN)


def product_timing(task: Task, reason: str) -> Timing:
    """The speed of matrix products, which no training exceeds; `reason`: why no steps are timed."""
    device = device_type()
    prepare_device(device)
    rate = matmul_flops_per_second(device, task.recipe.precision)
    return Timing(rate, f"matrix products on this {device}, the least it can take: {reason}")


def time_training(task: Task, *, with_start_up: bool) -> Timing:
    """Time a few steps of a throw-away model, or say why not; see `Task.to_time`.

    Args:
        task: that is planned for.
        with_start_up: whether this process was begun for the plan, so that its age is the start-up of a run.
    """
    step = task.costs.per_usage(task.pool, task.recipe.batch_size) * task.recipe.batch_size
    prepare_device(device_type())
    seconds = step / matmul_flops_per_second(device_type(), task.recipe.precision)
    reason = world_group().on_rank_zero(lambda: _too_large(task, seconds))
    if reason:
        return _untimed(task, reason, with_start_up=with_start_up)
    started = age()
    try:
        timed = task.to_time()
        if timed is None:
            return product_timing(task, "it has no examples to time")
        sample, scale = timed
        read_at = age()
        parts = world_group().on_rank_zero(lambda: 1 if seconds > LONG_STEP else 2)
        speed = measure_speed(sample, Ledger(), SECONDS, parts)
        timing = _timed(sample, speed, started + (read_at - started) * scale, age() - read_at)
        timing = timing if with_start_up else replace(timing, start_up=None)
        # The sample counts FLOPs as a run does; the plan may count them by another accounting.
        batch_size = task.recipe.batch_size
        ratio = task.costs.per_usage(task.pool, batch_size) / sample.costs.per_usage(sample.pool, batch_size)
        return replace(timing, flops_per_second=timing.flops_per_second * ratio, sample=sample, scale=ratio)
    except (CadsError, RuntimeError) as error:
        log.debug("no steps were timed", exc_info=True)
        return _untimed(task, f"steps cannot be timed ({error})", with_start_up=with_start_up)


def _untimed(task: Task, reason: str, *, with_start_up: bool) -> Timing:
    """The speed of matrix products, with what this process took until here: a run takes as much at least."""
    timing = product_timing(task, reason)
    resident = float(memory()) if device_type() == "cpu" else 0.0
    return replace(timing, start_up=age() if with_start_up else None, resident=resident)


def _too_large(task: Task, step_seconds: float) -> str:
    """Why steps are not timed; empty if they are."""
    if device_type() == "cpu":
        needed, free = training_memory(task).total, free_memory()
        if needed > MEMORY_SHARE * free:
            return f"training needs {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free here"
    return f"a step takes {step_seconds:.3g} s or more" if step_seconds > LONGEST_STEP else ""


def _timed(task: Task, speed: TrainingSpeed, ready: float, measured: float) -> Timing:
    """The timing of a task with data.

    Args:
        ready: seconds until a run has read its data.
        measured: seconds from then on until the speed was measured.
    """
    longest = _longest(task)
    draws = BatchStream(task.pool, [ShuffledStream(longest, 0)], task.recipe.batch_size)
    step = task.costs.usage(task.pool.batch(longest)) / len(longest) * task.recipe.batch_size
    flops = 1.5 * (step + task.costs.optimizer_step)
    fit = Trainer(task, Ledger()).fit(task.model(0), draws, flops, seed=0, phase=SELECT, stage=STAGE)
    test = _test_seconds(task, fit.models[0])
    if device_type() == "cpu":
        peak = float(peak_memory())
        resident = max(0.0, peak - training_memory(task).total)
    else:
        peak, resident = float(torch.cuda.max_memory_reserved()) if torch.cuda.is_available() else 0.0, 0.0
    # What comes once, such as the first import of a library, is in the measurement, and not in its steps.
    once = max(0.0, measured - speed.train_seconds)
    return Timing(speed.flops_per_second, "of steps timed here", ready + once + test, resident, peak)


def _test_seconds(task: Task, model: nn.Module) -> float:
    """Seconds of the test, by that of some examples."""
    count = min(len(task.test), TESTED)
    part = task.test.subset(np.arange(count), task.test.name)
    started = time.perf_counter()
    task.metrics(model, part)
    return (time.perf_counter() - started) * len(task.test) / count


def _longest(task: Task) -> np.ndarray:
    """Positions of the longest examples of the pool, as many as a batch has; of any, if they have no length."""
    own, count = lengths(task.pool), min(len(task.pool), task.recipe.batch_size)
    return np.arange(count) if own is None else np.argsort(-own, kind="stable")[:count].copy()
