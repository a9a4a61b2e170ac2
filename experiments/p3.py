"""Many real sources: `cads` beside what is free, on pools of P3's prompt templates.

    python -m experiments.p3 experiments/configs/p3-needle.yaml [--file p3=PATH] [--results FILE.md]

The configuration is a grid of `cads compare` with further sections: `data` (`experiments.p3_data`), `sizes` and
`pretraining` (`experiments.pretraining`), or `models` in place of these two. Each target and seed has a folder
DIR/TARGET/SEED with its data and its grid. Finished cells are kept, so that a run that was stopped resumes; flags
choose a part of the cells. The page of `--results` holds all cells that are finished; with `--no-run` it is written
alone. P3 is not part of this repository: without its file nothing is run.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from cads.cli.study_commands import run_grid
from cads.errors import CadsError, ConfigError, DataError
from cads.runtime.atomic_files import whole_file, whole_folder
from cads.study.grid import Grid, content_key, filled, read_grid
from cads.study.shard import GridShard
from cads.study.tables import DONE, OVER_BUDGET, read_rows
from experiments.corpora import read_corpus
from experiments.language import SECTIONS
from experiments.language_data import TEXT, pieces, read_sections, write_lines
from experiments.p3_choices import chance, questions, read_options
from experiments.p3_data import (
    CHOICES,
    MANIFEST,
    P3Config,
    P3Draws,
    Rows,
    fitting,
    read_p3,
    tokenizer_records,
    write_draw,
)
from experiments.p3_figure import draw
from experiments.p3_report import AGAINST, CADS, report
from experiments.p3_rivals_figure import draw_rivals
from experiments.p3_rivals_report import rivals_report
from experiments.pretraining import MODEL_CACHE, PretrainingConfig, pretrained

P3_FILE = Path("../shared/data/p3_t0.parquet")
"""Where the file of P3 is looked for if none is given."""
ALL_WORDS = 10**6
GRID = "grid.yaml"


@dataclass(frozen=True)
class Experiment:
    """An experiment on P3.

    Attributes:
        config: of its data. sections: of its configuration file. p3: the file. out: the run directory.
        models: folder where pretrained models are kept. console: where progress is shown.
    """

    config: P3Config
    sections: Mapping[str, Any]
    p3: Path
    out: Path
    models: Path
    console: Console

    def grids(self, targets: Sequence[str], seeds: range) -> Iterator[Path]:
        """Write data and grid of each of some targets and seeds, one after another, seed by seed.

        Raises:
            CadsError: if the file, the text or the configuration cannot be used.
        """
        from transformers import AutoTokenizer

        models = self._models()
        tokenizer = AutoTokenizer.from_pretrained(models[0]["task"]["model"])
        max_tokens = self.sections["task"]["max_tokens"]
        draws = P3Draws(fitting(self._rows, tokenizer, max_tokens), self.config)
        grid = {name: value for name, value in self.sections.items() if name not in SECTIONS}
        asked = None
        if CHOICES in grid.get("evaluations", ()):
            asked = partial(questions, options=read_options(self._rows))
        for seed in seeds:
            for target in targets:
                folder = self.out / target / str(seed)
                data = write_draw(draws, target, seed, folder / "data", asked)
                fields = {**grid["task"], **data, "data_seed": seed}
                content = {**grid, "kind": "language", "seeds": 1, "models": models}
                if asked is not None and CHOICES not in data:
                    # This target has no questions.
                    content["evaluations"] = [name for name in grid["evaluations"] if name != CHOICES]
                content |= {"task": {}, "tasks": [{"label": target, "task": fields}]}
                whole_file(folder / GRID, yaml.safe_dump(content, sort_keys=False))
                yield folder / GRID

    def runs(self) -> list[dict[str, Any]]:
        """Finished cells of all targets and seeds, as rows of the table `runs`, with the seed of their data.

        Those of flags that were given before are among them, and those whose selection was over budget.

        Raises:
            DataError: if a folder has cells of another configuration too.
        """
        found = []
        for target in self.config.targets:
            for folder in sorted(self.out.glob(f"{target}/*/"), key=lambda path: int(path.name)):
                grid = read_grid(folder / GRID)
                cells = list(product(grid.budgets, map(grid.name, grid.methods)))
                done = [row for row in read_rows(folder, "runs") if row["status"] in (DONE, OVER_BUDGET)]
                rows = {(row["budget"], row["method"]): row for row in done}
                if len(rows) < len(done) or not set(rows) <= set(cells):
                    raise DataError(f"{folder} has cells of another configuration too: give another --out")
                found += [{**rows[cell], "seed": int(folder.name)} for cell in cells if cell in rows]
        return found

    def description(self) -> list[str]:
        """Sentences that describe data and models."""
        config = self.config
        manifests = [json.loads(path.read_text("utf-8")) for path in self.out.glob(f"*/*/data/{MANIFEST}")]
        sizes = {name: sorted({str(m["rows"][name]) for m in manifests}, key=int) for name in ("target", "test")}
        n_own = str(config.needles) if config.setting == "needle" else "none"
        target, test = (" or ".join(sizes[name]) for name in ("target", "test"))
        sentences = [
            f"Target: {target} examples of one data set of P3, from all of its templates. Test: others of it, {test}. "
            f"Pool: {config.rows} examples of each of {config.templates} templates"
            f" drawn at random, {n_own} of them of the target's data set. No two of target, test set and pool share "
            "content.",
        ]
        for reason, lost in (manifests[0]["left_out"] if manifests else {}).items():
            named = ", ".join(f"{name} {n:,}" for name, n in sorted(lost.items(), key=lambda item: -item[1]))
            sentences.append(f"Left out as {reason}: {sum(lost.values()):,} ({named}).")
        if "models" in self.sections:
            return [*sentences, *(_described(entry) for entry in self._models())]
        for size, folder in self._pretrained().items():
            results = json.loads((folder / "results.json").read_text("utf-8"))
            training = next(record for record in results["ledger"] if record["phase"] == "train")
            sentences.append(
                f"{size}: pretrained from scratch on {training['tokens']:,} tokens of news for "
                f"{training['flops']:.3g} FLOPs, perplexity {results['metrics']['perplexity']:.0f} on news held out; "
                f"its tokenizer is trained on rows of data sets that are no targets."
            )
        return sentences

    def questions(self) -> dict[str, tuple[str, float]]:
        """By target: how many questions its seeds have, in words, and the accuracy of blind guesses."""
        found = {}
        for target in self.config.targets:
            files = sorted(self.out.glob(f"{target}/*/data/{CHOICES}.jsonl"))
            asked = [[json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in files]
            if asked:
                numbers = sorted({len(lines) for lines in asked})
                words = " to ".join(map(str, dict.fromkeys([numbers[0], numbers[-1]])))
                found[target] = (words, chance(question for lines in asked for question in lines))
        return found

    @cached_property
    def _rows(self) -> Rows:
        return read_p3(self.p3)

    def _models(self) -> list[dict[str, Any]]:
        """The models as entries of the grid: the configuration's own, or those that are pretrained here."""
        if (given := self.sections.get("models")) is not None:
            return list(given)
        return [{"label": size, "task": {"model": str(folder)}} for size, folder in self._pretrained().items()]

    def _pretrained(self) -> dict[str, Path]:
        """The folders of the models, by size; the same for all targets and seeds."""
        pretraining: PretrainingConfig = filled(
            PretrainingConfig, self.sections.get("pretraining") or {}, "pretraining"
        )
        articles = read_corpus(TEXT, ALL_WORDS, {}).articles
        files = {"text": pieces(articles), "tokenizer": tokenizer_records(self._rows, self.config)}
        folder = self.out / f"pretraining-{content_key(files)}"
        if not folder.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            with whole_folder(folder) as partial:
                for name, records in files.items():
                    write_lines(partial / f"{name}.jsonl", records)
        text, tokenizer = folder / "text.jsonl", folder / "tokenizer.jsonl"
        return pretrained(self.sections["sizes"], text, [tokenizer], pretraining, self.models, self.console)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment of a configuration file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, help="run directory (default: runs/NAME of the config)")
    parser.add_argument("--results", type=Path, help="Markdown file for a report")
    parser.add_argument("--file", default="", metavar="p3=PATH", help=f"the file of P3 (default: {P3_FILE})")
    parser.add_argument("--no-run", action="store_true", help="write the page of what is finished, and run nothing")
    parser.add_argument("--targets", default="", help="data sets, separated by commas; default: the config's")
    parser.add_argument("--budgets", default="", help="budgets, separated by commas; default: the config's")
    parser.add_argument("--methods", default="", help="methods, separated by semicolons; default: the config's")
    parser.add_argument("--seeds", type=int, help="number of seeds; default: the config's")
    parser.add_argument("--models", type=Path, default=MODEL_CACHE, help="folder where pretrained models are kept")
    args = parser.parse_args(argv)
    console, started = Console(), time.perf_counter()
    try:
        sections = read_sections(args.config)
        config: P3Config = filled(P3Config, sections["data"], "data")
        p3 = _file(args.file, config)
        if not p3.is_file():
            console.print(f"skipped: {p3}, the file of P3, is missing; give it with --file p3=PATH", soft_wrap=True)
            return 0
        out = args.out or Path("runs") / args.config.stem
        experiment = Experiment(config, sections, p3, out, args.models, console)
        targets = _listed(args.targets) or config.targets
        if unknown := sorted(set(targets) - set(config.targets)):
            raise ConfigError(f"--targets {unknown}: choose from {config.targets}")
        seeds = range(args.seeds or sections.get("seeds", 3))
        for path in () if args.no_run else experiment.grids(targets, seeds):
            grid = _part(read_grid(path), _listed(args.budgets), _listed(args.methods, ";"))
            run_grid(grid, path.parent, GridShard.parse("1/1"), console)
        if args.results:
            command = _command(sys.argv[1:] if argv is None else argv)
            args.results.parent.mkdir(parents=True, exist_ok=True)
            args.results.write_text(_page(experiment, args.config.stem, command, args.results), "utf-8")
    except CadsError as error:
        console.print(f"{type(error).__name__}: {error}", style="red", markup=False)
        return 1
    console.print(f"finished in {time.perf_counter() - started:.0f} s", highlight=False)
    return 0


