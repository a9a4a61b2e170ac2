"""The report: what it writes, names that would be markup, and the page in a browser at two widths, light and dark."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cads.accounting.units import size
from cads.cli.main import main
from cads.study.analysis.fits import analyse, turned
from cads.study.analysis.frontier import jaccard
from cads.study.analysis.points import points_of, regrets
from cads.study.grid import read_grid
from cads.study.published_points import import_points
from cads.study.report import figures, interactive, static
from cads.study.report.page import spent_flops, write_report
from cads.study.report.style import PALETTE, colour_of, method_styles
from cads.study.tables import DONE, FAILED, IMPORTED, NOT_APPLICABLE, read_runs, write_rows
from tests.support.paths import CONFIGS, EXCERPT

pytestmark = pytest.mark.slow

NASTY = "<script>alert('x')</script> & \"$x^{$\""
METHODS = {"random": "random", "full": "full", "search": "search", "search, all in": "search", NASTY: "source"}
BUDGETS = (1, 8, 64)
N_POOL, SEEDS = 40, (0, 1, 2)
BROWSER = "CADS_TEST_BROWSER"
"""Environment variable with the path of a Chromium, where playwright has none of its own."""


def add_cell(folder: Path, method: str, budget: int, seed: int) -> None:
    """A cell with made-up numbers, as `cads compare` writes it."""
    rng = np.random.default_rng([len(method), budget, seed])
    own = method.startswith("search")
    key = f"{list(METHODS).index(method)}-{budget}-{seed}"
    selection = 0.25e6 * budget if own else 0.0
    score = float(0.9 - 0.4 * np.exp(-budget / 8) + 0.01 * rng.normal() - 0.3 * (method == NASTY))
    course = [{"clean": 0.5 + 0.1 * i, NASTY: 0.5 - 0.1 * i} for i in range(4)] if own else []
    stages = [
        ("select", "short runs", selection),
        ("train", "final model", 1e6 * budget - selection),
        ("evaluate", "test", 1e4),
    ]
    n = N_POOL // 2 if own or method == "random" else N_POOL
    run = {
        "cell": key,
        "task": "vision/digits",
        "model": "",
        "n_parameters": 1e3,
        "method": method,
        "selector": METHODS[method],
        "budget": f"{budget} epochs",
        "budget_flops": 1e6 * budget,
        "seed": seed,
        "status": DONE,
        "metric": "accuracy",
        "score": score,
        "metrics": json.dumps({"accuracy": score, "loss": 1 - score}),
        "selection_flops": selection,
        "selection_flops_spent": selection,
        "training_flops": 1e6 * budget - selection,
        "full_flops": 1e6,
        "n_pool": N_POOL,
        "n_selected": n,
        "version": "1",
        "code": "abc",
        "ledger": json.dumps([{"phase": p, "stage": s, "flops": f} for p, s, f in stages]),
        "probability_course": json.dumps(course),
    }
    ids = [f"e{i}" for i in rng.permutation(N_POOL)[:n]]
    rows = [
        {"cell": key, "id": i, "source": NASTY if int(i[1:]) % 2 else "clean", "rank": r} for r, i in enumerate(ids)
    ]
    write_rows(folder, "selections", key, rows)
    about = {"cell": key, "kept": True, "score": 1.0, "label": NASTY}
    write_rows(folder, "examples", key, [{**about, "id": NASTY, "text": f"{NASTY} " * 200}])
    write_rows(folder, "runs", key, [run])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A study of five methods, four budgets and three seeds, its report, and published points beside it."""
    folder = tmp_path_factory.mktemp("report")
    for method in METHODS:
        for budget in BUDGETS:
            for seed in SEEDS:
                add_cell(folder, method, budget, seed)
    for status in (FAILED, NOT_APPLICABLE):
        lost = {
            "cell": f"z {status}",
            "task": "vision/digits",
            "method": "joint",
            "selector": "joint",
            "budget": "1 epochs",
        }
        write_rows(folder, "runs", f"z-{status[0]}", [{**lost, "model": "", "status": status, "error": f"why {NASTY}"}])
    import_points(EXCERPT, folder)
    with pytest.MonkeyPatch.context() as patch:
        # Figures of a kind differ in their numbers alone, and intervals have tests of their own.
        patch.setattr("cads.study.report.evidence.MAX_BUDGETS", 2)
        patch.setattr("cads.study.analysis.fits.N_RESAMPLES", 20)
        return write_report(folder)


