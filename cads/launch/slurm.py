"""Shards as jobs of a SLURM array, by submitit; `cluster: local` runs the same on this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cads.errors import ConfigError
from cads.launch.launcher import Entry, Job, Launcher, LaunchError, Outcome, run_logged

POLL_SECONDS = 1.0
"""Interval at which jobs are looked at; submitit asks SLURM less often."""
REASON = 200
"""Characters of a reason that are shown."""


class CommandJob:
    """What runs in a job. SLURM's notice of a time limit or a preemption puts the same job into the queue again."""

    def __init__(self, entry: Entry, argv: Sequence[str], log: Path) -> None:
        self._entry, self._argv, self._log, self._cwd = entry, tuple(argv), log, os.getcwd()

    def __call__(self) -> int:
        """Run the command."""
        return run_logged(self._entry, self._argv, self._log, self._cwd)

    def checkpoint(self) -> Any:
        """What is put into the queue again: a job skips what is done."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


class SlurmLauncher(Launcher):
    """One array for the jobs of a round. Files of submitit are in the folder of logs."""

    def run(self, jobs: Sequence[Job]) -> dict[str, Outcome]:
        """See `Launcher`.

        Raises:
            ConfigError: if submitit is not installed, or refuses an option.
            LaunchError: if the jobs cannot be submitted.
        """
        executor = self._executor()
        try:
            with executor.batch():
                submitted = [executor.submit(CommandJob(self.entry, job.argv, self.log_of(job))) for job in jobs]
        except (OSError, RuntimeError) as error:
            raise LaunchError(f"the jobs cannot be submitted to SLURM: {error}") from error
        try:
            while not all(job.done() for job in submitted):
                time.sleep(POLL_SECONDS)
        except BaseException:
            for job in submitted:
                job.cancel(check=False)
            raise
        return {job.name: _outcome(handle) for job, handle in zip(jobs, submitted, strict=True)}

    def _executor(self) -> Any:
        try:
            import submitit
        except ImportError as error:
            raise ConfigError("the launcher slurm needs submitit: pip install 'cads-select[slurm]'") from error
        options = dict(self.options)
        cluster = options.pop("cluster", "slurm")
        if self.workers is not None:
            options.setdefault("slurm_array_parallelism", self.workers)
        try:
            executor = submitit.AutoExecutor(
                folder=self.folder / "submitit", cluster=cluster, slurm_max_num_timeout=self.retries
            )
            executor.update_parameters(**options)
        except (RuntimeError, ValueError, TypeError, NameError, AssertionError) as error:
            raise ConfigError(f"launcher_options = {dict(self.options)}: submitit refuses them: {error}") from error
        return executor


def _outcome(job: Any) -> Outcome:
    """How a job of submitit has ended."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return Outcome(int(job.result()))
    except (FailedJobError, UncompletedJobError) as error:
        lines = str(error).strip().splitlines() or ["it failed"]
        return Outcome(None, f"job {job.job_id} was lost: {lines[0][:REASON]}")
