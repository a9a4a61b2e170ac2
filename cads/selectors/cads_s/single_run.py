"""CADS-S in one run: the sources that the final model continues with, chosen while it trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from cads.search.single_run import OnlineSelector, by_source


@dataclass
class OneRunSources(OnlineSelector):
    """CADS-S within the training of the final model: weights of sources from the first part of the run."""

    method: ClassVar[str] = "cads-s-one-run"
    weigh = staticmethod(by_source)