@pytest.fixture(scope="module")
def static_page(made, tmp_path_factory):
    """The report as it is where plotly is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cads.study.report.interactive.is_installed", lambda: False)
        patch.setattr("cads.study.report.evidence.MAX_BUDGETS", 1)
        patch.setattr("cads.study.analysis.fits.N_RESAMPLES", 20)
        return write_report(made.page.parent, tmp_path_factory.mktemp("static") / "page.html").page


def test_many_methods_are_divided_among_panels(made, monkeypatch):
    """The best first, what all are compared with in each, and no method twice or lost."""
    runs = read_runs(made.page.parent)
    group = analyse([p for p in points_of(runs) if p.task == "vision/digits"])[0]
    look = method_styles((run["method"], run["selector"]) for run in runs)
    assert len(figures.scores(group, look, "few").figure.axes) == 1
    monkeypatch.setattr("cads.study.report.figures.MAX_LINES", 4)
    for drawing in (
        figures.scores(group, look, "scores"),
        figures.regret(group, regrets(group.points), look, "regret"),
        figures.frontier(group, look, "frontier"),
    ):
        legends = [part.legends[0].get_texts() for part in drawing.figure.subfigs]
        shown = [{text.get_text() for text in texts} - {"frontier line"} for texts in legends]
        assert len(shown) == 2
        assert set.intersection(*shown) == {"full", "search"}
        assert set.union(*shown) >= {"random", "search (all in)"}
        assert sum(map(len, shown)) == len(METHODS) + 2
        assert any("script" in label for label in shown[-1])
        assert "each on its own scale" in drawing.caption


def test_a_ranking_that_runs_share_is_counted_once():
    def run(selector, seed, options="{}", status=DONE, selection=100.0):
        row = {"task": "t", "model": "", "seed": seed, "selector": selector, "options": options, "status": status}
        return row | {"selection_flops_spent": selection, "training_flops": 1.0}

    ranked = [run("ppl", seed, options) for seed in (0, 1) for options in ('{"epochs": 1}', '{"fraction": 0.5}')]
    assert spent_flops(ranked) == 4 + 200
    assert spent_flops([*ranked, run("ppl", 0, '{"recipe": "paper"}')]) == 5 + 300
    assert spent_flops([run("search", 0), run("search", 0), run("not installed", 0)]) == 3 + 300
    assert spent_flops([run("ppl", 0, status=IMPORTED), run("ppl", 0, status=IMPORTED)]) == 2 + 200
    assert spent_flops([run("ppl", 0, None, FAILED, None)]) == 1


class Tags(HTMLParser):
    """Counts tags and collects attributes that would load something."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] = self.tags.get(tag, 0) + 1
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]


