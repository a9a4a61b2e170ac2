"""Tables of `experiments.policy_gradient`, computed from its cells alone."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np

from cads.runtime.atomic_files import whole_file
from cads.study.analysis.points import half_width

ALLOWANCES = (0.3, 1.0, 3.0)
SOURCES = ("20", "60", "150", "280")
EXAMPLES = "examples"
FULL, TARGET_ONLY, RIGHT = "full", "target-only", "right ones, known"
ONLINE, PROBE_ONLY, NO_STEPS = "cads", "cads, probe alone", "cads, no steps"
STEPS, CHARGED, OFF = "search, steps uncharged", "search", "search, no steps"
BY_POLICY = "search, mask of its policy"
PREFIX = "prefix by signal"
LIVE = "live-penalty"
ONLINE_PAIRS = ((ONLINE, NO_STEPS), (PROBE_ONLY, NO_STEPS), (ONLINE, PROBE_ONLY))
SEARCH_PAIRS = ((STEPS, OFF), (BY_POLICY, OFF), (CHARGED, OFF))
ORDER = (FULL, TARGET_ONLY, RIGHT, ONLINE, PROBE_ONLY, NO_STEPS, STEPS, BY_POLICY, CHARGED, OFF)
"""The first methods of each table; the others come as in the cells."""
WIDTH = 110
"""Characters in a line of text."""

Line = tuple[str, float]
"""A method and its allowance; 0 for a method without."""


COMMANDS = """    python -m experiments.policy_gradient --out runs/policy-gradient
    python -m experiments.policy_gradient --out runs/policy-gradient --results experiments/results/policy_gradient.md"""
SETTING = (
    "*Worlds.* 4,800 images of Fashion-MNIST (14 x 14) in 20, 60, 150 or 280 sources: 25 % of the sources clean, 40 % "
    "with half to nine tenths of wrong labels, 5 % with fewer, 15 % of 2 to 4 classes, 10 % inverted or rotated, 5 % "
    "with each example 8 times. Or 10,000 single examples, 47 % of them wrong or rotated, whose sources nobody sees.",
    "*Model.* An MLP of 128 units. C is 300 steps of 64: four passes, or two over the single examples.",
    "*Target.* 200 examples. Each final model trains on its choice and on the target, as one more source. `cads` also "
    "begins with the target and draws the classes in even turns; `cads, no steps` less `full` is what that is worth.",
    "*Allowance.* A search spends it on top of C. `cads` has none: what it spends is part of C.",
    "*Signals.* `prefix by signal` ranks by the signal of `cads`: losses of a model of the target on 8 examples of "
    "each source, standardised within classes. `search` uses losses of such a model where a tenth of the allowance "
    "buys it: not at 0.3 C with 60 sources and more, nor at 1 C with 280. `thompson` (a Gaussian for the effect of "
    "each source) and `halving` begin with random subsets and have no signal but the trials.",
    "*Published forms* have as many rounds and masks as the allowance buys. `live-penalty` without steps is `full`.",
    "*Regret.* Points of test accuracy below the best line of the same world and seed, known only afterwards.",
    "*Guards* are off: a search returns what it prefers. A `*` says that the allowance bought no search, and that the "
    "full pool was trained on. A `-` says that for some seed nothing can be built for it.",
    "*Uncharged.* The steps of `search` take more than S^2 FLOPs for each of 2,048 draws and 60 steps, and this model "
    "is small beside that. Uncharged, they leave as many trials, and as long ones, as there are without steps: so it "
    "would be for a large model.",
    "*Mask of its policy*: where `search` returns the best draw that it has tried, this returns the sources with a "
    "probability above 1/2 after all (uncharged) steps: what the steps say by themselves.",
    "*Limits.* One data set, one small model, one C. Label noise is most of what is wrong, as in the worlds on which "
    "the constants of `cads` were chosen (`online.md`): that favours it and its signal.",
    "*No steps* of `search`: the policy stays at 1/2; signal, regression, design and trials are the same. Of `cads`: "
    "the same course, with equal weights. *Probe alone*: the weights of sources are those of one look at 8 examples of "
    "each, and stay; single examples are still weighed by the likelihood of their label.",
)


@dataclass
class Cells:
    """All cells of seeds that are finished.

    Attributes:
        rows: by world, line and seed. A row with "error" is that of a method which the allowance does not buy.
    """

    rows: dict[str, dict[Line, dict[int, dict[str, Any]]]]

    @classmethod
    def read(cls, path: Path) -> Cells:
        """The cells in a file of JSON lines; seeds of a world that lack a line which others have are left out."""
        rows: dict[str, dict[Line, dict[int, dict[str, Any]]]] = defaultdict(lambda: defaultdict(dict))
        for row in map(json.loads, path.read_text().splitlines()):
            world, seed, method, allowance = row["key"]
            rows[world][method, allowance][seed] = row
        for lines in rows.values():
            finished = set.intersection(*(set(by_seed) for by_seed in lines.values()))
            for line, by_seed in lines.items():
                lines[line] = {seed: by_seed[seed] for seed in sorted(finished)}
        return cls({world: dict(lines) for world, lines in rows.items()})

    @property
    def source_worlds(self) -> list[str]:
        """The worlds of sources, by their number."""
        return sorted((world for world in self.rows if world != EXAMPLES), key=int)

    def lines(self, worlds: Iterable[str]) -> list[Line]:
        """The lines of some worlds, those of each method together."""
        found = dict.fromkeys(line for world in worlds for line in self.rows[world])
        methods = list(dict.fromkeys([*ORDER, *(method for method, _ in found)]))
        return sorted(found, key=lambda line: (methods.index(line[0]), line[1]))

    def seeds(self, world: str) -> list[int]:
        """The finished seeds of a world."""
        return sorted(next(iter(self.rows[world].values())))

    def values(self, world: str, line: Line, name: str) -> dict[int, float]:
        """A number of each seed; without seeds that lack it."""
        by_seed = self.rows[world].get(line, {})
        return {seed: float(row[name]) for seed, row in by_seed.items() if name in row}

    def accuracy(self, world: str, line: Line) -> dict[int, float]:
        """Points, by seed."""
        return {seed: 100 * value for seed, value in self.values(world, line, "accuracy").items()}

    def regret(self, world: str, line: Line) -> dict[int, float]:
        """Points below the best of all lines of the same world and seed."""
        found = [self.accuracy(world, other) for other in self.rows[world]]
        best = {seed: max(values[seed] for values in found if seed in values) for seed in self.seeds(world)}
        return {seed: best[seed] - value for seed, value in self.accuracy(world, line).items()}

    def difference(self, world: str, one: Line, other: Line) -> dict[int, float]:
        """Points by which a line is above another, by seed."""
        a, b = self.accuracy(world, one), self.accuracy(world, other)
        return {seed: a[seed] - b[seed] for seed in sorted(a.keys() & b.keys())}

    def not_bought(self, world: str, line: Line) -> bool:
        """Whether a search found the allowance too small, and returned the full pool, for all seeds."""
        return line[1] > 0 and not any(self.values(world, line, "select").values())

    def choices_differ(self, world: str, one: Line, other: Line) -> dict[int, float]:
        """The share of sources or examples that are in one choice and not in the other, by seed."""
        shares = {}
        for seed, row in self.rows[world][one].items():
            bits = [_bits(r["chosen"]) for r in (row, self.rows[world][other][seed])]
            n = int(world) if world != EXAMPLES else len(bits[0])
            shares[seed] = float((bits[0] != bits[1]).sum() / n)
        return shares


def _bits(chosen: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(base64.b64decode(chosen), np.uint8))


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and half a 95 % t-interval (NaN for fewer than two values)."""
    found = np.array(list(values))
    if not len(found):
        return np.nan, np.nan
    return float(found.mean()), float(half_width(found)) if len(found) > 1 else np.nan


