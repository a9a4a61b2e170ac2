"""The entry point of the command line. It imports little, so that help and version take no time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from difflib import get_close_matches

from cads import __version__
from cads.runtime.timeout import TIMEOUT, TIMEOUT_VARIABLE

COMMANDS = {
    "init": "cads.cli.init_command",
    "check": "cads.cli.check_command",
    "plan": "cads.cli.commands",
    "select": "cads.cli.commands",
    "train": "cads.cli.commands",
    "export": "cads.cli.export_command",
    "compare": "cads.cli.study_commands",
    "report": "cads.cli.study_commands",
}
"""The module of each command. Its function of the same name runs the command."""
GLOSSARY = "glossary"
"""A command that reads a page, and no data."""
USAGE = f"""usage: cads COMMAND [CONFIG] [flags]

What should I train on, given a pool, a validation set, a model and a compute budget in FLOPs?

commands:
  init     look at files or folders, and write a configuration for them; or a template
  check    report on the data: sizes, sources, copies, what was left out; spends nothing
  plan     say what each method would cost and what is left to train with; spends nothing
  select   choose what to train on, and write a Selection
  train    train the final model within the budget, and test it; selects, unless a Selection is given
  export   write the rows that a Selection chose, as they stand in your files, or a list of images
  compare  run a grid of methods, budgets, seeds, model sizes and tasks
  report   figures, fits and one page of HTML from the results of a grid
  glossary say what the words of tables, figures and messages mean: all, or one, as `cads glossary probe`

`cads COMMAND --help` explains every field. `cads plan|select|train --print_config` writes the whole configuration.
`cads --version` says which version this is.

several processes: `accelerate launch --multi_gpu --num_processes N -m cads COMMAND ...`, or
`torchrun --nproc_per_node N -m cads COMMAND ...`; on CPUs where there is no GPU, or with ACCELERATE_USE_CPU=true.
They divide training, replicas, scoring and gradients; the result is that of one process up to rounding. One waits
{TIMEOUT:g} s for another, or {TIMEOUT_VARIABLE} seconds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 refused with a reason, 2 bad usage,
    128 + n stopped by signal n)."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"cads {__version__}")
        return 0
    if words[0] == GLOSSARY and "--help" not in words:
        from cads.cli.glossary import glossary

        return glossary(words[1:])
    if words[0] == GLOSSARY:
        print("usage: cads glossary [WORD]")
        return 0
    if words[0] not in COMMANDS:
        known = [*COMMANDS, GLOSSARY]
        close = get_close_matches(words[0], known, n=1)
        hint = f"did you mean {close[0]}? All: " if close else "use one of "
        print(f"cads: command {words[0]!r} is unknown: {hint}{', '.join(known)}", file=sys.stderr)
        return 2
    from cads.cli.execution import run_command

    return run_command(COMMANDS[words[0]], words[0], words[1:])


if __name__ == "__main__":
    sys.exit(main())
