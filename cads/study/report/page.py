"""The report of a study: `fits.json`, figures as files, and one self-contained page of HTML.

The first screen has the verdict and one figure. What was selected and what it cost follow. All else is folded away.
"""

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

from cads.accounting.ledger import GLOSSARY
from cads.accounting.units import size
from cads.errors import ConfigError
from cads.registry import selector_class
from cads.runtime.atomic_files import whole_file
from cads.scoring.ranker import CUT_OPTIONS, Ranker
from cads.study.analysis.fits import GroupFits, analyse, recommendations, to_json
from cads.study.analysis.points import place_name, points_of, regrets
from cads.study.analysis.verdicts import answers, headline, shown_name
from cads.study.report import evidence, figures, interactive
from cads.study.report.figures import CaptionedFigure
from cads.study.report.style import MethodStyle, method_styles
from cads.study.report.text_tables import header, texts
from cads.study.tables import DONE, IMPORTED, read_runs

TEMPLATE = "report.html.j2"
Namer = Callable[[str], str]
"""Numbers the figures: kind -> name."""
PAGE_SIZE = "@PAGE SIZE@"
"""Stands in the page for its size, which is known when it is written."""


@dataclass(frozen=True)
class GroupResult:
    """What the page says of one task at one model size.

    Attributes:
        name: of the group. headline: the verdict in a few sentences. verdicts: a sentence for each budget.
        figure: that shows them. details: figures that are folded away. advice: of the fitted curves.
        columns, rows: of the table of numbers.
    """

    name: str
    headline: str
    verdicts: list[str]
    figure: CaptionedFigure
    details: list[CaptionedFigure]
    advice: list[str]
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Section:
    """A section of the page: title, a sentence about it, figures, and further ones that are folded away."""

    title: str
    description: str
    shown: list[CaptionedFigure]
    folded: list[CaptionedFigure]


@dataclass(frozen=True)
class ReportFiles:
    """The files of a report: the page, the fits, the folder of figures; and the answers, one sentence each.

    `n_bytes`: the size of the page. `is_interactive`: whether its figures answer to the pointer.
    """

    page: Path
    fits: Path
    figures: Path
    answers: list[str]
    n_bytes: int = 0
    is_interactive: bool = False


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
    groups = analyse(points_of(runs, metric))
    styles = method_styles((row["method"], row["selector"]) for row in runs)
    number = count(1)

    def name(kind: str) -> str:
        return f"{next(number):02d}-{kind}"

    results = [_group_result(g, styles, name) for g in groups]
    sections = [s for s in _selection_sections(folder, runs, name) if s.shown]
    drawn = [figure for r in results for figure in (r.figure, *r.details)]
    drawn += [figure for s in sections for figure in (*s.shown, *s.folded)]
    page = out or folder / "report.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    whole_file(
        page.parent / "fits.json", json.dumps(to_json(groups, _smallest(runs)), indent=1, allow_nan=False) + "\n"
    )
    for figure in drawn:
        figure.save(page.parent / "figures")
    if page.parent == folder:
        _sweep(folder / "figures", {figure.name for figure in drawn})
    text = _page(folder, runs, results, sections, drawn)
    whole_file(page, text)
    several = len(results) > 1
    named = [f"{r.name}: {s}" if several else s for r in results for s in (r.headline, *r.verdicts)]
    paths = page, page.parent / "fits.json", page.parent / "figures"
    return ReportFiles(*paths, named, len(text.encode()), interactive.is_installed())


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


def _group_result(group: GroupFits, styles: Mapping[str, MethodStyle], name: Namer) -> GroupResult:
    """The verdicts and figures of one task at one model size."""
    verdicts = answers(group.points)
    figure = figures.verdict(group, styles, name("verdict"))
    details: list[CaptionedFigure | None] = []
    if len({p.budget for p in group.points}) > 1:
        details = [
            figures.scores(group, styles, name("scores")),
            figures.regret(group, regrets(group.points), styles, name("regret")),
            figures.frontier(group, styles, name("frontier")),
            figures.fits(group, styles, name("fits")),
            *figures.break_even_figures(group, styles, name("break-even")),
        ]
        if any(p.selection for p in group.points):
            details.append(figures.scores(group, styles, name("training-only"), training_only=True))
    return GroupResult(
        name=place_name(group.task, group.model) or "All",
        headline=headline(verdicts),
        verdicts=[v.sentence for v in verdicts],
        figure=figure,
        details=[f for f in details if f is not None],
        advice=recommendations(group),
        columns=header(group.points),
        rows=texts(group.points),
    )