def over_worlds(by_world: Sequence[dict[int, float]]) -> list[float]:
    """The mean over worlds of each seed that all of them have."""
    if not by_world:
        return []
    seeds = sorted(set.intersection(*(set(values) for values in by_world)))
    return [float(np.mean([values[seed] for values in by_world])) for seed in seeds]


def verdict(values: Iterable[float]) -> str:
    """What a difference says: that it is clear of 0, and on which side, or that it is not."""
    values = list(values)
    mean, half = interval(values)
    if not any(values):
        return "nothing (no run differs)"
    if not abs(mean) > half:
        return f"nothing that can be told from 0 ({mean:+.2f} ± {half:.2f} points)"
    return f"{mean:+.2f} ± {half:.2f} points"


def write_report(cells: Path, results: Path) -> None:
    """Write the page."""
    read = Cells.read(cells)
    parts = [_head(read), _findings(read), _regret(read), _pairs(read), _choices(read), _costs(read)]
    if EXAMPLES in read.rows:
        parts.append(_examples(read))
    whole_file(results, "\n\n".join(parts) + "\n")


def _head(cells: Cells) -> str:
    worlds = cells.source_worlds
    steps = over_worlds([_over_allowances(cells, world, (STEPS, OFF)) for world in worlds])
    online = over_worlds([cells.difference(world, (ONLINE, 0.0), (NO_STEPS, 0.0)) for world in worlds])
    probe = over_worlds([cells.difference(world, (PROBE_ONLY, 0.0), (NO_STEPS, 0.0)) for world in worlds])
    most, least = max(_allowances(cells)), min(_allowances(cells))
    prefix = over_worlds([cells.difference(world, (PREFIX, least), (ONLINE, 0.0)) for world in worlds])
    live = over_worlds([cells.difference(world, (LIVE, most), (FULL, 0.0)) for world in worlds])
    first = (
        f"In the search `search` the steps of the policy are worth {verdict(steps)}, even if they cost nothing. Steps "
        "along a gradient without sampling, which a model in training gives, are worth more. In `cads` it is "
        f"{verdict(online)}, for no allowance; one look at the pool, after which the weights of sources stay, is worth "
        f"{verdict(probe)}. In `live-penalty` it is {verdict(live)}, for {most:g} C. A line search along the same "
        f"signal as that of `cads` comes near without any gradient: `{PREFIX}` at {least:g} C less "
        f"`cads` is {verdict(prefix)}."
    )
    seeds = ", ".join(f"{world}: {len(cells.seeds(world))}" for world in cells.rows)
    drawn = (
        f"A seed draws the data, the sources, and the training. Seeds of each world: {seeds}. Intervals are 95 % "
        "t-intervals over seeds, and differences are paired."
    )
    setting = "\n".join(_wrapped(f"- {text}", "  ") for text in SETTING)
    return f"# What the policy gradient is worth\n\n{_wrapped(first)}\n\n{COMMANDS}\n\n{_wrapped(drawn)}\n\n{setting}"


