"""Tasks whose labels are classes."""

from __future__ import annotations

import copy

import numpy as np


def labelled(task, pretrained=False):
    """The task with its labels as classes."""
    task = copy.copy(task)
    cls = type(task)

    class WithClasses(cls):
        guess_loss = float(np.log(3))

        def groups(self, pool):
            return np.asarray(pool.examples.labels)

    task.__class__ = WithClasses
    task.pretrained = pretrained
    return task
