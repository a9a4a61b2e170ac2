"""The published vision setting: CIFAR-10 in five sources of label noise, selection paid for in two ways.

    python -m experiments.cifar10 --out runs/cifar10 --download
    python -m experiments.cifar10 --out runs/cifar10 --parquet TRAIN.parquet TEST.parquet
    python -m experiments.cifar10 --out runs/cifar10 --results experiments/results/cifar10-noise.md

Task, models, budgets and methods are those of `experiments/configs/cifar10-noise.yaml`. The best rival of
`experiments.leaderboard`, `cads` without one of its parts, and the clean source with the target are run too. Images
come from torchvision's files in `--data`, or from two Parquet files with the columns `img` and `label`.

Finished cells are in `OUT/cells.jsonl`; the same command goes on from there, the cheapest budgets first. `--results`
writes the page and the figure of the cells that are there, and the cells as `.jsonl`: as `OUT/cells.jsonl`, they go on
elsewhere.
"""

from __future__ import annotations

import argparse
import io
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from baselines.source import Source
from cads.accounting.budget import Budget
from cads.accounting.ledger import Ledger
from cads.errors import DataError
from cads.monitor import Monitor
from cads.runtime.atomic_files import whole_folder
from cads.selection import Selection
from cads.study.grid import Grid, GridEntry, read_grid, settings
from cads.task import Task
from cads.tasks.vision.config import VisionConfig
from experiments import online
from experiments.cifar10_report import write_page
from experiments.leaderboard import RIVALS, Rival
from experiments.online import Method, run_missing
from experiments.online_report import ABLATIONS
from experiments.worlds import World

CONFIG = Path(__file__).parent / "configs" / "cifar10-noise.yaml"
POOL = 45_000
"""Images of the pool."""
BEST_RIVAL = "mixmin"
"""The rival of the lowest mean regret in `experiments/results/leaderboard.md`."""
PARTS = ABLATIONS[:3]
"""`cads` without one of its parts, to tell what each does here."""
CLEAN_AND_TARGET = "clean and target, known beforehand"
ABOUT = (
    "5,000 clean images of CIFAR-10 are the target. The other 45,000 are the pool: five equal sources with 0, 22.5, "
    "45, 67.5 and 90 % of wrong labels. The test set has 10,000 images.",
    "Of the paper, the abstract and the figures below are known here. What surely differs: the networks are small. "
    "`resnet8` is the residual network of He et al. (2016) with eight layers, of 8, 16 and 32 channels (or of 16, "
    "32 and 64), with batch normalisation and a first stride of 2. `cnn` has two convolutions, of 16 and 32 "
    "channels. They train by AdamW in float32, in batches of 128, at a peak rate of 0.003 with a cosine. Images are "
    "flipped and cropped at random (by 4 pixels at most) only where the name of a model says so. This is the recipe "
    "of `compare-vision.yaml`. Nothing was tuned; batches of 64 are one or two points better at 1 pass, and take a "
    "quarter more time. The images are from a public copy in JPEG files, which is not the same in every pixel.",
    "`cads` trains on the target too, as joint training does. `cads-s-penalty` and `cads-e-penalty` are the penalty "
    "forms as they are built here (`docs/published.md`), and not the authors' code.",
)
"""What the page says about task and recipe."""


@dataclass
class WithTarget(Source):
    """One source and the target, by their sizes: with the source of the right labels, what selection could reach."""

    def select(
        self, task: Task, budget: Budget, *, seed: int, ledger: Ledger, monitor: Monitor | None = None
    ) -> Selection:
        """Select the source, and take the target into the training; see `cads.selector.Selector`."""
        alone = super().select(task, budget, seed=seed, ledger=ledger, monitor=monitor)
        n_target = len(task.target)
        return replace(alone, target_fraction=n_target / (n_target + int(alone.selected.sum())))


def worlds(grid: Grid) -> dict[str, World]:
    """The task with each model, by the label of the model; its data seed is set later."""
    result: dict[str, World] = {}
    for setting in settings(grid):
        assert isinstance(setting.config, VisionConfig)
        result.setdefault(setting.model, World(setting.model, setting.config, setting.train))
    return result


