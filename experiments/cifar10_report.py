"""The page and the figure of `experiments.cifar10`, computed from its cells alone."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from cads.errors import ConfigError
from cads.runtime.atomic_files import whole_file
from cads.study.analysis.points import half_width
from experiments.online import Method
from experiments.online_report import ONLINE, SINGLE, _row

mpl.use("Agg")

FULL = "full"
FREE = ("full", "target-only", "joint", "random", "source")
"""Selectors that compute nothing to select."""
POINTS_ABOVE_SOURCE, POINTS_ABOVE_FULL = 2.0, 10.0
"""The aim: points of accuracy of `cads` above the best single source, and above the full pool."""
PUBLISHED_PASSES = 5
PUBLISHED = {"CADS-S": 67.22, "best single source": 65.08, "full": 57.03}
"""Test accuracy, %, that the paper has at `PUBLISHED_PASSES`; its selection comes on top."""
WITHOUT_PART = f"{ONLINE}, "
"""How the names of `cads` without one of its parts begin. They are in the tables, and not in the figure."""
MARGIN = 1.08
"""By how much the band goes beyond the first and the last budget."""
MARKERS = ("^", "s", "v", "D", "P", "X", "<", ">")
"""Of the methods that choose; hollow where selection comes on top."""

Seeds = Mapping[int, Mapping[str, Any]]
"""The cells of one method at one place, by seed."""


@dataclass(frozen=True)
class Place:
    """The finished cells of one model at one budget.

    Attributes:
        model: its label. passes: the budget. by_method: cells by method and seed. unaffordable: what was not bought.
    """

    model: str
    passes: float
    by_method: Mapping[str, Seeds]
    unaffordable: Sequence[str]

    def values(self, method: str) -> np.ndarray:
        """Test accuracy in points, by seed, shape (n,)."""
        cells = self.by_method.get(method, {})
        return np.array([100 * cells[seed]["accuracy"] for seed in sorted(cells)])

    def flops(self, method: str) -> float:
        """Selection and training, mean over seeds."""
        return float(np.mean([cell["select"] + cell["train"] for cell in self.by_method[method].values()]))

    def cost(self, method: str) -> float:
        """Selection and training in budgets, mean over seeds."""
        return float(np.mean([(c["select"] + c["train"]) / c["budget"] for c in self.by_method[method].values()]))

    def less(self, method: str, other: str) -> np.ndarray:
        """Paired differences in points, over the seeds that both have, shape (n,)."""
        one, two = self.by_method.get(method, {}), self.by_method.get(other, {})
        return np.array([100 * (one[s]["accuracy"] - two[s]["accuracy"]) for s in sorted(one.keys() & two.keys())])

    def complete(self) -> list[str]:
        """The methods that have as many seeds as `cads`, and those with more."""
        return [name for name, cells in self.by_method.items() if len(cells) >= len(self.by_method[ONLINE])]

    def best(self, methods: Sequence[str]) -> str | None:
        """The one of the highest mean over the seeds that `cads` has too: known only afterwards."""
        means = {}
        for method in methods:
            shared = sorted(self.by_method.get(method, {}).keys() & self.by_method[ONLINE].keys())
            if shared:
                means[method] = float(np.mean([self.by_method[method][seed]["accuracy"] for seed in shared]))
        return max(means, key=lambda name: means[name]) if means else None


def read_places(path: Path) -> list[Place]:
    """The places at which `cads` was run, by model and budget.

    Raises:
        ConfigError: if there are none.
    """
    done: dict[tuple[str, float], dict[str, dict[int, Any]]] = defaultdict(lambda: defaultdict(dict))
    unaffordable: dict[tuple[str, float], list[str]] = defaultdict(list)
    for row in map(json.loads, path.read_text("utf-8").splitlines()):
        model, _, passes, seed, method = row["key"]
        if "error" in row:
            unaffordable[model, passes].append(method)
        else:
            done[model, passes][method][seed] = row
    places = [Place(*at, by_method, sorted(set(unaffordable[at]))) for at, by_method in sorted(done.items())]
    places = [place for place in places if ONLINE in place.by_method]
    if not places:
        raise ConfigError(f"{path} has no cell of `{ONLINE}`: run more cells")
    return places


def write_page(
    cells: Path,
    results: Path,
    command: str,
    methods: Sequence[Method],
    about: str,
    planned: Sequence[tuple[str, float]],
) -> None:
    """Write the page to `results`, with the command that does so, and beside it the figure and the cells.

    Args:
        methods: all of the comparison, in the order of the tables. about: sentences on task and recipe.
        planned: models and budgets in passes that the grid has.

    Raises:
        ConfigError: if `cads` was not run.
    """
    places = read_places(cells)
    seeds = sorted({len(place.by_method[ONLINE]) for place in places})
    run = {(place.model, place.passes) for place in places}
    missing = [f"{model} at {passes:g}" for model, passes in planned if (model, passes) not in run]
    counts = " to ".join(map(str, sorted({seeds[0], seeds[-1]})))
    title = "1 seed" if counts == "1" else f"{counts} seeds, 95% t-intervals"
    parts = [
        f"# {results.stem}: {title}",
        f"    {command.split(' --results', maxsplit=1)[0]} --download\n    {command}",
        about,
        "A budget C is in passes over the pool. It pays for selection and training. In rows marked `on top`, as "
        "published, it pays for training alone, and selection comes on top. A seed is one of the data "
        "and of the training; differences are paired.",
        *([f"Models and budgets of the grid that were not run: {'; '.join(missing)} passes."] if missing else []),
        f"## The aim\n\n{_aim(places)}",
    ]
    for model in dict.fromkeys(place.model for place in places):
        of_model = [place for place in places if place.model == model]
        parts.append(f"## {model}: test accuracy, %, and total cost in C\n\n{_table(of_model, methods)}")
        parts.append(f"## {model}: what training drew from the pool\n\n{_draws(of_model, methods)}")
    whole_file(results, "\n\n".join(parts) + "\n")
    whole_file(results.with_suffix(".jsonl"), cells.read_text("utf-8"))
    draw(places, methods, results.with_suffix(".png"))


def _aim(places: Sequence[Place]) -> str:
    published = ", ".join(f"{name} {value}" for name, value in PUBLISHED.items())
    lines = [
        f"At {PUBLISHED_PASSES} passes and all in, `{ONLINE}` shall be {POINTS_ABOVE_SOURCE:g} points above the best "
        f"single source and {POINTS_ABOVE_FULL:g} above `{FULL}`. The paper has there, with selection on top: "
        f"{published}. The best single source is known only afterwards.",
        "",
        _row(["model", "C, passes", ONLINE, "best single source", "cads less it", "full", "cads less it"]),
        _row(["---"] * 7),
    ]
    for place in places:
        source = place.best([name for name in place.by_method if name.startswith(SINGLE)])
        row = [place.model, f"{place.passes:g}", _mean(place.values(ONLINE))]
        for reference, aim in ((source, POINTS_ABOVE_SOURCE), (FULL, POINTS_ABOVE_FULL)):
            if reference is None or not len(difference := place.less(ONLINE, reference)):
                row += ["-", "-"]
                continue
            name = "" if reference == FULL else f"{reference}: "
            met = " yes" if difference.mean() >= aim else " **no**"
            shown = met if place.passes == PUBLISHED_PASSES else ""
            row += [f"{name}{_mean(place.values(reference))}", f"{_signed(difference)}{shown}"]
        lines.append(_row(row))
    return "\n".join(lines)


def _table(places: Sequence[Place], methods: Sequence[Method]) -> str:
    """Every method at every budget; * marks the best of a budget."""
    columns = [text for place in places for text in (f"C = {_passes(place)}", "cost")]
    lines = [_row(["method", *columns]), _row(["---"] * (len(columns) + 1))]
    best = [place.best(place.complete()) for place in places]
    run = [m.name for m in methods if any(m.name in place.by_method for place in places)]
    for name in run:
        row = [f"**{name}**" if name == ONLINE else name]
        for place, winner in zip(places, best, strict=True):
            values = place.values(name)
            mark = "*" if name == winner else ""
            row += [f"{mark}{_mean(values)}", f"{place.cost(name):.2f}"] if len(values) else ["-", "-"]
        lines.append(_row(row))
    lines += [
        "",
        "`*`: the highest mean of all seeds. `(1)`: one seed. With two, `±` is nine standard deviations.",
    ]
    for place in places:
        absent = [m.name for m in methods if m.name not in place.by_method]
        not_run = [name for name in absent if name not in place.unaffordable]
        named = [("Not run", not_run), ("Not bought by the budget", place.unaffordable)]
        for what, names in named:
            if names:
                lines += ["", f"{what} at {_passes(place)}: {'; '.join(names)}."]
    return "\n".join(lines)


def _draws(places: Sequence[Place], methods: Sequence[Method]) -> str:
    """Shares of target and sources in the final training of the methods that choose, means over seeds."""
    choosing = [m.name for m in methods if m.selector not in FREE]
    rows = [(place, name) for place in places for name in choosing if name in place.by_method]
    sources = list(
        dict.fromkeys(s for place, name in rows for c in place.by_method[name].values() for s in c["shares"])
    )
    header = ["method", "C, passes", "target, % of a batch", *(f"{name}, % of the pool's part" for name in sources)]
    lines = [_row(header), _row(["---"] * len(header))]
    for place, name in rows:
        cells = place.by_method[name].values()
        shares = [[100 * cell["target"], *(100 * cell["shares"][source] for source in sources)] for cell in cells]
        lines.append(_row([name, f"{place.passes:g}", *(f"{x:.0f}" for x in np.mean(shares, axis=0))]))
    lines += [
        "",
        (
            "Means over seeds. Where the budget buys no selection, a method takes the full pool. Those of `cads` are "
            "from the end of its run, after a phase on the target alone."
        ),
    ]
    return "\n".join(lines)


def draw(places: Sequence[Place], methods: Sequence[Method], path: Path) -> None:
    """Accuracy against total FLOPs, a panel for each model; what is free is a grey band."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(place.model for place in places))
    figure = Figure(figsize=(1.8 + 4.6 * len(models), 4.2), layout="constrained")
    axes: Any = figure.subplots(1, len(models), squeeze=False)[0]
    for ax, model in zip(axes, models, strict=True):
        _panel(ax, [place for place in places if place.model == model], methods)
        ax.set_title(model, fontsize=10)
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside right center", frameon=False)
    figure.supxlabel("FLOPs of selection and training", fontsize=9)
    figure.supylabel("test accuracy, %", fontsize=9)
    figure.savefig(path, dpi=110)


