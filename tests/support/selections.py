"""A Selection of every third example, and a small task with two sources whose pool it is made from."""

import numpy as np

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.recipe import TrainConfig
from cads.selection import Selection
from cads.tasks.vision.config import VisionConfig
from cads.tasks.vision.synthetic_sources import SyntheticSource

SOURCES = [SyntheticSource("clean"), SyntheticSource("noisy", label_noise=0.9)]


def small_task():
    """80 images of digits in two sources, 30 in the target and 30 in the test set."""
    config = VisionConfig(hidden=16, n_pool=80, n_target=30, n_test=30, sources=SOURCES)
    return config.build(TrainConfig(batch_size=8))


def chosen(pool, **more):
    """Every third example, with made-up scores and a ledger."""
    rng = np.random.default_rng(0)
    ledger = Ledger()
    ledger.charge(SELECT, "made up", 123.0, usages=4, tokens=4, seconds=0.25)
    fields = {
        "selected": np.arange(len(pool)) % 3 == 0,
        "score": rng.normal(size=len(pool)).round(1),
        "probability": rng.uniform(0.1, 1.0, len(pool)),
        "method": "made-up",
        "seed": 3,
        "budget": Budget(5, "epochs", count_selection=True),
        "ledger": ledger,
        "config": {"a": 1},
        "notes": {"guard": "none"},
        "source_probability": {"clean": 0.75, "noisy": 0.25},
    }
    return Selection.from_pool(pool, **{**fields, **more})
