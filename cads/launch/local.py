"""Shards as processes of this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from cads.errors import ConfigError
from cads.launch.launcher import Job, Launcher, Outcome

GRACE = 30.0
"""Seconds that a process has to end after SIGTERM."""


class LocalLauncher(Launcher):
    """Starts `python -m cads`, as many at once as `workers`. A signal to this process ends them."""

    def run(self, jobs: Sequence[Job]) -> dict[str, Outcome]:
        """See `Launcher`."""
        if self.options:
            raise ConfigError(f"launcher_options = {dict(self.options)}: the launcher local has none")
        workers = self.workers or os.cpu_count() or 1
        threads = str(max(1, (os.cpu_count() or 1) // workers))
        self._environment = {"OMP_NUM_THREADS": threads, **os.environ}
        self._running: list[subprocess.Popen[bytes]] = []
        self._stopped = False
        with ThreadPoolExecutor(workers) as pool:
            try:
                return dict(zip([job.name for job in jobs], pool.map(self._run, jobs), strict=True))
            except BaseException:
                self._stop()
                raise

    def _run(self, job: Job) -> Outcome:
        if self._stopped:
            return Outcome(None, "it was not started")
        with self.log_of(job).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "cads", *job.argv], stdout=log, stderr=subprocess.STDOUT, env=self._environment
            )
            self._running.append(process)
            status = process.wait()
        if status < 0:
            return Outcome(None, f"killed by {signal.Signals(-status).name}")
        return Outcome(status)

    def _stop(self) -> None:
        self._stopped = True
        for process in self._running:
            process.terminate()
        for process in self._running:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
