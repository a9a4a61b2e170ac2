"""The report of a study: `fits.json`, figures as files, and one self-contained page of HTML."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cads.errors import ConfigError
from cads.registry import selector_class
from cads.runtime.atomic_files import whole_file
from cads.scoring.ranker import CUT_OPTIONS, Ranker
from cads.study.analysis.fits import SIMULATED_SIZES, GroupFits, analyse, recommendations, to_json
from cads.study.analysis.frontier import simulate_figure1
from cads.study.analysis.points import answers, place_name, points_of, regrets
from cads.study.report import evidence, figures
from cads.study.report.figures import CaptionedFigure
from cads.study.report.style import MethodStyle, method_styles
from cads.study.report.text_tables import header, texts
from cads.study.tables import DONE, IMPORTED, read_runs

TEMPLATE = "report.html.j2"
Namer = Callable[[str], str]
"""Numbers the figures: kind -> name."""


@dataclass(frozen=True)
class Section:
    """A section of the page: title, a sentence about it, and figures."""

    title: str
    description: str
    captioned_figures: list[CaptionedFigure]


@dataclass(frozen=True)
class ReportFiles:
    """The files of a report: the page, the fits, the folder of figures; and the answers, one sentence each."""

    page: Path
    fits: Path
    figures: Path
    answers: list[str]


def write_report(folder: Path, out: Path | None = None, metric: str | None = None) -> ReportFiles:
    """Write the report on the results in `folder`.

    Args:
        out: the page; None: `report.html` in `folder`. Fits and figures are written beside it.
        metric: to use instead of the metric of the grid.

    Raises:
        DataError: if there are no results, or tables of another schema version.
        ConfigError: if the metric was not measured.
    """
    runs = read_runs(folder)
    points = points_of(runs, metric)
    groups = analyse(points)
    styles = method_styles((row["method"], row["selector"]) for row in runs)
    sections = [s for s in _sections(folder, runs, groups, styles) if s.captioned_figures]
    page = out or folder / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    fits = to_json(groups, _smallest(runs))
    whole_file(page.parent / "fits.json", json.dumps(fits, indent=1, allow_nan=False) + "\n")
    captioned_figures = [d for s in sections for d in s.captioned_figures]
    for figure in captioned_figures:
        figure.save(page.parent / "figures")
    if page.parent == folder:
        _sweep(folder / "figures", {d.name for d in captioned_figures})
    sentences = [(g, [a.sentence for a in answers(g.points)]) for g in groups]
    whole_file(page, _page(folder, runs, sections, sentences))
    several = len(groups) > 1
    named = [f"{_name(g)}: {s}" if several else s for g, group in sentences for s in group]
    return ReportFiles(page, page.parent / "fits.json", page.parent / "figures", named)


def _sweep(figures: Path, drawn: set[str]) -> None:
    """Remove figures of an earlier report that this one does not have. Files with other names stay."""
    for file in figures.glob("[0-9][0-9]-*"):
        if file.suffix in (".svg", ".png") and file.stem not in drawn:
            file.unlink()


def _smallest(runs: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By task, the model with the fewest parameters, of those without a proxy."""
    sized = [
        row
        for row in runs
        if row["n_parameters"] is not None and row["selector_parameters"] in (None, row["n_parameters"])
    ]
    smallest: dict[str, tuple[float, str]] = {}
    for row in sized:
        size = row["n_parameters"], row["model"]
        smallest[row["task"]] = min(smallest.get(row["task"], size), size)
    return {task: model for task, (_, model) in smallest.items()}


def _name(group: GroupFits) -> str:
    """The name of a group: task and model size."""
    return place_name(group.task, group.model)


def _sections(
    folder: Path, runs: Sequence[Mapping[str, Any]], groups: Sequence[GroupFits], styles: Mapping[str, MethodStyle]
) -> list[Section]:
    """The sections of the page, with their figures numbered in order."""
    number = count(1)

    def name(kind: str) -> str:
        return f"{next(number):02d}-{kind}"

    description = (
        "Score, regret, frontier, fitted curves, break-even, and training compute alone. Everything is charged: what "
        "selection costs stands beside what training costs."
    )
    compared = [Section(f"Results: {_name(g)}", description, _group_figures(g, styles, name)) for g in groups]
    simulated = [
        figures.simulation(curves, n, method_styles((c.method, c.method) for c in curves), name("simulation"))
        for n in SIMULATED_SIZES
        for curves in [simulate_figure1(n)]
    ]
    return [
        *compared,
        *_selection_sections(folder, runs, name),
        Section("Simulation", "What the model of costs predicts for large models.", simulated),
    ]


