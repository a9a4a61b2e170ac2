"""The ledger of every FLOP that is spent, by phase and stage."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from cads.accounting.stage_labels import stage_label
from cads.accounting.units import duration, short_count
from cads.errors import BudgetError

if TYPE_CHECKING:
    from cads.accounting.costs import Workload
SELECT, TRAIN, EVALUATE = "select", "train", "evaluate"
PHASES = {SELECT: "selection", TRAIN: "final training", EVALUATE: "evaluation"}
"""What readers see of a phase."""
GLOSSARY = "cads glossary"
"""The command that explains the words of tables."""
ROUNDING = 1 + 1e-9
"""Tolerance for rounding in sums of costs: without it, costs that fit exactly would lose the last step or example."""


@dataclass
class LedgerEntry:
    """The spending of one stage of one phase: FLOPs, usages, executed tokens, answer tokens, seconds."""

    flops: float = 0.0
    usages: int = 0
    tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Column:
    """A column of the table: the field of an entry, its heading, and how its values are written."""

    field: str
    heading: str
    text: Callable[[float], str]


AMOUNTS = (
    _Column("flops", "FLOPs", lambda value: f"{value:.3g}"),
    _Column("usages", "examples", lambda value: short_count(value) if value else "-"),
    _Column("tokens", "tokens", lambda value: short_count(value) if value else "-"),
    _Column("answer_tokens", "answer\ntokens", lambda value: short_count(value) if value else "-"),
    _Column("seconds", "time", duration),
)


class Ledger:
    """The account of every FLOP, by phase ("select", "train", "evaluate") and stage.

    Args:
        limit: maximum FLOPs of all phases other than "evaluate" together, or None. A charge that would exceed the limit
            is refused, so check `left` before spending.

    Attributes:
        entries: what each (phase, stage) has been charged, in the order of their first charges.
    """

    def __init__(self, limit: float | None = None) -> None:
        self.limit = limit
        self.entries: dict[tuple[str, str], LedgerEntry] = {}
        self._recorded: list[dict[str, Any]] | None = None

    def charge(
        self,
        phase: str,
        stage: str,
        flops: float,
        *,
        usages: int = 0,
        tokens: int = 0,
        answer_tokens: int = 0,
        seconds: float = 0.0,
    ) -> None:
        """Add to the account of `phase`/`stage`.

        Raises:
            BudgetError: if the charge is negative or not finite, or would exceed the limit.
        """
        if not (math.isfinite(flops) and flops >= 0):
            raise BudgetError(f"{phase}/{stage_label(stage)} charges {flops} FLOPs: a charge is a finite number >= 0")
        if self.limit is not None and phase != EVALUATE and flops > self.left * ROUNDING:
            raise BudgetError(
                f"{phase}/{stage_label(stage)} would spend {flops:.4g} FLOPs where {self.left:.4g} of {self.limit:.4g} "
                "are left"
            )
        if self._recorded is not None:
            amounts = LedgerEntry(flops, usages, tokens, answer_tokens, seconds)
            self._recorded.append({"phase": phase, "stage": stage, **asdict(amounts)})
            return
        entry = self.entries.setdefault((phase, stage), LedgerEntry())
        entry.flops += flops
        entry.usages += usages
        entry.tokens += tokens
        entry.answer_tokens += answer_tokens
        entry.seconds += seconds

    @contextmanager
    def noting(self) -> Iterator[list[dict[str, Any]]]:
        """Record the charges of the block, in order, instead of adding them: `charge(**record)` adds one later."""
        previous, self._recorded = self._recorded, []
        try:
            yield self._recorded
        finally:
            self._recorded = previous

    @contextmanager
    def timed(self, phase: str, stage: str) -> Iterator[None]:
        """Add the wall-clock seconds of the block to `phase`/`stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.charge(phase, stage, 0.0, seconds=time.perf_counter() - start)

    @property
    def left(self) -> float:
        """FLOPs that remain of the limit; infinite without a limit."""
        spent = sum(e.flops for (phase, _), e in self.entries.items() if phase != EVALUATE)
        return math.inf if self.limit is None else max(0.0, self.limit - spent)

    def total(self, phase: str | None = None) -> LedgerEntry:
        """The sum over all stages, or over those of one phase."""
        entries = [e for (p, _), e in self.entries.items() if phase in (None, p)]
        return LedgerEntry(**{f.name: sum(getattr(e, f.name) for e in entries) for f in fields(LedgerEntry)})

    def merge(self, other: Ledger) -> None:
        """Charge all entries of another ledger to this one."""
        for (phase, stage), entry in other.entries.items():
            self.charge(phase, stage, **asdict(entry))

    def table(self) -> Table:
        """The account as a table for the terminal, at most 80 columns wide, in words.

        Shares are of selection and training together: evaluation is no part of a budget.
        """
        table = Table(title="Where the compute went", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        evaluated = self.total(EVALUATE).flops
        outside = "Evaluation is outside the budget. " if evaluated else ""
        table.caption, table.caption_justify = f"{outside}Terms: {GLOSSARY}", "left"
        columns = [column for column in AMOUNTS if self._tells(column.field)]
        table.add_column("", overflow="fold")
        for column in columns:
            table.add_column(column.heading, justify="right", no_wrap=True)
            if column.field == "flops":
                table.add_column("share", justify="right", no_wrap=True)
        counted = self.total(SELECT).flops + self.total(TRAIN).flops

        def add(name: str, entry: LedgerEntry, *, share: bool, style: str = "") -> None:
            cells = [column.text(getattr(entry, column.field)) for column in columns]
            part = f"{entry.flops / (counted or 1.0):.1%}" if share else ""
            table.add_row(name, cells[0], part, *cells[1:], style=style)

        for phase, words in PHASES.items():
            stages = [(stage, entry) for (p, stage), entry in self.entries.items() if p == phase]
            if stages:
                add(words, self.total(phase), share=phase != EVALUATE, style="bold")
            for stage, entry in stages:
                add(f"  {stage_label(stage)}", entry, share=phase != EVALUATE)
        add("total", self.total(), share=False, style="bold")
        return table

    def _tells(self, field: str) -> bool:
        """Whether a column says what no other says: images have one token each, which is their label."""
        before = {"tokens": "usages", "answer_tokens": "tokens"}.get(field)
        entries = [e for e in self.entries.values() if e.usages]
        if field in ("flops", "seconds") or before is None:
            return True
        return any(getattr(e, field) not in (0, getattr(e, before)) for e in entries)

    def to_json(self, *, seconds: bool = True) -> list[dict[str, Any]]:
        """One record a stage. Without `seconds`, two runs with the same seed give the same records."""
        records = [{"phase": p, "stage": s, **asdict(e)} for (p, s), e in self.entries.items()]
        if not seconds:
            for record in records:
                del record["seconds"]
        return records

    @classmethod
    def from_json(cls, records: list[dict[str, Any]]) -> Ledger:
        """The ledger that `to_json` wrote."""
        ledger = cls()
        for record in records:
            ledger.charge(**record)
        return ledger

    def save(self, path: Path | str) -> None:
        """Write the account as JSON."""
        Path(path).write_text(json.dumps(self.to_json(), indent=2) + "\n")


class PlannedLedger(Ledger):
    """The planned charges of a selector.

    Attributes:
        trained: each task whose model is trained, with the number of models that train at once.
        scored: each task whose model scores examples without being trained.
        note: what the selector does instead if the budget does not buy its search.
        rides: whether selection rides on the final training, whose end is kept to be measured.
        kept: number of pool examples that training can draw; None: that depends on the scores, or all.
        most_training: FLOPs after which the training ends, whatever the budget.
        end: why it ends there, in words.
    """

    def __init__(self, limit: float | None = None, note: str = "") -> None:
        super().__init__(limit)
        self.trained: list[tuple[Workload, int]] = []
        self.scored: list[Workload] = []
        self.note = note
        self.rides = False
        self.kept: int | None = None
        self.most_training, self.end = math.inf, ""
