"""Target examples as queries: the weights with which they are averaged; the best average counts."""

from __future__ import annotations

import numpy as np

from cads.errors import DataError
from cads.task import Task


def subtask_weights(task: Task) -> np.ndarray:
    """Weights that average target examples within their subtasks, shape (G, M); G = 1 without subtasks.

    A selector takes the mean within each subtask, and then the best of these means (LESS, arXiv 2402.04333). A mean
    over all examples would follow the largest subtask.

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