def _over_allowances(cells: Cells, world: str, pair: tuple[str, str]) -> dict[int, float]:
    """The difference of a pair by seed, mean over the allowances."""
    found = [cells.difference(world, (pair[0], a), (pair[1], a)) for a in _allowances(cells)]
    seeds = set.intersection(*(set(f) for f in found)) if found else set()
    return {seed: float(np.mean([f[seed] for f in found])) for seed in sorted(seeds)}


def _allowances(cells: Cells) -> list[float]:
    return sorted({allowance for _, allowance in cells.lines(cells.rows) if allowance})


def _findings(cells: Cells) -> str:
    worlds, lines = cells.source_worlds, ["## Findings", ""]
    for allowance in _allowances(cells):
        on, off = (STEPS, allowance), (OFF, allowance)
        values = over_worlds([cells.difference(world, on, off) for world in worlds])
        shares = [share for world in worlds for share in cells.choices_differ(world, on, off).values()]
        differ = sum(share > 0 for share in shares)
        lines.append(
            f"- Steps of `search` at {allowance:g} C: {verdict(values)}. They change the choice in {differ} of "
            f"{len(shares)} runs, and {_percent(shares)} of the sources. {_trials(cells, on)}"
        )
    places = [(world, a) for world in worlds for a in _allowances(cells) if cells.not_bought(world, (CHARGED, a))]
    if places:
        which = ", ".join(f"{world} sources at {a:g} C" for world, a in places)
        lines.append(f"- Charged, the steps leave no search to {which}.")
    for allowance in _allowances(cells):
        values = over_worlds([cells.difference(w, (BY_POLICY, allowance), (OFF, allowance)) for w in worlds])
        lines.append(f"- The mask of the policy at {allowance:g} C, less the choice without steps: {verdict(values)}.")
    for one, other in ONLINE_PAIRS:
        values = over_worlds([cells.difference(world, (one, 0.0), (other, 0.0)) for world in worlds])
        lines.append(f"- `{one}` less `{other}`: {verdict(values)}.")
    for allowance in _allowances(cells):
        best = _best_search(cells, allowance)
        values = over_worlds([cells.difference(w, (ONLINE, 0.0), (best, allowance)) for w in worlds])
        lines.append(
            f"- The best search at {allowance:g} C, known afterwards, is `{best}`. "
            f"`cads` less this, without any allowance: {verdict(values)}."
        )
    for allowance in _allowances(cells):
        values = over_worlds([cells.difference(w, (STEPS, allowance), (PREFIX, allowance)) for w in worlds])
        lines.append(f"- `{STEPS}` less `{PREFIX}` at {allowance:g} C: {verdict(values)}.")
    if EXAMPLES in cells.rows:
        lines += _example_findings(cells)
    return "\n".join(line if line.startswith("#") else _wrapped(line, "  ") for line in lines)


