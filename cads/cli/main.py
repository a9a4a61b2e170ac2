"""The command line: `cads plan`, `select`, `train`, `compare`, `report`. One YAML file and flags fill dataclasses."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.logging import RichHandler

from cads.cli.commands import plan, select, train
from cads.cli.study_commands import compare, report
from cads.errors import CadsError
from cads.runtime.processes import TIMEOUT, TIMEOUT_VARIABLE, close, is_shared, world_group
from cads.runtime.signals import Interrupted

READING = ("plan", "select", "train")
"""Commands that read their data once, and say how."""
USAGE = f"""usage: cads COMMAND [CONFIG] [flags]

What should I train on, given a pool, a validation set, a model and a compute budget in FLOPs?

commands:
  plan     say what each method would cost and what is left to train with; spends nothing
  select   choose what to train on, and write a Selection
  train    train the final model on a Selection within the budget, and test it
  compare  run a grid of methods, budgets, seeds, model sizes and tasks
  report   figures, fits and one page of HTML from the results of a grid

`cads COMMAND --help` explains every field; `cads COMMAND --print_config` writes the whole configuration.

several processes: `accelerate launch --multi_gpu --num_processes N -m cads COMMAND ...`, or
`torchrun --nproc_per_node N -m cads COMMAND ...`; on CPUs where there is no GPU, or with ACCELERATE_USE_CPU=true.
They divide training, replicas, scoring and gradients; the result is that of one process up to rounding. One waits
{TIMEOUT:g} s for another, or {TIMEOUT_VARIABLE} seconds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 refused with a reason, 2 bad usage,
    128 + n stopped by signal n)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], None]] = {
        "plan": plan,
        "select": select,
        "train": train,
        "compare": compare,
        "report": report,
    }
    console = Console(stderr=True)
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console, show_path=False)]
    )
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in commands:
        console.print(f"cads: command {argv[0]!r} is unknown: use one of {', '.join(commands)}", style="red")
        return 2
    try:
        first = world_group().first
        if not first:
            logging.getLogger().setLevel(logging.ERROR)
        logging.getLogger("cads.tasks").setLevel(logging.INFO if first and argv[0] in READING else logging.NOTSET)
        commands[argv[0]](argv[1:])
        close()
    except Interrupted as stopped:
        _say(console, stopped, f"cads: {stopped}", "yellow")
        return stopped.status
    except KeyboardInterrupt:
        console.print("cads: stopped by SIGINT; what was finished is kept", style="yellow")
        return 128 + signal.SIGINT
    except CadsError as error:
        _say(console, error, f"{type(error).__name__}: {error}", "red")
        return 1
    except OSError as error:
        where = f"{error.filename!r}: " if error.filename else ""
        _say(console, error, f"cads: {where}{error.strerror or error}", "red")
        return 1
    return 0


def _say(console: Console, error: Exception, text: str, style: str) -> None:
    """Say why a command ends: the first process, and any that is alone with its reason."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0 or not (is_shared(error) or isinstance(error, Interrupted)):
        console.print(f"process {rank}: {text}" if rank else text, style=style, markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
