"""Several processes on CPUs, forked from this one: started, ended, killed, and held against one process."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import time

import numpy as np
from accelerate.state import AcceleratorState

from cads.runtime import journal as journal_module
from cads.runtime import processes
from cads.runtime.lockstep import StepReporter
from cads.runtime.processes import world_group

PATIENCE = 300
"""Seconds after which a test says that processes hang."""
TOLERANCE = 1e-4
"""How far probabilities and weights may be from those of one process: sums of gradients are rounded otherwise."""


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _join(rank, size, port, seconds):
    """Make this forked process one of several."""
    said = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in said.items()})
    os.environ[processes.TIMEOUT_VARIABLE] = str(seconds)
    AcceleratorState._reset_state(reset_partial_state=True)
    world_group.cache_clear()
    assert world_group().size == size


def started(size, work, folder, seconds=PATIENCE):
    """Begin `work()` in each of `size` processes; returns their process ids."""
    port, pids = _free_port(), []
    for rank in range(size):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        said = {}
        try:
            _join(rank, size, port, seconds)
            said = {"result": work()}
        except BaseException as error:
            said = {"error": [type(error).__name__, str(error)]}
        finally:
            _leave(folder / f"{rank}.json", said)
    return pids


def _leave(file, said):
    """End this process; it must never come back to the tests."""
    try:
        file.write_text(json.dumps(said))
    finally:
        os._exit(0)


def ended(pids, seconds=PATIENCE):
    """Wait until all have ended; those that hang are killed, and the test fails."""
    until = time.monotonic() + seconds
    remaining = set(pids)
    while remaining and time.monotonic() < until:
        remaining -= {pid for pid in remaining if os.waitpid(pid, os.WNOHANG)[0]}
        time.sleep(0.01)
    for pid in remaining:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not remaining, f"{len(remaining)} processes hang"


def spread(size, work, folder, seconds=PATIENCE):
    """What `work()` returns (JSON) in each of `size` processes, or the kind and message of its error."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.json"):
        path.unlink()
    ended(started(size, work, folder, seconds))
    said = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
    return [s.get("result", tuple(s.get("error", ()))) for s in said]


def entries(ledger):
    return ledger.to_json(seconds=False)


def chosen(selection):
    return {
        "selected": selection.selected.tolist(),
        "probability": selection.probability.tolist(),
        "score": selection.score.tolist(),
        "ledger": entries(selection.ledger),
    }


def weights(model):
    return np.concatenate([x.detach().numpy().ravel() for x in model.state_dict().values()]).tolist()


def same(actual, one, tolerance=TOLERANCE):
    """All processes have found the same bits; those are the ones of a single process within the tolerance."""
    assert all(x == actual[0] for x in actual)
    _close(actual[0], one, tolerance)


def _close(x, y, tolerance):
    if isinstance(x, dict):
        assert set(x) == set(y)
        for name in x:
            _close(x[name], y[name], 0 if name == "ledger" else tolerance)
    elif isinstance(x, list) and x and isinstance(x[0], float):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)
    else:
        assert x == y


def before_steps(do):
    """Call `do` with the kind of progress before each step of an operation, in this process."""
    for kind in (journal_module._Underway, journal_module.Lockstep):

        def stepped(self, state, kind=kind, step=kind.step):
            do(kind)
            step(self, state)

        kind.step = stepped


def after_steps(do):
    """Call `do` with the number of each step of a run that no journal keeps, in this process."""
    numbers = itertools.count()
    StepReporter.step = lambda self, state: do(next(numbers))


def mortal(steps):
    """End this process by -9 before its next step after so many."""
    remaining = iter(range(steps))

    def die(kind):
        if next(remaining, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)

    before_steps(die)


def killed(size, work, folder):
    """Run `work` in `size` processes that kill themselves."""
    folder.mkdir(exist_ok=True)
    ended(started(size, work, folder) if size > 1 else [_alone(work)])


def _alone(work):
    pid = os.fork()
    if not pid:
        try:
            work()
        finally:
            os._exit(0)
    return pid