def method(grid: Grid, entry: GridEntry) -> Method:
    """A method of the grid."""
    on_top = entry.count_selection is False
    return Method(grid.name(entry), entry.method, entry.options, on_top=on_top)


def methods(grid: Grid) -> list[Method]:
    """Those of the grid, the best rival, `cads` without one of its parts, and the clean source with the target.

    The budget covers the selection of all but those of the grid that say otherwise.
    """
    clean = Rival(CLEAN_AND_TARGET, "source", {"name": "clean"}, kind=WithTarget)
    further = [*(x for x in RIVALS if x.name == BEST_RIVAL), *(x for x in online.methods(()) if x.name in PARTS)]
    return [*(method(grid, entry) for entry in grid.methods), *further, clean]


def passes(grid: Grid) -> list[float]:
    """The budgets of the grid, usages or passes, in passes over the pool."""
    budgets = [Budget.parse(text) for text in grid.budgets]
    return [budget.amount / (POOL if budget.unit == "usages" else 1) for budget in budgets]


def write_arrays(parquet: Sequence[Path], folder: Path) -> None:
    """Decode images in two Parquet files, for training and for the test, to arrays that `dataset: arrays` reads.

    Raises:
        DataError: if a file cannot be read, or has other columns.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    with whole_folder(folder) as partial:
        for split, path in zip(("train", "test"), parquet, strict=True):
            try:
                table = pq.read_table(path, columns=["img", "label"])
                files = [row["bytes"] for row in table["img"].to_pylist()]
                images = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
            except (OSError, pa.ArrowException, KeyError, TypeError) as error:
                raise DataError(f"{path} cannot be read: {error}; it needs the columns img and label") from error
            (partial / split).mkdir()
            np.save(partial / split / "images.npy", np.stack(images))
            np.save(partial / split / "labels.npy", table["label"].to_numpy())


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished cells")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the grid")
    parser.add_argument("--data", type=Path, help="folder of torchvision's files (default: as the grid says)")
    parser.add_argument("--download", action="store_true", help="allow torchvision to fetch them")
    parser.add_argument("--parquet", nargs=2, type=Path, metavar=("TRAIN", "TEST"), help="images in Parquet files")
    parser.add_argument("--worlds", nargs="+", default=None, metavar="MODEL", help="models (default: the grid's)")
    parser.add_argument("--passes", nargs="+", type=float, default=None, help="budgets (default: the grid's)")
    parser.add_argument("--methods", nargs="+", default=None, help="only those of these names")
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="default: as many as the grid says")
    parser.add_argument("--results", type=Path, default=None, help="Markdown file; its figure stands beside it")
    return parser.parse_args(argv)


def data_fields(options: argparse.Namespace) -> dict[str, object]:
    """The fields of the task that say where its images are."""
    if options.parquet:
        arrays = options.out / "images"
        if not arrays.exists():
            options.out.mkdir(parents=True, exist_ok=True)
            write_arrays(options.parquet, arrays)
        return {"dataset": "arrays", "path": str(arrays)}
    given: dict[str, object] = {"download": True} if options.download else {}
    return {**given, "path": str(options.data)} if options.data else given


def main(argv: Sequence[str] | None = None) -> None:
    """Run all cells that are not there yet, or report on those that are."""
    options = parse(argv)
    if options.results is not None:
        command = shlex.join(["python", "-m", "experiments.cifar10", *(argv or sys.argv[1:])])
        cells = options.out / "cells.jsonl"
        grid = read_grid(options.config)
        planned = [(model.label, budget) for model in grid.models for budget in passes(grid)]
        write_page(cells, options.results, command, methods(grid), " ".join(ABOUT), planned)
        return
    grid = read_grid(options.config, {"task": data_fields(options)})
    by_model = worlds(grid)
    options.worlds = options.worlds or list(by_model)
    options.targets = sorted({world.task.n_target for world in by_model.values()})
    options.seeds = options.seeds or list(range(grid.seeds))
    options.passes = options.passes or passes(grid)
    run_missing(options, lambda _: methods(grid), by_model.__getitem__)


if __name__ == "__main__":
    main()
