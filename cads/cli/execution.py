"""Running a command: its logging, and the exit status of each kind of error."""

from __future__ import annotations

import logging
import os
import signal
from importlib import import_module

from rich.console import Console
from rich.logging import RichHandler

from cads.errors import CadsError
from cads.launch.launcher import WaitsError
from cads.runtime.processes import close, is_shared, world_group
from cads.runtime.signals import Interrupted

READING = ("init", "check", "plan", "select", "train")
"""Commands that read their data once, and log how they read it."""


def run_command(module: str, name: str, argv: list[str]) -> int:
    """Run the function `name` of `module` on `argv`; returns the exit status of `cads.cli.main.main`."""
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    try:
        is_first = world_group().first
        if not is_first:
            logging.getLogger().setLevel(logging.ERROR)
        logging.getLogger("cads.tasks").setLevel(logging.INFO if is_first and name in READING else logging.NOTSET)
        getattr(import_module(module), name)(argv)
        close()
    except Interrupted as interruption:
        _print_reason(console, interruption, f"cads: {interruption}", "yellow")
        return interruption.status
    except KeyboardInterrupt:
        console.print("cads: stopped by SIGINT; what was finished is kept", style="yellow")
        return 128 + signal.SIGINT
    except WaitsError as waiting:
        _print_reason(console, waiting, f"cads: {waiting}", "yellow")
        return waiting.status
    except CadsError as error:
        _print_reason(console, error, f"{type(error).__name__}: {error}", "red")
        return 1
    except OSError as error:
        file = f"{error.filename!r}: " if error.filename else ""
        _print_reason(console, error, f"cads: {file}{error.strerror or error}", "red")
        return 1
    return 0


def _print_reason(console: Console, error: Exception, text: str, style: str) -> None:
    """Print why a command ends: on the first process, and on a process that alone has the error."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or not (is_shared(error) or isinstance(error, Interrupted)):
        console.print(f"process {rank}: {text}" if rank else text, style=style, markup=False, highlight=False)
