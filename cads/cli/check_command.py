"""The command `cads check`: what the data is, before anything is spent."""

from __future__ import annotations

from rich.console import Console

from cads.cli.config import read
from cads.cli.data_summary import first_examples, task_summary
from cads.cli.settings import CheckSettings
from cads.task import Task


def check(argv: list[str]) -> None:
    """Report on pool, target and test set: sizes, sources, lengths, copies and leaks. No weights are loaded."""
    config = read(CheckSettings, argv)
    task: Task = config.objects.task.build(config.objects.train)
    console = Console()
    task_summary(task).print(console)
    for line in first_examples(task):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    task.check()
    console.print("Nothing was spent. `cads plan` says what a budget buys.")
