"""LESS as the formula has it, in a plain loop over examples and checkpoints, and as it is here, in one line."""

import numpy as np
import torch

from baselines.less import Less
from cads.accounting.ledger import Ledger


def rank(task, seed=0, **options):
    return Less(**options).rank(task, seed=seed, ledger=Ledger())


def gradient(task, model, pool, i):
    """The gradient of one example by autograd, one vector, float64."""
    loss = task.losses(model, pool.batch([i])).sum()
    result = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in result]).double().numpy()


def direction(g, m, v, t, recipe):
    """The formulas of the paper, and of Adam."""
    if recipe == "sgd":
        return g
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
    if recipe == "paper":
        return m / np.sqrt(v + 1e-8)
    return (m / (1 - 0.9 ** (t + 1))) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)


def plain_less(task, checkpoints, recipe, subtasks):
    """LESS as the formula has it: a loop over checkpoints, pool and target."""
    total = np.zeros((len(task.target), len(task.pool)))
    total_rate = sum(c.rate for c in checkpoints)
    for c in checkpoints:
        model = task.model(0).eval()
        model.load_state_dict(c.parameters)
        m, v = (
            np.concatenate([x.numpy().ravel() for x in part.values()]).astype(float) for part in (c.first, c.second)
        )
        t = [gradient(task, model, task.target, i) for i in range(len(task.target))]
        g = [direction(gradient(task, model, task.pool, i), m, v, c.steps, recipe) for i in range(len(task.pool))]
        t, g = (np.stack([x / np.linalg.norm(x) for x in rows]) for rows in (t, g))
        total += c.rate / total_rate * t @ g.T
    return np.max([total[subtasks == k].mean(axis=0) for k in np.unique(subtasks)], axis=0)
