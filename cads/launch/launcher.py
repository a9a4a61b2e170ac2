"""What a launcher does, and the loop around it: start what is pending, watch, start again what was lost.

A job is a command that can be stopped and given again at any moment: it skips what is done. So a launcher needs no
state of its own. What is pending is read from the folder of results, before every round.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cads.errors import CadsError, ConfigError

LauncherName = Literal["local", "slurm", "ray"]
WAITS = 75
"""Exit status of a command that has done its part and waits for others (EX_TEMPFAIL of sysexits.h)."""
MAX_SHARDS = 1000
"""Most shards that are started if none are asked for: arrays of SLURM have at most 1001 tasks by default."""
TAIL = 5
"""Last lines of a log that are shown of a job that failed."""

Entry = Callable[[Sequence[str]], int]
"""Runs a command line in this process, and returns its exit status."""
Say = Callable[[str], None]


class LaunchError(CadsError):
    """Jobs that could not be brought to their end."""


class WaitsError(CadsError):
    """A command that has done its part, and can go on when others have done theirs."""

    status = WAITS


@dataclass(frozen=True)
class Job:
    """A command of this package.

    Attributes:
        name: of the job and of its log. argv: the words after `cads`.
    """

    name: str
    argv: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: its exit status; None if it was lost with its process or its machine. reason: in words, or "".
    """

    status: int | None
    reason: str = ""

    @property
    def ended_well(self) -> bool:
        """Whether it has done its part."""
        return self.status in (0, WAITS)


@dataclass
class LaunchSettings:
    """Where the shards of a command run."""

    launcher: LauncherName | None = None
    """Start all shards: local (processes of this machine), slurm (an array of jobs, by submitit), ray (actors)."""
    shards: int | None = None
    """launcher: how many; null: one for each file or cell, at most 1000; local: as many as workers."""
    workers: int | None = None
    """launcher: how many run at once; null: one a core (local), all that are free (ray), no limit (slurm)."""
    retries: int = 3
    """launcher: how often a shard that fails or is lost is started again."""
    launcher_options: dict[str, Any] = field(default_factory=dict)
    """launcher: slurm: parameters of submitit, such as slurm_partition, timeout_min, gpus_per_node, or cluster: local;
    ray: num_cpus and num_gpus of an actor; others go to `ray.init`, such as address."""

    def __post_init__(self) -> None:
        for name, least in (("shards", 1), ("workers", 1), ("retries", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} = {value}: it must be at least {least}")
        if self.launcher is None:
            given = [name for name in ("shards", "workers", "launcher_options") if getattr(self, name)]
            if given:
                raise ConfigError(
                    f"{', '.join(given)}: without effect without a launcher; give --launcher, or drop them"
                )


class Launcher(ABC):
    """Runs jobs somewhere.

    Args:
        folder: for logs; all machines see it. entry: runs a job in the process that a launcher has started.
        settings: how many at once, and options.
    """

    def __init__(self, folder: Path, entry: Entry, settings: LaunchSettings) -> None:
        self.folder, self.entry = folder.absolute(), entry
        self.workers, self.retries = settings.workers, settings.retries
        self.options: Mapping[str, Any] = settings.launcher_options

    @abstractmethod
    def run(self, jobs: Sequence[Job]) -> dict[str, Outcome]:
        """Run all jobs, and wait for them. Returns how each ended, by name."""

    def close(self) -> None:
        """Give back what was taken to run jobs."""
        return

    def log_of(self, job: Job) -> Path:
        """The log of a job."""
        return self.folder / f"{job.name}.log"


def launch(launcher: Launcher, pending: Callable[[], Sequence[Job]], say: Say) -> None:
    """Run what is pending until nothing is.

    Args:
        pending: the jobs that have something to do now. A job may have several parts, each pending after the other.
        say: is told of every job that is started again.

    Raises:
        LaunchError: if a job has failed more than `launcher.retries` times; it names the job and its log.
    """
    launcher.folder.mkdir(parents=True, exist_ok=True)
    failures: Counter[str] = Counter()
    reasons: dict[str, str] = {}
    with contextlib.closing(launcher):
        while jobs := pending():
            tired = [job for job in jobs if failures[job.name] > launcher.retries]
            if tired:
                raise LaunchError(_given_up(launcher, tired, reasons))
            outcomes = launcher.run(jobs)
            lost = {job.name: outcomes.get(job.name, Outcome(None, "it was lost")) for job in jobs}
            failed = {name: outcome for name, outcome in lost.items() if not outcome.ended_well}
            if not failed and {job.argv for job in pending()} == {job.argv for job in jobs}:
                # They say that they are done, and nothing has changed: others may hold what they need.
                failed = dict.fromkeys(lost, Outcome(0, "it ended and left its part undone"))
            for name, outcome in failed.items():
                failures[name] += 1
                reasons[name] = outcome.reason or f"exit status {outcome.status}"
                say(f"{name}: {reasons[name]}; {_prospect(failures[name], launcher.retries)}")


def run_logged(entry: Entry, argv: Sequence[str], log: Path, cwd: str) -> int:
    """Run a command in this process, with what it prints appended to `log`; returns its exit status."""
    os.chdir(cwd)
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("a", encoding="utf-8") as stream,
        contextlib.redirect_stdout(stream),
        contextlib.redirect_stderr(stream),
    ):
        try:
            return entry(list(argv))
        except SystemExit as end:
            return end.code if isinstance(end.code, int) else 1


def tail_of(log: Path) -> str:
    """The last lines of a log, for a message."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    except OSError:
        return ""
    return " / ".join([line for line in lines if line][-TAIL:])


def _prospect(failures: int, retries: int) -> str:
    return f"started again ({failures} of {retries})" if failures <= retries else "given up"


def _given_up(launcher: Launcher, jobs: Sequence[Job], reasons: Mapping[str, str]) -> str:
    first = jobs[0]
    last = tail_of(launcher.log_of(first))
    return (
        f"{len(jobs)} shards failed {launcher.retries + 1} times, such as {first.name} ({reasons[first.name]}): look "
        f"at {launcher.log_of(first)}{f', which ends: {last}' if last else ''}; the same command goes on from here"
    )