def _command(argv: Sequence[str]) -> str:
    """The command that makes the cells of a page, without the path of the user's file."""
    shown = ["p3=PATH" if word.startswith("p3=") else word for word in argv if word != "--no-run"]
    return shlex.join(["python", "-m", "experiments.p3", *shown])


def _page(experiment: Experiment, name: str, command: str, results: Path) -> str:
    """The page of all cells that are finished; figures are drawn beside it."""
    runs, description = experiment.runs(), experiment.description()
    chosen = draw(runs, results.with_name(f"{name}.png"))
    if {row["method"] for row in runs} <= {CADS, *AGAINST}:
        return report(name, command, description, runs, figure=chosen)
    figures = {}
    if draw_rivals(runs, results.with_name(f"{name}-methods.png")):
        figures["Test loss above that of cads, by method and budget"] = f"{name}-methods.png"
    if chosen:
        figures["What cads drew of each data set"] = f"{name}.png"
    return rivals_report(name, command, description, runs, experiment.questions(), figures)


def _described(entry: Mapping[str, Any]) -> str:
    """A sentence on a model that is given as a folder or a name."""
    task = entry["task"]
    peft = task.get("peft")
    adapter = f", trained with {', '.join(f'{name} {value}' for name, value in peft.items())}" if peft else ""
    return f"{entry['label']}: {Path(task['model']).name}{adapter}."


def _part(grid: Grid, budgets: Sequence[str], methods: Sequence[str]) -> Grid:
    """The cells of some budgets and methods; all of them if none are named."""
    names = {grid.name(entry) for entry in grid.methods}
    if unknown := [*sorted(set(budgets) - set(grid.budgets)), *sorted(set(methods) - names)]:
        raise ConfigError(f"{unknown} are not in the configuration: choose from {grid.budgets} and {sorted(names)}")
    chosen = [entry for entry in grid.methods if not methods or grid.name(entry) in methods]
    return replace(grid, methods=chosen, budgets=list(budgets or grid.budgets))


def _listed(text: str, separator: str = ",") -> list[str]:
    return [part.strip() for part in text.split(separator) if part.strip()]


def _file(flag: str, config: P3Config) -> Path:
    name, _, path = flag.partition("=")
    if flag and (name != "p3" or not path):
        raise ConfigError(f"--file {flag}: write p3=PATH")
    return Path(path or config.files.get("p3", P3_FILE))


if __name__ == "__main__":
    sys.exit(main())
