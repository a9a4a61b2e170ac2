"""CADS-E in one run: the examples that the final model continues with, chosen while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cads.search.single_run import OnlineSelector, by_example


@dataclass
class OneRunExamples(OnlineSelector):
    """CADS-E within the training of the final model: weights of examples from the first part of the run."""

    method: ClassVar[str] = "cads-e-one-run"
    weigh = staticmethod(by_example)
