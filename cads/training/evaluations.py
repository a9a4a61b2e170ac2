"""Further evaluations of a trained model, in steps that are recorded, and their results beside the model.

A signal stops them within a forward pass of the model. A journal holds the steps that were done, so that a restart goes
on from there.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from cads.accounting.ledger import EVALUATE, Ledger
from cads.accounting.measured import count_flops
from cads.errors import CheckpointError
from cads.monitor import Monitor
from cads.runtime.atomic_files import whole_file
from cads.runtime.checkpoint import State, load_json
from cads.runtime.journal import replay_or_run
from cads.runtime.lockstep import StepReporter, map_in_turn
from cads.runtime.processes import active_group
from cads.task import Metrics, StepwiseEvaluation, Task
from cads.training.model_card import write_card

log = logging.getLogger(__name__)

RESULTS = "results.json"
"""File beside a trained model: its metrics, its evaluations with their settings, and the ledger."""
POLL_SECONDS = 1.0
"""Least seconds between two looks, within a step, at whether the run was asked to stop."""


def evaluate(task: Task, model: nn.Module, name: str, *, ledger: Ledger, monitor: Monitor) -> Metrics:
    """A further evaluation of `model`, by name, charged the FLOPs that it executes; see `Task.check_evaluation`.

    Raises:
        Interrupted: if the run was asked to stop, once the steps that are done are recorded.
    """
    stepwise = task.stepwise_evaluation(model, name)
    if stepwise is not None:
        return stepwise.metrics(_values(stepwise, name, ledger, monitor))

    def compute(progress: StepReporter) -> State:
        metrics: Metrics = {}
        with in_one_piece(name, progress, ledger=ledger, monitor=monitor):
            flops = count_flops(lambda: metrics.update(task.evaluate(model, name)))
        ledger.charge(EVALUATE, name, flops)
        return State(dict(metrics))

    state = replay_or_run("evaluation", [name], ledger, compute)
    return {metric: state.number(metric) for metric in state.values}


def _values(evaluation: StepwiseEvaluation, name: str, ledger: Ledger, monitor: Monitor) -> np.ndarray:
    """The values of all steps, in order, float64, shape (N,); several processes take the steps in turn."""
    sizes, world = evaluation.sizes, active_group()

    def step(number: int) -> np.ndarray:
        results: list[np.ndarray] = []
        with ledger.timed(EVALUATE, name):
            flops = count_flops(lambda: results.append(evaluation.step(number)))
        ledger.charge(EVALUATE, name, flops)
        return results[0]

    def compute(progress: StepReporter) -> State:
        done, values = 0, np.empty(0)
        if progress.restored is not None:
            done, values = int(progress.restored.number("done")), _stored(progress.restored)

        def state() -> State:
            return State({"done": done}, {"values": torch.from_numpy(values)})

        with monitor.counting(name, sum(sizes)) as advance, stoppable(progress, state):
            advance(sum(sizes[:done]))
            while done < len(sizes):
                numbers = range(done, min(done + world.size, len(sizes)))
                values = np.concatenate([values, *map_in_turn(ledger, numbers, step)])
                done = numbers.stop
                advance(sum(sizes[:done]))
                progress.step(state)
        return state()

    return _stored(replay_or_run("evaluation", [name, len(sizes), sum(sizes)], ledger, compute))


def _stored(state: State) -> np.ndarray:
    if "values" not in state.tensors:
        raise CheckpointError("the stored values of an evaluation are missing: begin anew with --overwrite true")
    return np.asarray(state.tensors["values"].numpy())


@contextmanager
def in_one_piece(name: str, progress: StepReporter, *, ledger: Ledger, monitor: Monitor) -> Iterator[None]:
    """Within the block an evaluation runs that has no steps: it is timed, shown as under way, and `stoppable`."""
    group = active_group()
    if group.size > 1 and group.first:
        log.info(
            "%s runs in one piece in %d processes: a signal to stop takes effect when it is done", name, group.size
        )
    with ledger.timed(EVALUATE, name), monitor.counting(name, None), stoppable(progress, State):
        yield


@contextmanager
def stoppable(progress: StepReporter, state: Callable[[], State]) -> Iterator[None]:
    """Within the block every forward pass may stop the run, with `state` as what is done; not with several processes.

    Several processes must stop at one step, and they may differ in their numbers of forward passes.
    """
    if active_group().size > 1:
        yield
        return
    thread, last = threading.get_ident(), time.monotonic()

    def poll(*_: Any) -> None:
        nonlocal last
        if threading.get_ident() == thread and time.monotonic() - last >= POLL_SECONDS:
            last = time.monotonic()
            progress.step(state)

    handle = register_module_forward_pre_hook(poll)
    try:
        yield
    finally:
        handle.remove()


def evaluation_record(task: Task, name: str, metrics: Metrics) -> dict[str, Any]:
    """What `results.json` holds of an evaluation."""
    return {"settings": task.evaluation_settings(name), "metrics": metrics}


def missing(task: Task, folder: Path, names: Sequence[str]) -> list[str]:
    """Those of `names` that `results.json` in `folder` does not hold, or holds with other settings.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    recorded = read_results(folder).get("evaluations", {})
    return [n for n in names if recorded.get(n, {}).get("settings") != task.evaluation_settings(n)]


def add_to_results(task: Task, folder: Path, name: str, metrics: Metrics, ledger: Ledger) -> None:
    """Write an evaluation into `results.json` in `folder`; an earlier one of that name is replaced."""
    results = read_results(folder)
    evaluations = results.setdefault("evaluations", {})
    earlier = evaluations.get(name, {}).get("metrics", {})
    results["metrics"] = {k: v for k, v in results["metrics"].items() if k not in earlier} | metrics
    evaluations[name] = evaluation_record(task, name, metrics)
    others = [entry for entry in results["ledger"] if (entry.get("phase"), entry.get("stage")) != (EVALUATE, name)]
    results["ledger"] = others + ledger.to_json()
    write_results(folder, results)


def read_results(folder: Path) -> dict[str, Any]:
    """The contents of `results.json` in `folder`.

    Raises:
        CheckpointError: if the file is missing or damaged.
    """
    try:
        results = load_json(folder / RESULTS)
        kinds = {"metrics": dict, "ledger": list, "evaluations": dict}
        with_evaluations = {"evaluations": {}, **results} if isinstance(results, dict) else {}
        if not all(isinstance(with_evaluations.get(name), kind) for name, kind in kinds.items()):
            raise CheckpointError(f"{RESULTS} lacks metrics, ledger or evaluations")
    except (CheckpointError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the results in {folder} cannot be read ({error}): begin anew with --overwrite true"
        ) from error
    return results


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write `results.json` into `folder`, all of it or nothing, and the model card."""
    whole_file(folder / RESULTS, json.dumps(results, indent=2) + "\n")
    write_card(folder, results)
