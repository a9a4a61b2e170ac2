"""Shards on a Ray cluster: Ray Data gives them to actors, and starts again what is lost with an actor or a node."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from cads.errors import ConfigError
from cads.launch.launcher import Entry, Job, Launcher, LaunchError, Outcome, run_logged

RESOURCES = ("num_cpus", "num_gpus", "resources", "memory", "accelerator_type")
"""Options of an actor; all others go to `ray.init`."""
REASON = 200
"""Characters of a reason that are shown."""


class CommandActor:
    """Runs jobs one after another in one process, so that libraries are imported once.

    All that it needs comes with a job: arguments of an actor can be lost with the object store of a node.
    """

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Run the jobs of a batch; adds their exit statuses."""
        rows = [json.loads(str(text)) for text in batch["job"]]
        statuses = [run_logged(_entry(row["entry"]), row["argv"], Path(row["log"]), row["cwd"]) for row in rows]
        return {"name": [row["name"] for row in rows], "status": statuses}


def _entry(name: str) -> Entry:
    """The function of `module:name`."""
    module, _, function = name.partition(":")
    entry: Entry = getattr(import_module(module), function)
    return entry


class RayLauncher(Launcher):
    """Joins the cluster that `RAY_ADDRESS` or the option `address` names, or begins one on this machine."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._joined = False

    def run(self, jobs: Sequence[Job]) -> dict[str, Outcome]:
        """See `Launcher`.

        Raises:
            ConfigError: if Ray is not installed.
            LaunchError: if the cluster cannot be joined.
        """
        ray = self._join()
        common = {"entry": f"{self.entry.__module__}:{self.entry.__qualname__}", "cwd": os.getcwd()}
        described = [{"name": job.name, "argv": job.argv, "log": str(self.log_of(job)), **common} for job in jobs]
        rows = [{"job": json.dumps(job)} for job in described]
        actor = {name: value for name, value in self.options.items() if name in RESOURCES}
        free = int(ray.cluster_resources().get("CPU", 1) // actor.get("num_cpus", 1)) or 1
        size = min(len(jobs), self.workers or free)
        outcomes = {}
        try:
            results = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                CommandActor,
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=size),
                **{"num_cpus": 1, **actor},
            )
            for row in results.iter_rows():
                outcomes[str(row["name"])] = Outcome(int(row["status"]))
        except ray.exceptions.RayError as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:REASON]
            return {job.name: outcomes.get(job.name, Outcome(None, f"Ray: {reason}")) for job in jobs}
        return outcomes

    def close(self) -> None:
        """Leave the cluster; one that was begun here ends."""
        if self._joined:
            import ray

            ray.shutdown()
            self._joined = False

    def _join(self) -> Any:
        try:
            import ray
            import ray.data
        except ImportError as error:
            raise ConfigError("the launcher ray needs Ray: pip install 'cads-select[ray]'") from error
        ray.data.DataContext.get_current().enable_progress_bars = False
        if not ray.is_initialized():
            options = {name: value for name, value in self.options.items() if name not in RESOURCES}
            try:
                ray.init(**{"log_to_driver": False, "include_dashboard": False, **options})
            except (ConnectionError, ValueError, TypeError, RuntimeError, TimeoutError) as error:
                raise LaunchError(f"the Ray cluster cannot be joined ({options}): {error}") from error
            self._joined = True
        return ray