def _selection_sections(folder: Path, runs: Sequence[Mapping[str, Any]], name: Namer) -> list[Section]:
    """The sections about the selections: sources, ledgers. The largest budget is shown, the others are folded away."""
    shares: dict[evidence.Place, CaptionedFigure] = {}
    spent: dict[evidence.Place, CaptionedFigure] = {}
    more: list[CaptionedFigure | None] = []
    # A study may be passed on without its selections, the largest of its tables.
    selections = (folder / "tables" / "selections").is_dir()
    places = evidence.by_place(runs)
    largest = {place[:2]: place for place in places}.values()
    accounts = {place: evidence.ledgers(methods) for place, methods in places.items()}
    stages = list(dict.fromkeys(stage for account in accounts.values() for row in account.values() for stage in row))
    for place, methods in places.items():
        label = ", ".join(filter(None, place))
        share = evidence.source_shares(folder, methods) if selections else {}
        if len({source for row in share.values() for source in row}) > 1:
            shares[place] = figures.stacked(
                share,
                title=f"Sources: {label}",
                xlabel="share of the training data (%)",
                caption="What the final training draws from the pool, mean over seeds, without the target.",
                name=name("sources"),
            )
        spent[place] = figures.stacked(
            accounts[place],
            order=stages,
            title=f"Ledger: {label}",
            xlabel="FLOPs",
            caption="Compute by stage, mean over seeds, without evaluation on the test set.",
            name=name("ledger"),
        )
        for method, rows in methods.items():
            if course := evidence.course(rows):
                more.append(figures.probabilities(course, f"{shown_name(method)}: {label}", name("probabilities")))
        if selections and (result := evidence.overlap(folder, place, methods)):
            more.append(
                figures.overlap_figure(
                    result.methods, result.matrix, result.expected, f"Overlap: {label}", name("overlap")
                )
            )
    return [
        Section(
            "What was selected",
            "The share of each source in what the final training draws, at the largest budget.",
            [shares[place] for place in largest if place in shares],
            [*(f for place, f in shares.items() if place not in largest), *(f for f in more if f is not None)],
        ),
        Section(
            "Where the compute went",
            "Everything is charged: what selection costs stands beside what training costs.",
            [spent[place] for place in largest],
            [f for place, f in spent.items() if place not in largest],
        ),
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
    results: Sequence[GroupResult],
    sections: Sequence[Section],
    drawn: Sequence[CaptionedFigure],
) -> str:
    """The page as HTML."""
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
    unscored: dict[tuple[str, str], list[str]] = {}
    for row in runs:
        if row["status"] not in (DONE, IMPORTED):
            cell = ", ".join(filter(None, [shown_name(row["method"]), row["model"], row["budget"]]))
            cells = unscored.setdefault((row["status"], row["error"] or ""), [])
            cells += [] if cell in cells else [cell]
    is_interactive = interactive.is_installed()
    charts = {figure.name: figure.chart for figure in drawn}
    text = environment.get_template(TEMPLATE).render(
        title=folder.resolve().name,
        results=results,
        sections=sections,
        # Markup, not escaped again: Matplotlib has escaped the names in its SVG.
        svg={figure.name: Markup(figure.svg()) for figure in drawn},
        exhibits=[(", ".join(filter(None, e[0].place)), e) for e in galleries if e],
        unscored=unscored,
        n_done=sum(row["status"] in (DONE, IMPORTED) for row in runs),
        n_cells=len(runs),
        flops=spent_flops(runs),
        codes=sorted({f"{row['version']} ({row['code']})" for row in runs if row["code"]}),
        version=version("cads-select"),
        glossary=GLOSSARY,
        is_interactive=is_interactive,
        charts=Markup(interactive.embedded(charts)) if is_interactive else "",
        plotly=Markup(interactive.library()) if is_interactive else "",
        script=Markup(interactive.script()) if is_interactive else "",
        page_size=PAGE_SIZE,
    )
    return text.replace(PAGE_SIZE, size(len(text.encode())))
