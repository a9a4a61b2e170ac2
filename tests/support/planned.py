"""What a search would charge, without running it."""

from __future__ import annotations

from cads.errors import NotAffordableError
from cads.search.base import Search
from cads.search.inner_costs import PlannedInnerLoop


def charges(search: Search, costs: PlannedInnerLoop, train_flops: float) -> bool:
    """Charge `costs` for all stages of a search; returns whether they are affordable."""
    try:
        for stage in search.stages(costs, train_flops):
            costs.charge(stage)
    except NotAffordableError:
        return False
    return True
