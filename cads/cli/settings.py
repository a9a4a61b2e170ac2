"""The settings that commands have beside task, recipe and selector. Their docstrings are the help texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from cads.accounting.costs import AccountingName


@dataclass
class CommandSettings:
    """Settings of a command that works on one task with one method."""

    command: ClassVar[str]
    description: ClassVar[str]

    budget: float | str = "5 epochs"
    """'2e15' FLOPs, '225000 usages', '5 epochs', '3e6 tokens', '30 minutes', '$5 at 2.50 an hour'."""
    count_selection: bool = False
    """The budget covers selection too."""
    seed: int = 0
    """Of everything that is drawn."""
    out: str | None = None
    """Folder of the run; null: runs/NAME, after the configuration file and the method."""
    overwrite: bool = False
    """Begin anew, whatever the folder holds."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    progress: bool = True
    """Show a progress bar."""


@dataclass
class PlanSettings(CommandSettings):
    """Settings of `cads plan`."""

    command: ClassVar[str] = "plan"
    description: ClassVar[str] = (
        "Say what each method would cost and what is left to train with; nothing is trained, no weights are loaded."
    )

    accounting: AccountingName = "analytic"
    """How FLOPs are counted."""
    json: str | None = None
    """File for the plan as JSON."""
    flops_per_second: float | None = None
    """For the times; null: measured."""
    methods: list[str] | None = None
    """Names; null: all that are known."""
    selectors: dict[str, Any] = field(default_factory=dict)
    """Options of other methods, by name."""


@dataclass
class CheckSettings(CommandSettings):
    """Settings of `cads check`."""

    command: ClassVar[str] = "check"
    description: ClassVar[str] = (
        "Report on the data: sizes, sources, lengths, copies, what was left out. Nothing is spent or written, and no "
        "weights are loaded."
    )


@dataclass
class SelectSettings(CommandSettings):
    """Settings of `cads select`."""

    command: ClassVar[str] = "select"
    description: ClassVar[str] = "Choose what to train on, and write a Selection."

    shard: str | None = None
    """i/n: score the i-th of n parts of the pool's files, and skip what is done; slurm: the place in SLURM's array."""
    merge: bool = False
    """Select from the scores of all shards."""


@dataclass
class TrainSettings(CommandSettings):
    """Settings of `cads train`."""

    command: ClassVar[str] = "train"
    description: ClassVar[str] = (
        "Train the final model within the budget, and test it: on a Selection, or by a method that selects first, or "
        "while it trains."
    )

    selection: str | None = None
    """Folder that `cads select` wrote; null: the method selects."""
    merge: bool = False
    """Write adapters into the model they stand on."""
    eval: list[str] | str | None = None
    """Further evaluations of the task, one or a list: choices, exact_match, lm_eval:TASKS. They come after the model is
    written, and can be added to a finished training."""


@dataclass
class ExportSettings:
    """Settings of `cads export`."""

    to: Literal["jsonl", "parquet", "files"]
    """jsonl or parquet: the chosen rows; files: a list of the chosen images, relative to the folder of the pool."""
    output: str
    """File to write."""
    weights: Literal["column", "resample"] = "column"
    """column: add each example's weight in training (sum 1; to a list of images: after a tab, if not equal). resample:
    repeat rows by it, as many in all as are selected."""
    seed: int = 0
    """Of the draws of resample."""
    weight_column: str | None = "weight"
    """Name of the column of weights; null: none."""
    source_column: str | None = "source"
    """Name of the column of sources, if the pool had any; null: none."""
    overwrite: bool = False
    """Replace the output if it exists."""


@dataclass
class ReportSettings:
    """Settings of `cads report`."""

    out: str | None = None
    """HTML file; null: report.html in the folder of results. Fits and figures go beside it."""
    metric: str | None = None
    """Another metric of the test set than the one of the grid."""
