"""The settings that commands have beside task, recipe and selector. Their docstrings are the help texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from cads.accounting.costs import AccountingName
from cads.runtime.trackers import Track


@dataclass
class CommandSettings:
    """Settings of a command that works on one task with one method."""

    command: ClassVar[str]
    description: ClassVar[str]
    idle: ClassVar[tuple[str, ...]] = ()
    """Settings and sections that a file may have and that do nothing here: help leaves them out."""

    budget: float | str = "5 epochs"
    """'2e15' FLOPs, '225000 usages', '5 epochs', '2M tokens', '30 minutes', '$5 at 2.50 an hour'."""
    count_selection: bool = False
    """The budget covers selection too."""
    seed: int = 0
    """Of everything that is drawn."""
    out: str | None = None
    """Folder of the run; null: runs/NAME, after the configuration file (or the files of the pool) and the method."""
    overwrite: bool = False
    """Begin anew, whatever the folder holds."""
    track: Track = "tensorboard"
    """Where curves are kept, one or a list: tensorboard, wandb, mlflow; null: nowhere."""
    progress: bool = True
    """Show progress: a bar on a terminal, elsewhere a line every half minute."""
    validation_points: int = 20
    """How often the final training is measured on the target, for the validation curve; 0: never. It costs 5 % of the
    training's FLOPs at most, charged to evaluation, outside the budget."""


@dataclass
class PlanSettings(CommandSettings):
    """Settings of `cads plan`."""

    command: ClassVar[str] = "plan"
    description: ClassVar[str] = (
        "Say what each method would cost, what is left to train with, and what to use. Nothing is spent: some steps "
        "with random weights are timed, and no weights are loaded."
    )
    idle: ClassVar[tuple[str, ...]] = (
        "out",
        "overwrite",
        "track",
        "validation_points",
        "progress",
        "seed",
        "checkpoint",
    )

    accounting: AccountingName = "analytic"
    """How FLOPs are counted."""
    json: str | None = None
    """File for the plan as JSON."""
    flops_per_second: float | None = None
    """Speed of training, for the times, as `cads train` says it; null: some steps with random weights are timed."""
    details: bool = False
    """All methods, the stages of their selection, and why a method has no plan."""
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
    idle: ClassVar[tuple[str, ...]] = (
        *("budget", "count_selection", "seed", "out", "overwrite", "track", "validation_points", "progress", "method"),
        *("options", "checkpoint"),
    )


@dataclass
class InitSettings:
    """Settings of `cads init`."""

    template: Literal["chats", "prompts", "text", "images", "grid"] | None = None
    """What to write: chats, prompts (and responses), text, images; grid: a grid for `cads compare`. Without files it is
    a template to fill in; null: what the files are."""
    output: str = "cads.yaml"
    """The configuration that is written."""
    overwrite: bool = False
    """Replace the output if it exists."""


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

    to: Literal["jsonl", "parquet", "files", "llamafactory", "axolotl", "trl", "hub"]
    """jsonl or parquet: the chosen rows; files: a list of the chosen images, relative to the folder of the pool;
    llamafactory, axolotl or trl: a folder with the rows of each source and the trainer's own configuration of their
    mixture; hub: a data set with rows, Selection and card."""
    output: str
    """File to write; for a trainer a folder; for the hub USER/NAME."""
    weights: Literal["column", "resample"] | None = None
    """column: add each example's weight in training (sum 1; to a list of images: after a tab, if not equal). resample:
    repeat rows by it, as many in all as are selected. null: column, and for trainers resample if weights differ."""
    seed: int = 0
    """Of the draws of resample, and of the order of rows for trainers."""
    weight_column: str | None = "weight"
    """Name of the column of weights; null: none."""
    source_column: str | None = "source"
    """Name of the column of sources, if the pool had any; null: none."""
    overwrite: bool = False
    """Replace the output if it exists."""
    chat: bool = True
    """Trainers: prompts and responses as conversations; false: as text, for models without a chat template."""
    private: bool = True
    """hub: a data set that is made is private."""


@dataclass
class ReportSettings:
    """Settings of `cads report`."""

    out: str | None = None
    """HTML file; null: report.html in the folder of results. Fits and figures go beside it."""
    metric: str | None = None
    """Another metric of the test set than the one of the grid."""
