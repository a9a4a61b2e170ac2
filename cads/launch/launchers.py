"""The launchers by name. What one needs is imported when it is asked for."""

from __future__ import annotations

from pathlib import Path

from cads.launch.launcher import Entry, Launcher, LaunchSettings


def make_launcher(settings: LaunchSettings, folder: Path, entry: Entry) -> Launcher:
    """The launcher that the settings name; see `Launcher`."""
    if settings.launcher == "slurm":
        from cads.launch.slurm import SlurmLauncher

        return SlurmLauncher(folder, entry, settings)
    if settings.launcher == "ray":
        from cads.launch.ray_actors import RayLauncher

        return RayLauncher(folder, entry, settings)
    from cads.launch.local import LocalLauncher

    return LocalLauncher(folder, entry, settings)
