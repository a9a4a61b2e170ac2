"""How an operation reports its state, and how several processes that each run a part of it stay in step."""

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
    """How an operation reports its steps. Outside a journal nothing is stored.

    Attributes:
        restored: the state to resume from, stored by an earlier process; None if there is none.
    """

    restored: State | None = None

    def resume_from(self, state: State | None) -> None:
        """The work resumes from `state`; None: it begins anew."""
        self.restored = state

    def step(self, state: Callable[[], State]) -> None:
        """One step is done. `state` returns all that is needed to resume; it is called only if a checkpoint is written.

        Raises:
            Interrupted: if the run was asked to stop, once the state is written.
        """


@dataclass(frozen=True)
class Operation:
    """One of several that do not depend on each other.

    Attributes:
        name, arguments: as for `replay_or_run`.
        commit: takes over the final state, and charges the ledger for it; called in the order of the operations.
    """

    name: str
    arguments: Sequence[Any]
    commit: Callable[[State], None]


@dataclass(frozen=True)
class OperationStatus:
    """What earlier processes have stored of an operation: whether it has finished, and its state if it had begun."""

    finished: bool = False
    state: State | None = None


Part = Callable[[StepReporter, list[OperationStatus]], State]
"""(progress, the status of each operation) -> the state of the part that this process has run."""
Merge = Callable[[list[State]], list[State | None]]
"""(the state of each process's part) -> the state of each operation; None for one that nobody has begun."""


class _PeerFailed(Exception):
    """Another process has failed; its error follows by `gather`."""


class Lockstep(StepReporter):
    """Synchronises processes that run their parts: an all-reduce after each step tells whether all of them go on.

    A process that has finished its part, or has none, takes part in the all-reduces until all have finished.

    Args:
        world: the processes. join: merges the states of the parts.
        poll: called at each step: (signal by which this process was asked to stop, or 0; whether to write).
        save: writes the merged states; then raises `Interrupted` if it is given a signal.
    """

    def __init__(
        self,
        world: ProcessGroup,
        join: Merge,
        poll: Callable[[], tuple[int, bool]],
        save: Callable[[list[State | None], int], None],
    ) -> None:
        self._world, self._join, self._poll, self._save = world, join, poll, save

    def run(self, part: Part, statuses: list[OperationStatus]) -> list[State]:
        """The final state of the part of each process.

        Raises:
            CadsError: in all processes, what one of them raised.
        """
        return self._world.gather(lambda: self._run_part(part, statuses))

    def step(self, state: Callable[[], State]) -> None:
        """See `StepReporter`; `state` is that of the part."""
        self._synchronise(state, working=True)

    def _run_part(self, part: Part, statuses: list[OperationStatus]) -> State:
        try:
            result = part(self, statuses)
            while self._synchronise(lambda: result, working=False):
                pass
        except _PeerFailed:
            return State()
        except Exception as error:
            # Not for errors that every process raises anyway, nor for lost processes, which cannot be reached.
            if not (is_shared(error) or isinstance(error, Interrupted | ProcessError)):
                self._world.all_reduce_max([0, 0, 0, 1])
            raise
        return result

    def _synchronise(self, state: Callable[[], State], *, working: bool) -> bool:
        """Synchronise one step; returns whether any process is still at work."""
        signal, due = self._poll()
        signal, write, at_work, failed = self._world.all_reduce_max([signal, int(due), int(working), 0])
        if failed:
            raise _PeerFailed
        if signal or write:
            self._save(self._join(self._world.gather(state)), signal)
        return bool(at_work)


def map_in_turn(ledger: Ledger, shards: Sequence[int], compute: Callable[[int], np.ndarray]) -> list[np.ndarray]:
    """`compute` of each shard, in order; the processes take the shards in turn.

    Args:
        ledger: charged by `compute`; with several processes, charged the same in each, in the order of the shards.

    Raises:
        CadsError: in all processes, what one of them raised.
    """
    world = active_group()
    if world.size == 1:
        return [compute(i) for i in shards]

    def compute_share() -> State:
        charges, tensors = [], {}
        for i in shards[world.rank :: world.size]:
            with ledger.noting() as noted:
                tensors[str(i)] = torch.from_numpy(np.ascontiguousarray(compute(i)))
            charges.append(noted)
        return State({"charges": charges}, tensors)

    parts = world.gather(compute_share)
    results = []
    for order, i in enumerate(shards):
        part = parts[order % world.size]
        for charge in part.values["charges"][order // world.size]:
            # The processes work at the same time.
            ledger.charge(**{**charge, "seconds": charge["seconds"] / world.size})
        results.append(part.tensors[str(i)].numpy())
    return results
