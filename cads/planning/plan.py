"""The plan of a budget, before anything is spent, on one screen: the cost of each method, what remains, what to use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cads.accounting.stage_labels import stage_label
from cads.accounting.units import duration, size
from cads.training.final import NEARLY_ALL

SOURCE = "Yin and Rush, ICLR 2025, arXiv 2410.16208"
"""Source of the size ratios."""
WIDTH = 80
"""Columns of a plan."""
SHOWN = ("cads", "search", "joint", "target-only", "full", "random", "loss", "embedding", "bm25", "less")
"""Methods that are shown without details: what most would choose from."""
DEFAULT, SEARCH = "cads", "search"


@dataclass(frozen=True)
class MethodPlan:
    """The plan of one method at the budget.

    Attributes:
        method: its name.
        stages: FLOPs of each stage of selection, by its name in ledgers.
        selection: FLOPs of all stages. training: FLOPs that remain for training.
        share: selection over the budget; above 1 if selection is not part of the budget and costs more.
        usages: examples seen in training, with repetitions. examples: examples of the pool that can be seen.
        tokens, epochs: of the usages.
        seconds: selection and training at the given FLOP/s, and all that comes before and after, if that is known.
            Without `is_timed` selection is at the speed of training steps, the least that it takes.
        memory: peak bytes of training and of selection, by these names; of the process on a CPU where steps were timed,
            otherwise of the model, its training and what is kept for the backward pass.
        size_ratio: parameters of the trained model over those of the scorer.
        needed_ratio: the size ratio from which on the method was found compute-optimal.
        note: a remark for the reader.
        kept: examples of the pool that training can draw; None if that depends on what selection finds.
        rides: whether selection rides on the training. is_timed: whether selection of few examples was timed.
        end: why training ends before the budget does, and where, in words; "" if it does not.
    """

    method: str
    stages: dict[str, float]
    selection: float
    training: float
    share: float
    usages: float
    examples: float
    tokens: float
    epochs: float
    seconds: float
    memory: dict[str, float]
    size_ratio: float | None = None
    needed_ratio: float | None = None
    note: str = ""
    kept: int | None = None
    rides: bool = False
    is_timed: bool = False
    end: str = ""

    @property
    def in_range(self) -> bool | None:
        """Whether the size ratio is at least `needed_ratio`; None if one of them is not known."""
        if self.size_ratio is None or self.needed_ratio is None:
            return None
        return self.size_ratio >= self.needed_ratio


@dataclass(frozen=True)
class Plan:
    """The plan of a budget for several methods.

    Attributes:
        task: its name. accounting: of all FLOPs. budget: as given. flops: the budget.
        count_selection: whether the budget covers selection.
        pool: number of examples. pool_tokens: D, their tokens. usage: FLOPs of one example in training.
        flops_per_second: rate of computation, for the times. rate_from: source of the rate, in words.
        methods: one plan for each method. refused: why a method has no plan, by method.
        start_up: seconds of a run beside selection and training, which are in all times; None if they are not known.
        sources: number of sources of the pool, 0 without any. target: number of target examples.
        device: on which the rate was measured and what training does there, in words; empty if the rate was given.
    """

    task: str
    accounting: str
    budget: str
    flops: float
    count_selection: bool
    pool: int
    pool_tokens: float
    usage: float
    flops_per_second: float
    rate_from: str
    methods: list[MethodPlan]
    refused: dict[str, str] = field(default_factory=dict)
    start_up: float | None = None
    sources: int = 0
    target: int = 0
    device: str = ""

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON; in FLOPs, seconds and bytes."""
        record = asdict(self)
        for row, method in zip(record["methods"], self.methods, strict=True):
            row["in_range"] = method.in_range
        return {**record, "ratio_source": SOURCE}

    def table(self, *, details: bool = False, first: str | None = None) -> Group:
        """The plan for the terminal, in 80 columns: what most want to know, or all of it.

        Args:
            details: all methods, the stages of their selection, and why others have no plan.
            first: a method that is listed first, whichever it is.
        """
        return plan_table(self, details=details, first=first)


def plan_table(plan: Plan, *, details: bool, first: str | None) -> Group:
    """The plan for the terminal; see `Plan.table`."""
    shown = plan.methods if details else shown_methods(plan.methods, first)
    parts: list[Text | Table] = [Text(_head(plan)), _methods(plan, shown)]
    if details:
        parts.append(_stages(plan))
        reasons = [f"{m.method}: {m.note}" for m in plan.methods if m.note]
        reasons += [f"{name} has no plan: {reason}" for name, reason in plan.refused.items()]
        parts.append(Text("\n".join(reasons)))
    hidden = len(plan.methods) - len(shown)
    further = [f"{hidden} more methods"] if hidden else []
    further += [f"{len(plan.refused)} do not apply"] if plan.refused and not details else []
    if further:
        parts.append(Text(f"{', '.join(further)}: --details true"))
    return Group(*parts, Text(recommendation(plan)))


