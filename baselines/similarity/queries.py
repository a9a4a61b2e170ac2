"""Target examples as queries: which of them are averaged, before the best average counts."""

from __future__ import annotations

import numpy as np

from cads.errors import DataError
from cads.task import Task


def subtask_weights(task: Task) -> np.ndarray:
    """Weights with which target examples are averaged within their subtasks, shape (G, M); G = 1 without subtasks.

    A selector takes the mean within a subtask, and the best of them (LESS, arXiv 2402.04333): a mean over all
    would follow the largest.

    Raises:
        DataError: if the task does not say the subtask of each target example.
    """
    subtasks = task.subtasks(task.target)
    if subtasks is None:
        return mean_weights(task)
    if len(subtasks) != len(task.target):
        raise DataError(f"{len(subtasks)} subtasks for {len(task.target)} examples of the target: give one each")
    _, codes, sizes = np.unique(subtasks, return_inverse=True, return_counts=True)
    weights = np.zeros((len(sizes), len(codes)))
    weights[codes, np.arange(len(codes))] = 1 / sizes[codes]
    return weights


def mean_weights(task: Task) -> np.ndarray:
    """Weights of the mean over all target examples, shape (1, M)."""
    return np.full((1, len(task.target)), 1 / len(task.target))
