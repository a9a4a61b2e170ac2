"""Data selection for small language models: data, pretrained models, a grid of methods, a report.

    python -m experiments.language experiments/configs/instruct-small.yaml [--out DIR] [--results FILE.md]

The configuration is a grid of `cads compare` with further sections: `data` (`experiments.language_data`), `sizes` (of
the models) and `pretraining` (`experiments.pretraining`). The data is written to DIR/data, the grid with all paths to
DIR/grid.yaml. Finished cells are kept, so that a run that was stopped resumes; `--shard i/n` divides the cells among
processes.
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
from experiments.pretraining import MODEL_CACHE, PretrainingConfig, pretrained

SECTIONS = ("data", "pretraining", "sizes")
"""Sections of a configuration that are no part of the grid."""
MODELS = "models"
"""Folder in the run directory with links to the models, named by their sizes."""


@dataclass(frozen=True)
class Prepared:
    """The files that a grid needs.

    Attributes:
        data: files of pool, target and test set. models: folders of models by size.
        grid: the file of the grid, with all paths.
    """

    data: DataFolder
    models: dict[str, Path]
    grid: Path


def prepare(
    sections: Mapping[str, Any],
    out: Path,
    *,
    sizes: Sequence[str] = (),
    files: Sequence[str] = (),
    model_cache: Path = MODEL_CACHE,
    console: Console | None = None,
) -> Prepared:
    """Write the data, pretrain the models that do not exist yet, and write the grid.

    Args:
        sections: of a configuration. out: the run directory. sizes: of the models, in place of the configuration's.
        files: the user's own corpora, as NAME=PATH. model_cache: folder where pretrained models are kept.

    Raises:
        CadsError: if the configuration, or a corpus or model that it names, cannot be used.
    """
    config = data_config(sections["data"], files)
    sizes = list(sizes or sections.get("sizes") or [])
    data = DataFolder(out / "data", config)
    grid = {name: value for name, value in sections.items() if name not in SECTIONS}
    grid["kind"] = "language"
    # Fields in the configuration take precedence over those that follow from the data.
    grid["task"] = {**data.task(), **(sections.get("task") or {})}
    pretraining: PretrainingConfig | None = None
    if sizes:
        if not config.text:
            raise ConfigError(f"sizes = {sizes} are pretrained on text: set data.text: true")
        pretraining = filled(PretrainingConfig, sections.get("pretraining") or {}, "pretraining")
        pretraining.shapes(sizes)
    out.mkdir(parents=True, exist_ok=True)
    write_data(config, data.folder)
    models: dict[str, Path] = {}
    if pretraining is not None:
        tokenizer_files = [Path(data.file(s.name)) for s in config.sources if s.spoil is None]
        models = pretrained(sizes, Path(data.file("text")), tokenizer_files, pretraining, model_cache, console)
        grid["models"] = [{"label": size, "task": {"model": str(folder)}} for size, folder in models.items()]
        link_models(models, out / MODELS)
    file = out / "grid.yaml"
    whole_file(file, yaml.safe_dump(grid, sort_keys=False))
    return Prepared(data, models, file)


def link_models(models: Mapping[str, Path], folder: Path) -> None:
    """Link the models in `folder` under the names of their sizes, for configurations that are written by hand."""
    folder.mkdir(parents=True, exist_ok=True)
    for size, model in models.items():
        link = folder / size
        # A correct link is left in place: other shards may be reading through it.
        if link.resolve() != model.resolve():
            link.unlink(missing_ok=True)
            link.symlink_to(model.resolve(), target_is_directory=True)


def described(prepared: Prepared) -> list[str]:
    """Sentences that describe data and models."""
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
    parser.add_argument("--results", type=Path, help="Markdown file for a report")
    parser.add_argument("--sizes", default="", help="sizes of models, separated by commas, in place of the config's")
    parser.add_argument(
        "--models",
        type=Path,
        default=MODEL_CACHE,
        help=f"folder where pretrained models are kept (default: {MODEL_CACHE})",
    )
    parser.add_argument(
        "--file", action="append", default=[], metavar="NAME=PATH", help="your own corpus; repeat for more"
    )
    parser.add_argument("--shard", default="1/1", help="i/n: run every n-th cell from the i-th on")
    parser.add_argument("--dry-run", action="store_true", help="print plan and price of every cell, but run none")
    parser.add_argument("--prepare", action="store_true", help="write data, models and grid, and run no cell")
    args = parser.parse_args(argv)
    out = args.out or Path("runs") / args.config.stem
    console, started = Console(), time.perf_counter()
    try:
        shard = GridShard.parse(args.shard)
        sizes = [size for size in args.sizes.split(",") if size]
        sections = read_sections(args.config)
        prepared = prepare(sections, out, sizes=sizes, files=args.file, model_cache=args.models, console=console)
        console.print(f"data         {prepared.data.folder}", highlight=False, soft_wrap=True)
        console.print(f"grid         {prepared.grid}", highlight=False, soft_wrap=True)
        grid = read_grid(prepared.grid)
        if args.prepare:
            return 0
        run_grid(grid, out, shard, console, dry=args.dry_run)
        if args.results and not args.dry_run:
            command = f"python -m experiments.language {args.config} --results {args.results}"
            text = report(grid, args.config.stem, command, described(prepared), out, prepared.data.texts())
            args.results.parent.mkdir(parents=True, exist_ok=True)
            args.results.write_text(text, "utf-8")
    except CadsError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 1
    console.print(f"finished in {time.perf_counter() - started:.0f} s", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
