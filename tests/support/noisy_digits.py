"""Digits of three sources, clean to noisy, and the same without their sources."""

from __future__ import annotations

import copy

from cads.data.pool import Pool
from cads.recipe import TrainConfig
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource

SOURCES = [
    SyntheticSource("clean"),
    SyntheticSource("half", label_noise=0.5),
    SyntheticSource("noisy", label_noise=0.9),
]
RECIPE = TrainConfig(batch_size=16, learning_rate=5e-3)


def noisy_digits():
    return VisionConfig(hidden=32, n_target=200, n_test=150, sources=SOURCES).build(RECIPE)


def without_sources(task):
    other = copy.copy(task)
    other.pool = Pool(task.pool.ids, task.pool.examples)
    return other
