"""How an operation tells where it is, and how several processes that each do a part of it stay in step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cads.accounting.ledger import Ledger
from cads.runtime.checkpoint import State
from cads.runtime.processes import ProcessError, ProcessGroup, active_group, is_shared
from cads.runtime.signals import Interrupted


class StepReporter:
    """How an operation tells where it is. Outside a journal nothing is kept.

    Attributes:
        restored: what the operation last told, in a process that is gone, or None.
    """

    restored: State | None = None

    def step(self, state: Callable[[], State]) -> None:
        """One step is done; `state` is all that is needed to go on, and is asked for only if it is written down.

        Raises:
            Interrupted: if the run was asked to stop, once the state is written.
        """


@dataclass(frozen=True)
class Operation:
    """One of several that do not depend on each other.

    Attributes:
        name, arguments: as for `replay_or_run`.
        settle: takes in what came out, and charges the ledger for it; called in the order of the operations.
    """

    name: str
    arguments: Sequence[Any]
    commit: Callable[[State], None]


@dataclass(frozen=True)
class OperationStatus:
    """How far an operation had come in a process that is gone: finished or not, and where it stood, if it had begun."""

    finished: bool = False
    state: State | None = None


Part = Callable[[StepReporter, list[OperationStatus]], State]
"""(progress, where the operations stand) -> what this process has done of them, by itself."""
Merge = Callable[[list[State]], list[State | None]]
"""(what each process has done) -> the state of each operation; None for one that nobody has begun."""


class _PeerFailed(Exception):
    """Another process has failed, and will say how."""


class Lockstep(StepReporter):
    """One round a step: processes that work on their parts see at each step whether all of them go on.

    A process that has finished its part, or has none, takes part in the rounds until all have.

    Args:
        world: the processes. join: puts parts together.
        ask: once a round: (the signal by which this process was asked to stop, or 0; whether it is time to write).
        keep: writes down the joined states; with a signal, raises `Interrupted` then.
    """

    def __init__(
        self,
        world: ProcessGroup,
        join: Merge,
        ask: Callable[[], tuple[int, bool]],
        keep: Callable[[list[State | None], int], None],
    ) -> None:
        self._world, self._join, self._ask, self._keep = world, join, ask, keep

    def run(self, part: Part, standing: list[OperationStatus]) -> list[State]:
        """What all processes have done of their parts.

        Raises:
            CadsError: in all processes, what one of them raised.
        """
        return self._world.gather(lambda: self._mine(part, standing))

    def step(self, state: Callable[[], State]) -> None:
        """See `StepReporter`; `state` is that of the part."""
        self._meet(state, working=True)

    def _mine(self, part: Part, standing: list[OperationStatus]) -> State:
        try:
            mine = part(self, standing)
            while self._meet(lambda: mine, working=False):
                pass
        except _PeerFailed:
            return State()
        except Exception as error:
            # Others know of what they have raised too, and cannot be told once they are lost.
            if not (is_shared(error) or isinstance(error, Interrupted | ProcessError)):
                self._world.all_reduce_max([0, 0, 0, 1])
            raise
        return mine

    def _meet(self, state: Callable[[], State], *, working: bool) -> bool:
        """Whether any process is still at work."""
        signal, due = self._ask()
        signal, write, at_work, failed = self._world.all_reduce_max([signal, int(due), int(working), 0])
        if failed:
            raise _PeerFailed
        if signal or write:
            self._keep(self._join(self._world.gather(state)), signal)
        return bool(at_work)


def divide(ledger: Ledger, shards: Sequence[int], compute: Callable[[int], np.ndarray]) -> list[np.ndarray]:
    """`compute` of each shard, in order; process after process takes one.

    Args:
        ledger: charged by `compute`; with several processes, charged the same in each, in the order of the shards.

    Raises:
        CadsError: in all processes, what one of them raised.
    """
    world = active_group()
    if world.size == 1:
        return [compute(i) for i in shards]

    def own() -> State:
        charges, found = [], {}
        for i in shards[world.rank :: world.size]:
            with ledger.noting() as noted:
                found[str(i)] = torch.from_numpy(np.ascontiguousarray(compute(i)))
            charges.append(noted)
        return State({"charges": charges}, found)

    parts = world.gather(own)
    results = []
    for place, i in enumerate(shards):
        part = parts[place % world.size]
        for charge in part.values["charges"][place // world.size]:
            # They work at the same time.
            ledger.charge(**{**charge, "seconds": charge["seconds"] / world.size})
        results.append(part.tensors[str(i)].numpy())
    return results