def _group_figures(group: GroupFits, styles: Mapping[str, MethodStyle], name: Namer) -> list[CaptionedFigure]:
    """The figures of one task at one model size."""
    captioned_figures = [figures.scores(group, styles, name("scores"))]
    if rows := regrets(group.points):
        captioned_figures.append(figures.regret(group, rows, styles, name("regret")))
    captioned_figures.append(figures.frontier(group, styles, name("frontier"), fitted=False))
    if group.fits:
        captioned_figures.append(figures.frontier(group, styles, name("fits"), fitted=True))
    captioned_figures += figures.break_even_figures(group, styles, name("break-even"))
    return [*captioned_figures, figures.scores(group, styles, name("training-only"), training_only=True)]


def _selection_sections(folder: Path, runs: Sequence[Mapping[str, Any]], name: Namer) -> list[Section]:
    """The sections about the selections: ledgers, sources, source probabilities, overlap."""
    spent, shares, courses, overlaps = [], [], [], []
    # A study may be passed on without its selections, the largest of its tables.
    selections = (folder / "tables" / "selections").is_dir()
    places = evidence.by_place(runs)
    accounts = {place: evidence.ledgers(methods) for place, methods in places.items()}
    stages = list(dict.fromkeys(stage for account in accounts.values() for row in account.values() for stage in row))
    for place, methods in places.items():
        label = ", ".join(filter(None, place))
        spent.append(
            figures.stacked(
                accounts[place],
                order=stages,
                title=f"Ledger: {label}",
                xlabel="FLOPs",
                caption="Compute by stage, mean over seeds, without evaluation on the test set.",
                name=name("ledger"),
            )
        )
        if selections and (share := evidence.source_shares(folder, methods)):
            shares.append(
                figures.stacked(
                    share,
                    title=f"Sources: {label}",
                    xlabel="share of the training data (%)",
                    caption="What the final training draws from the pool, mean over seeds, without the target.",
                    name=name("sources"),
                )
            )
        for method, rows in methods.items():
            if course := evidence.course(rows):
                courses.append(figures.probabilities(course, f"{method}: {label}", name("probabilities")))
        if selections and (result := evidence.overlap(folder, place, methods)):
            overlaps.append(
                figures.overlap_figure(
                    result.methods, result.matrix, result.expected, f"Overlap: {label}", name("overlap")
                )
            )
    return [
        Section("Ledger", "Where the compute went.", spent),
        Section("What was selected", "", shares),
        Section(
            "Source probabilities over time",
            "How policies over sources moved. What was chosen in the end can differ.",
            courses,
        ),
        Section("Overlap of selections", "How much two methods agree.", overlaps),
    ]


def spent_flops(runs: Sequence[Mapping[str, Any]]) -> float:
    """FLOPs of all runs. A ranking that several budgets share is counted once."""
    shared: dict[tuple[Any, ...], float] = {}
    unshared = 0.0
    for row in runs:
        unshared += row["training_flops"] or 0.0
        selection = row["selection_flops_spent"] or 0.0
        if row["status"] == DONE and _ranks(row["selector"]):
            options = {
                name: value for name, value in json.loads(row["options"] or "{}").items() if name not in CUT_OPTIONS
            }
            ranking = (row["task"], row["model"], row["seed"], row["selector"], json.dumps(options, sort_keys=True))
            shared[ranking] = selection
        else:
            unshared += selection
    return unshared + sum(shared.values())


def _ranks(selector: str) -> bool:
    """Whether the selector of this name is a ranker; False if it is not installed here."""
    try:
        return issubclass(selector_class(selector), Ranker)
    except ConfigError:
        return False


def _page(
    folder: Path,
    runs: Sequence[Mapping[str, Any]],
    sections: Sequence[Section],
    sentences: Sequence[tuple[GroupFits, list[str]]],
) -> str:
    """The page as HTML; `sentences`: the answers of each group."""
    environment = Environment(
        loader=PackageLoader("cads.study.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    galleries = [
        e
        for place, methods in evidence.by_place(runs, max_budgets=1).items()
        for e in [evidence.exhibits(folder, place, methods)]
    ]
    tables = [(_name(g), header(g.points), texts(g.points)) for g, _ in sentences]
    unscored: dict[tuple[str, str], list[str]] = {}
    for row in runs:
        if row["status"] not in (DONE, IMPORTED):
            cell = ", ".join(filter(None, [row["method"], row["model"], row["budget"]]))
            cells = unscored.setdefault((row["status"], row["error"] or ""), [])
            cells += [] if cell in cells else [cell]
    return environment.get_template(TEMPLATE).render(
        title=folder.resolve().name,
        groups=[(_name(g), verdicts, recommendations(g)) for g, verdicts in sentences],
        sections=sections,
        # Markup, not escaped again: Matplotlib has escaped the names in its SVG.
        svg={d.name: Markup(d.svg()) for s in sections for d in s.captioned_figures},
        tables=tables,
        exhibits=[(", ".join(filter(None, e[0].place)), e) for e in galleries if e],
        unscored=unscored,
        n_done=sum(row["status"] in (DONE, IMPORTED) for row in runs),
        n_cells=len(runs),
        flops=spent_flops(runs),
        codes=sorted({f"{row['version']} ({row['code']})" for row in runs if row["code"]}),
        version=version("cads-select"),
    )
