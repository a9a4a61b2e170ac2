"""The command `cads export`."""

from __future__ import annotations

from rich.console import Console

from cads.api import export as export_selection
from cads.cli.config import read_export
from cads.runtime.processes import world_group


def export(argv: list[str]) -> None:
    """Write the rows or images that a Selection chose.

    Raises:
        CadsError: if they cannot be exported.
    """
    world = world_group()
    settings = world.locally(lambda: read_export(argv)).as_dict()
    settings.pop("config", None)
    count = world.on_rank_zero(lambda: export_selection(**settings))
    unit = "images" if settings["to"] == "files" else "rows"
    Console(quiet=not world.first).print(f"{count:,} {unit}: {settings['output']}", highlight=False, soft_wrap=True)