class TestFiles:
    def test_the_page_needs_nothing_else(self, made):
        tags = Tags()
        tags.feed(made.page.read_text())
        assert tags.tags.get("script", 0) == (3 if interactive.is_installed() else 0), "charts, library, and our code"
        assert all(link.startswith(("#", "data:")) for link in tags.links)
        assert tags.tags["svg"] == tags.tags["figure"] == len(list(made.figures.glob("*.svg")))

    def test_without_plotly_the_page_runs_nothing_and_says_so(self, static_page):
        tags = Tags()
        tags.feed(static_page.read_text())
        assert "script" not in tags.tags
        assert tags.tags["svg"] == tags.tags["figure"]
        assert "with plotly installed" in static_page.read_text()

    def test_the_page_says_its_size(self, made):
        assert made.n_bytes == pytest.approx(made.page.stat().st_size, abs=20)
        assert f"This page is {size(made.n_bytes)} and needs no network" in made.page.read_text()

    def test_names_are_escaped(self, made):
        text = made.page.read_text()
        assert text.count("<script") == (3 if interactive.is_installed() else 0)
        assert "<script>alert" not in text
        assert text.count("&lt;script&gt;") > 20

    def test_the_charts_are_those_of_the_figures_and_plotly_knows_every_property(self, made):
        objects = pytest.importorskip("plotly.graph_objects", reason="needs the extra `report`")
        text = made.page.read_text()
        start = text.index(">", text.index('id="charts"')) + 1
        charts = json.loads(text[start : text.index("</script>", start)])
        assert set(charts) == {file.stem for file in made.figures.glob("*.svg")}
        for name, chart in charts.items():
            figure = objects.Figure(data=chart["data"], layout=chart["layout"])
            assert figure.data, name
            assert not any("<" in trace.name for trace in figure.data if trace.name), "a name is no markup"
        verdict = charts["01-verdict"]["data"]
        shown = {trace["name"] for trace in verdict if trace.get("showlegend", True)}
        assert {"search", "search (all in)", figures.FREE_BAND} <= shown
        assert "full" not in shown, "what is free is a band"

    def test_svg_ids_are_unlike_each_other(self, made):
        ids = re.findall(r'<(?:path|clipPath)[^>]* id="([^"]+)"', made.page.read_text())
        assert len(ids) == len(set(ids)) > 10

    def test_fits_are_written(self, made):
        fits = json.loads(made.fits.read_text())
        assert [(g["task"], g["model"]) for g in fits["groups"]] == [("vision/digits", ""), ("mmlu", "7b")]
        own, published = fits["groups"]
        assert set(own["fits"]) == set(METHODS)
        assert [a["flops"] for a in own["answers"]] == [1e6 * b for b in BUDGETS]
        assert published["fits"]["random"]["shifted"]["lambda"] == pytest.approx(2.54, rel=0.02)

    def test_every_figure_is_there_as_svg_and_png(self, made):
        kinds = {"verdict", "scores", "regret", "frontier", "fits", "break-even", "training-only", "ledger", "sources"}
        kinds |= {"probabilities", "overlap"}
        for suffix in ("svg", "png"):
            found = {re.sub(r"^\d+-|-\d+$", "", f.stem) for f in made.figures.glob(f"*.{suffix}")}
            assert found == kinds
        for file in made.figures.glob("*.png"):
            with Image.open(file) as image:
                colours = image.convert("RGB").getcolors(10**6)
                assert image.width >= 800
                assert len(colours) > 20

    def test_of_many_methods_those_with_the_best_scores_have_a_break_even(self, made, monkeypatch):
        """And the others are counted."""
        monkeypatch.setattr("cads.study.analysis.fits.N_RESAMPLES", 20)
        runs = read_runs(made.page.parent)
        styles = method_styles((row["method"], row["selector"]) for row in runs)
        groups = [g for g in analyse(points_of(runs)) if g.line is not None]
        drawn = {g.model: figures.break_even_figures(g, styles, "x") for g in groups}
        model, several = max(drawn.items(), key=lambda item: len(item[1]))
        assert len(several) > 1
        assert not any("fits.json" in figure.caption for figure in several)
        monkeypatch.setattr(figures, "MOST_BREAK_EVEN", 1)
        (group,) = [g for g in groups if g.model == model]
        (one,) = figures.break_even_figures(group, styles, "x")
        assert f" {len(several) - 1} methods with lower scores" in one.caption
        methods = {p.method for p in group.points if any(p.method in figure.title.lower() for figure in several)}
        best = max((p for p in group.points if p.method in methods), key=turned)
        assert best.method in one.title.lower()

    def test_answers_come_first(self, made):
        assert len(made.answers) == 1 + len(BUDGETS) + 1 + 6, "a headline for each group, and a sentence a budget"
        assert made.answers[1].startswith("vision/digits: At 1 epoch (1e+06 FLOPs in all) ")
        text = made.page.read_text()
        assert text.index('class="headline"') < text.index("<svg") < text.index('class="verdicts"')
        assert text.index('class="verdicts"') < text.index("What was selected</h2>")
        assert text.index("What was selected</h2>") < text.index("Where the compute went</h2>")
        assert text.index("Where the compute went</h2>") < text.index("Details</h2>")

    def test_a_name_with_a_comma_is_not_read_as_two(self, made):
        """In sentences and figures: "search, all in" is one method."""
        sentences = " ".join(made.answers)
        assert "search (all in)" in sentences
        assert "search, all in" not in sentences

    def test_cells_without_a_score_are_said(self, made):
        text = made.page.read_text()
        for status in (FAILED, NOT_APPLICABLE):
            assert f"<strong>{status}</strong>" in text

    def test_another_metric_and_the_same_page_from_the_same_tables(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr("cads.study.report.evidence.MAX_BUDGETS", 1)
        monkeypatch.setattr("cads.study.analysis.fits.N_RESAMPLES", 20)
        for budget in BUDGETS:
            add_cell(tmp_path, "full", budget, 0)
        assert main(["report", str(tmp_path), "--metric", "loss"]) == 0
        assert "full has the best mean: loss 0." in " ".join(capsys.readouterr().out.split())
        again = write_report(tmp_path, tmp_path / "there" / "page.html", "loss")
        assert again.page.read_bytes() == (tmp_path / "report.html").read_bytes()
        assert again.fits.read_bytes() == (tmp_path / "fits.json").read_bytes()
        assert main(["report", str(tmp_path), "--metric", "f1"]) == 1
        assert "'f1' was not measured" in " ".join(capsys.readouterr().err.split())

    def test_without_the_template_library_it_says_what_to_install(self, tmp_path, monkeypatch, capsys):
        monkeypatch.delitem(sys.modules, "cads.study.report.page")
        monkeypatch.setitem(sys.modules, "jinja2", None)
        assert main(["report", str(tmp_path)]) == 1
        assert "pip install 'cads-select[report]'" in " ".join(capsys.readouterr().err.split())


class TestStyle:
    def test_colours_follow_the_name_alone(self):
        few, many = method_styles([("search", "search")]), method_styles([(m, s) for m, s in METHODS.items()])
        assert few["search"] == many["search"]
        assert many["search, all in"].colour == many["search"].colour
        assert many["search, all in"] != many["search"]

    def test_the_methods_of_the_demo_have_colours_of_their_own(self):
        methods = {entry.method for entry in read_grid(CONFIGS / "demo.yaml").methods}
        assert {"cads", "search", "target-only"} <= methods
        assert len({colour_of(method) for method in methods}) == len(methods)

    def test_no_two_methods_look_alike(self):
        made = method_styles((f"label {i}", f"selector {i}") for i in range(30))
        assert len(set(made.values())) == 30

    @pytest.mark.parametrize("page", ["#ffffff", "#131416"])
    def test_colours_stand_out_in_light_and_dark(self, page):
        def luminance(colour: str) -> float:
            c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
            return float(np.where(c <= 0.03928, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

        for colour in PALETTE.values():
            low, high = sorted([luminance(colour), luminance(page)])
            assert (high + 0.05) / (low + 0.05) >= 3, colour
        assert colour_of("unheard of") in PALETTE.values()


def test_one_budget_has_no_curves(tmp_path):
    """Curves of one point say nothing: a row for each method does, beside the shading of what is free."""
    for method in ("random", "full", "search"):
        for seed in (0, 1):
            add_cell(tmp_path, method, 8, seed)
    report = write_report(tmp_path)
    kinds = {re.sub(r"^\d+-|-\d+$", "", f.stem) for f in report.figures.glob("*.svg")}
    assert kinds <= {"verdict", "sources", "ledger", "probabilities", "overlap"}
    (group,) = analyse(points_of(read_runs(tmp_path)))
    chart = figures.verdict(group, method_styles((m, m) for m in METHODS), "verdict").chart
    assert [dot.label for dot in chart.dots] == [
        p.method for p in sorted(group.points, key=lambda p: p.mean, reverse=True)
    ]
    free = [100 * p.mean for p in group.points if p.method != "search"]
    assert static._short(figures.FREE_BAND) == figures.FREE_BAND
    assert chart.band == (figures.FREE_BAND, min(free), max(free))
    drawn = interactive.specification(chart)
    assert [trace["y"] for trace in drawn["data"]] == [[dot.label] for dot in chart.dots]
    assert (drawn["layout"]["shapes"][0]["x0"], drawn["layout"]["shapes"][0]["x1"]) == (min(free), max(free))


def test_figures_of_an_earlier_report_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("cads.study.report.evidence.MAX_BUDGETS", 1)
    monkeypatch.setattr("cads.study.analysis.fits.N_RESAMPLES", 20)
    folder = tmp_path / "study"
    for budget in BUDGETS:
        add_cell(folder, "full", budget, 0)
    figures = write_report(folder).figures
    drawn = {f.name for f in figures.iterdir()}
    (figures / "99-break-even.png").write_bytes(b"")
    (figures / "notes.txt").write_text("kept")
    (figures / "fits.png").write_bytes(b"kept")
    write_report(folder)
    assert {f.name for f in figures.iterdir()} == drawn | {"notes.txt", "fits.png"}


def test_overlaps_are_those_of_the_ids(made):
    """The number drawn for two methods is the Jaccard index of their ids."""
    from cads.study.report.evidence import by_place, overlap
    from cads.study.tables import read_rows, read_runs

    folder = made.page.parent
    places = by_place(read_runs(folder))
    place = next(iter(places))
    found = overlap(folder, place, places[place])
    ids = {
        m: [r["id"] for r in read_rows(folder, "selections", [f"{list(METHODS).index(m)}-{BUDGETS[0]}-0"])]
        for m in ("random", "search")
    }
    i, j = found.methods.index("random"), found.methods.index("search")
    assert found.matrix[i, j] == found.matrix[j, i] == jaccard(ids["random"], ids["search"])
    assert found.expected[i, j] == pytest.approx(1 / 3), "of halves of the pool"
    assert not {"full", NASTY} & set(found.methods), "what keeps everything overlaps with everything"
    drawing = figures.overlap_figure(found.methods, found.matrix, found.expected, "title", "name")
    assert drawing is not None
    drawn = drawing.figure.axes[0].images[0]
    assert drawn.get_array()[max(i, j), min(i, j)] == found.matrix[i, j]
    assert drawn.get_array()[min(i, j), max(i, j)] == found.expected[i, j]


@pytest.fixture(scope="module")
def browser():
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("needs the extra `browser`, and a Chromium")
    from playwright.sync_api import Error, sync_playwright

    own = os.environ.get(BROWSER) or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as started:
        try:
            opened = started.chromium.launch(executable_path=own, args=["--no-sandbox", "--headless=shell"])
        except Error as error:
            pytest.skip(f"needs a Chromium ({BROWSER}): {error}")
        yield opened
        opened.close()


SCHEMES = pytest.mark.parametrize("scheme", ["light", "dark"])
WIDTHS = pytest.mark.parametrize("width", [390, 1280])
OPEN_ALL = "document.querySelectorAll('details').forEach(d => { d.open = true; })"


def opened(browser, path, width, scheme):
    """The page, with everything folded out, and what the browser says about it."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url))
    page.goto(path.as_uri())
    page.evaluate(OPEN_ALL)
    return page, said


def stands_out(page, element):
    """Whether text stands out from the page."""
    ink, paper = page.evaluate(
        f"[getComputedStyle(document.querySelector('{element}')).fill, getComputedStyle(document.body).backgroundColor]"
    )
    light = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
    return abs(light[0] - light[1]) > 400


@SCHEMES
@WIDTHS
def test_every_static_figure_is_visible_and_nothing_complains(static_page, browser, width, scheme):
    page, said = opened(browser, static_page, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    drawings = page.locator("figure svg").all()
    assert len(drawings) == len(list((static_page.parent / "figures").glob("*.svg")))
    for drawing in drawings:
        drawing.scroll_into_view_if_needed()
        box = drawing.bounding_box()
        assert drawing.is_visible()
        assert box["width"] >= min(width - 80, 300)
        assert box["height"] >= 100
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height))"
    )
    assert smallest >= 7, "no text is too small to read"
    assert stands_out(page, "figure svg text")
    assert said == []
    page.context.close()


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_interactive_figures_answer_to_the_pointer(made, browser, width, scheme):
    """Offline: each is drawn when it comes into view; hovering says values, a click on a name hides its curve."""
    if not interactive.is_installed():
        pytest.skip("needs the extra `report`")
    page, said = opened(browser, made.page, width, scheme)
    page.wait_for_selector("html[data-interactive=ready]")
    for figure in page.locator("figure").all():
        figure.scroll_into_view_if_needed()
        figure.locator(".main-svg").first.wait_for()
        assert not figure.locator(".drawing > svg").is_visible(), "the static figure gives way"
        box = figure.locator(".main-svg").first.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    assert stands_out(page, "figure .xtitle")
    first = page.locator("figure").first
    first.scroll_into_view_if_needed()
    points = first.locator(".scatterlayer .point")
    before = points.count()
    point = points.last.bounding_box()
    page.mouse.move(point["x"] + point["width"] / 2, point["y"] + point["height"] / 2)
    hover = first.locator(".hoverlayer text").first
    hover.wait_for()
    assert any(word in str(first.locator(".hoverlayer").text_content()) for word in ("FLOPs", "free"))
    first.locator(".legendtoggle").last.click()
    page.wait_for_function(
        "n => document.querySelector('figure').querySelectorAll('.scatterlayer .point').length < n", arg=before
    )
    assert said == []
    page.context.close()
