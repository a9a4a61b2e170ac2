"""The learning rates of training runs."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np

from cads.monitor import Monitor


class Rates(Monitor):
    """Keeps the learning rate of each step of the last run of each stage; a segment follows those before it."""

    def __init__(self):
        super().__init__()
        self.of = {}

    @contextmanager
    def progress(self, stage, flops, spent=0.0):
        rates = self.of.setdefault(stage, []) if spent else []
        self.of[stage] = rates
        yield lambda spent, loss, rate: rates.append(rate)


def assert_one_course(rates):
    """One warm-up, and one decay to 0 at the end."""
    peak = int(np.argmax(rates))
    assert peak < 0.1 * len(rates)
    assert (np.diff(rates[peak:]) < 0).all()
    assert rates[-1] < 0.01 * rates[peak]