def _trials(cells: Cells, line: Line) -> str:
    """How many trials and choices come from the policy that has moved."""
    rows = [row for world in cells.source_worlds for row in cells.rows[world][line].values() if "from" in row]
    if {row["rungs"] for row in rows} == {1}:
        return "There is one rung of trials, and steps that come after it change no trial."
    origins = np.sum([row["from"][0] for row in rows], axis=0)
    # Each rung tries the full pool again, whatever the policy.
    trials = origins.sum() - sum(row["rungs"] - 1 for row in rows)
    drawn, choices = _percent([origins[2] / trials]), sum(row["from"][1] == "policy" for row in rows)
    return (
        f"Later rungs have {trials / len(rows):.1f} trials besides the full pool. Of these {drawn} "
        f"are draws of the policy that has moved, and so are {choices} of {len(rows)} choices. The others are from the "
        "first rung, or neighbours of such."
    )


def _example_findings(cells: Cells) -> list[str]:
    """`cads` on single examples against its course without steps, and against each search that was bought."""
    values = cells.difference(EXAMPLES, (ONLINE, 0.0), (NO_STEPS, 0.0)).values()
    found = [f"- Single examples, `cads` less its course without steps: {verdict(values)}."]
    for line in cells.lines([EXAMPLES]):
        if line[1] and not cells.not_bought(EXAMPLES, line):
            values = cells.difference(EXAMPLES, (ONLINE, 0.0), line).values()
            found.append(f"- Single examples, `cads` less `{line[0]}` at {line[1]:g} C: {verdict(values)}.")
    return found


def _best_search(cells: Cells, allowance: float) -> str:
    """The search that pays for all it does, of the least mean regret over worlds, if all worlds have it."""
    worlds = cells.source_worlds

    def mean(method: str) -> float:
        found = [cells.regret(world, (method, allowance)) for world in worlds]
        return float(np.mean([np.mean(list(f.values())) for f in found])) if all(found) else np.inf

    return min(
        (method for method, a in cells.lines(worlds) if a == allowance and method not in (STEPS, BY_POLICY)), key=mean
    )


def _table(
    title: str, header: Sequence[str], lines: Iterable[Line], cell: Callable[[Line], Sequence[str]], note: str
) -> str:
    rows = [["method", "C", *header], ["---"] * (2 + len(header))]
    rows += [[line[0], f"{line[1]:g}" if line[1] else "", *cell(line)] for line in lines]
    return _section(title, note, rows)


def _percent(shares: Iterable[float]) -> str:
    """Their mean."""
    return f"{100 * np.mean(list(shares)):.0f} %"


def _signed(values: Iterable[float], sign: str = "+") -> str:
    mean, half = interval(values)
    return "-" if np.isnan(mean) else f"{mean:{sign}.2f} ± {half:.2f}"


def _regret(cells: Cells) -> str:
    worlds = cells.source_worlds

    def cell(line: Line) -> list[str]:
        found = [cells.regret(world, line) for world in worlds]
        whole = [len(f) == len(cells.seeds(world)) for world, f in zip(worlds, found, strict=True)]
        texts = [
            (_signed(f.values(), "") if w else "-") + ("*" if w and cells.not_bought(world, line) else "")
            for world, f, w in zip(worlds, found, whole, strict=True)
        ]
        return [*texts, _signed(over_worlds(found), "") if all(whole) else "-"]

    return _table(
        "Regret, points", [*(f"{w} sources" for w in worlds), "mean"], cells.lines(worlds), cell, "Less is better."
    )


