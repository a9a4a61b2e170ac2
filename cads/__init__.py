"""cads: what should I train on, given a pool, a validation set, a model and a compute budget in FLOPs?

The public names are loaded when they are first used, so that `import cads` takes no time.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cads.accounting.budget import Budget
    from cads.accounting.ledger import Ledger
    from cads.api import export, plan, select, train
    from cads.data.batch import Batch
    from cads.data.pool import Pool
    from cads.errors import CadsError
    from cads.recipe import TrainConfig
    from cads.selection import Selection
    from cads.selector import Selector
    from cads.task import Task
    from cads.tasks.custom.datasets import DatasetTask
    from cads.tasks.custom.tensors import TensorTask

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "Budget",
    "CadsError",
    "DatasetTask",
    "Ledger",
    "Pool",
    "Selection",
    "Selector",
    "Task",
    "TensorTask",
    "TrainConfig",
    "__version__",
    "export",
    "plan",
    "select",
    "train",
]

_HOME = {
    "Batch": "cads.data.batch",
    "Budget": "cads.accounting.budget",
    "CadsError": "cads.errors",
    "DatasetTask": "cads.tasks.custom.datasets",
    "Ledger": "cads.accounting.ledger",
    "Pool": "cads.data.pool",
    "Selection": "cads.selection",
    "Selector": "cads.selector",
    "Task": "cads.task",
    "TensorTask": "cads.tasks.custom.tensors",
    "TrainConfig": "cads.recipe",
    "export": "cads.api",
    "plan": "cads.api",
    "select": "cads.api",
    "train": "cads.api",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
