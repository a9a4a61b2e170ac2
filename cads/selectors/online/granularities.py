"""`cads` under the names of its two granularities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from cads.selectors.online.selector import Cads


@dataclass
class CadsSources(Cads):
    """CADS-S: `cads` with one probability for each source, which all of its examples share."""

    granularity: Literal["source"] = "source"
    """What has a probability of its own: each `source`."""

    method: ClassVar[str] = "cads-s"
    granularities: ClassVar[tuple[str, ...]] = ("source",)
    revision: ClassVar[int] = 2


@dataclass
class CadsExamples(Cads):
    """CADS-E: `cads` with a probability for each example; the same as `cads` by default."""

    granularity: Literal["example"] = "example"
    """What has a probability of its own: each `example` beside its source."""

    method: ClassVar[str] = "cads-e"
    granularities: ClassVar[tuple[str, ...]] = ("example",)
    revision: ClassVar[int] = 2