def _panel(ax: Any, places: Sequence[Place], methods: Sequence[Method]) -> None:
    free = [m.name for m in methods if m.selector in FREE and m.selector != "source"]
    free = [name for name in free if all(name in place.by_method for place in places)]
    budgets = [place.flops(ONLINE) for place in places]
    ends = [budgets[0] / MARGIN, *budgets, budgets[-1] * MARGIN]
    means = np.array([[place.values(name).mean() for name in free] for place in (places[0], *places, places[-1])])
    if free:
        ax.fill_between(ends, means.min(axis=1), means.max(axis=1), color="0.85", label="free, no source known")
    singles = [place.best([name for name in place.by_method if name.startswith(SINGLE)]) for place in places]
    if None not in singles:
        values = [place.values(str(name)).mean() for place, name in zip(places, singles, strict=True)]
        values = [values[0], *values, values[-1]]
        ax.plot(ends, values, ":", color="0.25", label="best single source, known afterwards")
    choosing = [m for m in methods if m.selector not in FREE and m.name != ONLINE]
    choosing = [m for m in choosing if not m.name.startswith(WITHOUT_PART)]
    names = list(dict.fromkeys(m.name.removesuffix(", on top") for m in choosing))
    for method in choosing:
        run = [place for place in places if method.name in place.by_method]
        if run:
            marker = MARKERS[names.index(method.name.removesuffix(", on top")) % len(MARKERS)]
            face = "none" if method.on_top else "#0072B2"
            ax.plot(
                [place.flops(method.name) for place in run],
                [place.values(method.name).mean() for place in run],
                *(marker,),
                color="#0072B2",
                markerfacecolor=face,
                markersize=5,
                label=method.name,
            )
    ax.plot(
        budgets, [place.values(ONLINE).mean() for place in places], "o-", color="#D55E00", linewidth=2, label=ONLINE
    )
    ax.set_xscale("log")
    ax.set_xticks(budgets, [f"{flops:.2g}\n{_passes(place)}" for flops, place in zip(budgets, places, strict=True)])
    ax.minorticks_off()
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _passes(place: Place) -> str:
    return f"{place.passes:g} pass" + ("" if place.passes == 1 else "es")


def _mean(values: np.ndarray) -> str:
    if len(values) < 2:
        return f"{values.mean():.2f} ({len(values)})"
    return f"{values.mean():.2f} ± {half_width(values):.2f}"


def _signed(differences: np.ndarray) -> str:
    return f"{differences.mean():+.2f}" + (f" ± {half_width(differences):.2f}" if len(differences) > 1 else "")