def _pair_lines(cells: Cells) -> list[tuple[Line, Line]]:
    pairs = [((one, 0.0), (other, 0.0)) for one, other in ONLINE_PAIRS]
    pairs += [((one, a), (other, a)) for one, other in SEARCH_PAIRS for a in _allowances(cells)]
    return pairs + [((LIVE, a), (FULL, 0.0)) for a in _allowances(cells)]


def _pairs(cells: Cells) -> str:
    worlds = cells.source_worlds

    def cell(one: Line, other: Line) -> list[str]:
        found = [cells.difference(world, one, other) for world in worlds]
        return [*(_signed(f.values()) for f in found), _signed(over_worlds(found))]

    return _pair_table(
        "Steps on less steps off, points", [*(f"{w} sources" for w in worlds), "mean"], cells, cell, "More is better."
    )


def _choices(cells: Cells) -> str:
    worlds = cells.source_worlds

    def cell(one: Line, other: Line) -> list[str]:
        found = [list(cells.choices_differ(world, one, other).values()) for world in worlds]
        return [f"{_percent(f)} ({sum(x > 0 for x in f)} of {len(f)})" for f in found]

    return _pair_table(
        "How often choices differ",
        [f"{w} sources" for w in worlds],
        cells,
        cell,
        "Sources that are in one choice and not in the other, and in how many seeds the choices differ at all. Of "
        "`cads` a source is in the choice if its examples have at least half of the largest weight.",
    )


def _pair_table(
    title: str, header: Sequence[str], cells: Cells, cell: Callable[[Line, Line], Sequence[str]], note: str
) -> str:
    rows = [["on less off", "C", *header], ["---"] * (2 + len(header))]
    for one, other in _pair_lines(cells):
        label = f"{one[0].removeprefix('search, ')} less {other[0].removeprefix('search, ').removeprefix('cads, ')}"
        rows.append([label, f"{one[1]:g}" if one[1] else "", *cell(one, other)])
    return _section(title, note, rows)


def _section(title: str, note: str, rows: Sequence[Sequence[str]]) -> str:
    body = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"## {title}\n\n{_wrapped(note)}\n\n{body}"


def _wrapped(text: str, indent: str = "") -> str:
    return fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def _costs(cells: Cells) -> str:
    worlds = cells.source_worlds

    def mean(world: str, line: Line, name: str) -> float:
        values = list(cells.values(world, line, name).values())
        return float(np.mean(values)) if values else np.nan

    def cell(line: Line) -> list[str]:
        wrong = [mean(world, line, "wrong") for world in worlds]
        costs = [[mean(world, line, name) for world in worlds] for name in ("select", "policy")]
        texts = ["-" if np.isnan(x) else _percent([x]) for x in wrong]
        return [*texts, *(("-" if np.isnan(c).all() else f"{np.nanmin(c):.2f} to {np.nanmax(c):.2f}") for c in costs)]

    lines = [line for line in cells.lines(worlds) if line[0] != TARGET_ONLY]
    return _table(
        "What is wrong in the choice, and what choosing took",
        [*(f"{w} sources" for w in worlds), "spent, C", "on the policy, C"],
        lines,
        cell,
        "The share of wrong labels and shifted images in what is drawn from the pool. Costs are from the world of the "
        "least to that of the greatest.",
    )


def _examples(cells: Cells) -> str:
    def cell(line: Line) -> list[str]:
        regret, wrong = cells.regret(EXAMPLES, line), list(cells.values(EXAMPLES, line, "wrong").values())
        spent = float(np.mean(list(cells.values(EXAMPLES, line, "select").values())))
        mark = "*" if cells.not_bought(EXAMPLES, line) else ""
        differ = list(cells.choices_differ(EXAMPLES, line, (ONLINE, 0.0)).values())
        texts = [_signed(regret.values(), "") + mark, _percent(wrong) if wrong else "-"]
        return [*texts, _percent(differ), f"{spent:.2f}"]

    return _table(
        "10,000 single examples",
        ["regret", "wrong in the choice", "differs from `cads`", "spent, C"],
        cells.lines([EXAMPLES]),
        cell,
        "Regret in points. A choice differs from that of `cads` in examples that one has and the other has not.",
    )