def shown_methods(methods: Sequence[MethodPlan], first: str | None) -> list[MethodPlan]:
    """The methods that most would choose from, after the one that is asked for; all if they are few."""
    if len(methods) <= len(SHOWN):
        return list(methods)
    by_name = {m.method: m for m in methods}
    return [by_name[name] for name in dict.fromkeys([first, *SHOWN]) if name in by_name]


def recommendation(plan: Plan) -> str:
    """What to use at the budget, what a search would cost, and which rankings have nothing to choose."""
    rows = {m.method: m for m in plan.methods}
    lines = []
    if DEFAULT in rows:
        chosen = rows[DEFAULT]
        what = chosen.note or "it selects while it trains, and its one budget covers all that it does"
        lines.append(f"At {plan.budget}: `{DEFAULT}`; {'; '.join(filter(None, [what, chosen.end]))}.")
    if SEARCH in rows:
        search = rows[SEARCH]
        cost = f"{search.share:.0%} of it" if plan.count_selection else f"{search.share:.0%} of it on top"
        lines.append(f"`{SEARCH}`: {search.note}." if search.note else f"A search would take {cost}.")
    elif SEARCH in plan.refused and not plan.sources:
        lines.append("Nothing can be searched: the pool has no sources.")
    everything = [m.method for m in plan.methods if m.selection and keeps_everything(plan, m)]
    if everything:
        lines.append(
            f"{', '.join(f'`{name}`' for name in everything)}: the budget pays for the whole pool, so that what is "
            "scored changes nothing; give a fraction, or a smaller budget."
        )
    return "\n".join(lines)


def keeps_everything(plan: Plan, method: MethodPlan) -> bool:
    """Whether a method keeps nearly all of the pool, so that it is as good as no selection."""
    return method.kept is not None and method.kept >= NEARLY_ALL * plan.pool


def _head(plan: Plan) -> str:
    sources = f"{plan.sources} sources" if plan.sources else "no sources"
    covers = "selection and training" if plan.count_selection else "training; selection comes on top"
    beside = "" if plan.start_up is None else f"\n{duration(plan.start_up)} of each time: start-up, reading, test."
    device = f"\n{plan.device}." if plan.device else ""
    # An image counts as one token, which says nothing.
    tokens = "" if plan.pool_tokens == plan.pool else f"; the pool has {plan.pool_tokens:.4g} tokens"
    return (
        f"{plan.task}: pool of {plan.pool:,} ({sources}), target of {plan.target:,}\n"
        f"{plan.budget} = {plan.flops:.4g} FLOPs for {covers}\n"
        f"One example costs {plan.usage:.4g} FLOPs ({plan.accounting}){tokens}\n"
        f"Speed: {plan.flops_per_second:.3g} FLOP/s, {plan.rate_from}.{beside}{device}"
    )


def _methods(plan: Plan, methods: Sequence[MethodPlan]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    has_ratio = any(m.needed_ratio for m in methods)
    table.add_column("method", no_wrap=True)
    for column in ("selection", "epochs", "time", "memory"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("size ratio" if has_ratio else "trains on", no_wrap=True)
    for m in methods:
        table.add_row(
            m.method,
            f"{m.share:.1%}" if m.selection else "free",
            f"{m.epochs:.3g}",
            ("> " if m.selection and not (m.rides or m.is_timed) else "") + duration(m.seconds),
            size(max(m.memory.values())),
            _ratio(m) if has_ratio else _trains_on(plan, m),
        )
    return table


def _trains_on(plan: Plan, m: MethodPlan) -> str:
    """What of the pool a method trains on."""
    if m.kept == 0:
        return "the target"
    if m.rides:
        return "target, its kind" if m.note else "all, weighed"
    if m.note:
        return "see --details"
    if m.kept is None:
        return "what it finds"
    return "everything" if keeps_everything(plan, m) else f"{m.kept / plan.pool:.0%} of the pool"


def _stages(plan: Plan) -> Table:
    table = Table(title="Selection by stage, FLOPs", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("method", no_wrap=True)
    table.add_column("stage")
    table.add_column("FLOPs", justify="right", no_wrap=True)
    for m in plan.methods:
        for stage, flops in m.stages.items():
            table.add_row(m.method, stage_label(stage), f"{flops:.3e}")
    return table


def _ratio(m: MethodPlan) -> str:
    """The size ratio against the needed one, in words."""
    if m.size_ratio is None:
        return "-"
    return f"{m.size_ratio:.3g} {'>=' if m.in_range else '<'} {m.needed_ratio:g}"
