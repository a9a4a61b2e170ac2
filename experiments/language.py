"""Data selection for small language models: data, pretrained models, a grid of methods, a report.

    python -m experiments.language experiments/configs/instruct-small.yaml [--out DIR] [--results FILE.md]

The configuration is a grid of `cads compare` with two sections besides: `data` (`experiments.language_data`) and
`pretraining` (`experiments.pretraining`). The data is written to DIR/data, the grid with all paths to DIR/grid.yaml.
Finished cells are kept, so that a run that was stopped goes on where it was; `--shard i/n` divides it among processes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cads.cli.study_commands import run_grid
from cads.errors import CadsError, ConfigError
from cads.runtime.atomic_files import whole_file
from cads.study.grid import filled, read_grid
from cads.study.shard import GridShard
from experiments.language_data import MANIFEST, DataFolder, data_config, read_sections, write_data
from experiments.language_report import report
from experiments.pretraining import KEPT, PretrainingConfig, pretrained

SECTIONS = ("data", "pretraining", "sizes")
"""What a configuration has beside the grid."""
MODELS = "models"
"""In the run directory: links to the models, by size."""


@dataclass(frozen=True)
class Prepared:
    """What a grid needs.

    Attributes:
        data: the files. models: folders by size. grid: the file of the grid, with all paths.
    """

    data: DataFolder
    models: dict[str, Path]
    grid: Path


def prepare(
    given: Mapping[str, Any],
    out: Path,
    *,
    sizes: Sequence[str] = (),
    files: Sequence[str] = (),
    kept: Path = KEPT,
    console: Console | None = None,
) -> Prepared:
    """Write the data, pretrain the models that are not there yet, and write the grid.

    Args:
        given: the sections of a configuration. out: the run directory. sizes: of the models, if other ones.
        files: corpora of one's own, as NAME=PATH. kept: where pretrained models are kept.

    Raises:
        CadsError: if the configuration, or what it needs, cannot be used.
    """
    config = data_config(given["data"], files)
    sizes = list(sizes or given.get("sizes") or [])
    data = DataFolder(out / "data", config)
    grid = {name: value for name, value in given.items() if name not in SECTIONS}
    grid["kind"] = "language"
    # Fields that the configuration gives win over what follows from the data.
    grid["task"] = {**data.task(), **(given.get("task") or {})}
    pretraining: PretrainingConfig | None = None
    if sizes:
        if not config.text:
            raise ConfigError(f"sizes = {sizes} are pretrained on text: set data.text: true")
        pretraining = filled(PretrainingConfig, given.get("pretraining") or {}, "pretraining")
        pretraining.shapes(sizes)
    out.mkdir(parents=True, exist_ok=True)
    write_data(config, data.folder)
    models: dict[str, Path] = {}
    if pretraining is not None:
        more = [Path(data.file(s.name)) for s in config.sources if s.spoil is None]
        models = pretrained(sizes, Path(data.file("text")), more, pretraining, kept, console)
        grid["models"] = [{"label": size, "task": {"model": str(folder)}} for size, folder in models.items()]
        link_models(models, out / MODELS)
    file = out / "grid.yaml"
    whole_file(file, yaml.safe_dump(grid, sort_keys=False))
    return Prepared(data, models, file)


def link_models(models: Mapping[str, Path], folder: Path) -> None:
    """Name the models by their size in `folder`, for configurations that are written by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    for size, model in models.items():
        link = folder / size
        # Other shards may be reading it.
        if link.resolve() != model.resolve():
            link.unlink(missing_ok=True)
            link.symlink_to(model.resolve(), target_is_directory=True)


def described(prepared: Prepared) -> list[str]:
    """Sentences on data and models."""
    manifest = json.loads((prepared.data.folder / MANIFEST).read_text("utf-8"))
    config, rows = prepared.data.config, manifest["rows"]
    sources = ", ".join(f"{s.name} {s.n}" for s in config.sources)
    sentences = [
        f"Target: {config.n_target} examples of {config.skill}; test: {rows['test']} others of it; "
        f"pool: {sources}. Each seed draws its own pool and target from {rows['target']} rows of the target and "
        f"{rows[config.sources[0].name]} of {config.sources[0].name}, and so on.",
    ]
    for size, folder in prepared.models.items():
        results = json.loads((folder / "results.json").read_text("utf-8"))
        training = next(record for record in results["ledger"] if record["phase"] == "train")
        sentences.append(
            f"{size}: pretrained from scratch on {training['tokens']:,} tokens of news for {training['flops']:.3g} "
            f"FLOPs, perplexity {results['metrics']['perplexity']:.0f} on news held out."
        )
    return sentences


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment of a configuration file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, help="run directory (default: runs/NAME of the config)")
    parser.add_argument("--results", type=Path, help="also write a report here, as Markdown")
    parser.add_argument("--sizes", default="", help="comma-separated sizes of models, in place of the config's")
    parser.add_argument("--models", type=Path, default=KEPT, help=f"where pretrained models are kept (default: {KEPT})")
    parser.add_argument("--file", action="append", default=[], metavar="NAME=PATH", help="a corpus of one's own")
    parser.add_argument("--shard", default="1/1", help="i/n: run every n-th cell from the i-th on")
    parser.add_argument("--dry-run", action="store_true", help="print plan and price of every cell, train nothing more")
    parser.add_argument("--prepare", action="store_true", help="write data, models and grid, and stop there")
    given = parser.parse_args(argv)
    out = given.out or Path("runs") / given.config.stem
    console, started = Console(), time.perf_counter()
    try:
        shard = GridShard.parse(given.shard)
        sizes = [size for size in given.sizes.split(",") if size]
        sections = read_sections(given.config)
        prepared = prepare(sections, out, sizes=sizes, files=given.file, kept=given.models, console=console)
        console.print(f"data         {prepared.data.folder}", highlight=False, soft_wrap=True)
        console.print(f"grid         {prepared.grid}", highlight=False, soft_wrap=True)
        grid = read_grid(prepared.grid)
        if given.prepare:
            return 0
        run_grid(prepared.grid, out, shard, console, dry=given.dry_run)
        if given.results and not given.dry_run:
            command = f"python -m experiments.language {given.config} --results {given.results}"
            text = report(grid, given.config.stem, command, described(prepared), out, prepared.data.texts())
            given.results.parent.mkdir(parents=True, exist_ok=True)
            given.results.write_text(text, "utf-8")
    except CadsError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 1
    console.print(f"finished in {time.perf_counter() - started:.0f} s", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
