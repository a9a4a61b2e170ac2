"""A folder for a trainer: one file of rows a source, and the trainer's own configuration of their mixture."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cads.errors import ConfigError, DataError
from cads.exports.chosen_rows import AddedColumns, ChosenRows
from cads.exports.mixture_parts import Mixture, mixture_by_rows, mixture_by_share, unequal_within
from cads.exports.trainers import RowFacts, TrainerFormat
from cads.exports.training_rows import TrainingRow, training_rows
from cads.exports.writers import json_text
from cads.runtime.atomic_files import sync, whole_folder
from cads.selection import Weights

log = logging.getLogger(__name__)

SHOWN = 3
"""Sources that a message names."""


def write_for_trainer(
    chosen: ChosenRows, output: Path, form: TrainerFormat, *, weights: Weights, seed: int, chat: bool
) -> int:
    """Write the folder; returns the number of rows in its files.

    Args:
        chosen: rows, each as often as `weights` says over all sources together.
        chat: whether prompts and responses are conversations.

    Raises:
        CadsError: if the rows cannot be read, or the trainer cannot take them.
    """
    mixture = _mixture(chosen, form, weights, seed)
    added = chosen.added if weights == "column" else replace(chosen.added, weight=None)
    with whole_folder(output) as partial:
        rows = _Spooled.of(chosen, partial / "rows", chat=chat)
        form.check(rows.facts)
        (partial / "data").mkdir()
        count = rows.write(partial / "data", mixture, chosen, form, added)
        paths = {part.key: (output / "data" / f"{part.key}.jsonl").as_posix() for part in mixture.parts}
        for name, text in form.files(mixture, paths, output.as_posix(), rows.facts).items():
            (partial / name).write_text(text, encoding="utf-8")
        rows.file.unlink()
    return count


def _mixture(chosen: ChosenRows, form: TrainerFormat, weights: Weights, seed: int) -> Mixture:
    if not form.mixes and weights == "resample":
        return mixture_by_rows(chosen, chosen.counts, seed)
    mixture = mixture_by_share(chosen, seed, weighted=weights == "resample")
    if not form.mixes and not mixture.concatenated:
        shares = ", ".join(f"{part.name} {part.share:.1%}" for part in mixture.parts[:SHOWN])
        raise ConfigError(
            f"weights = 'column': {form.name} takes no shares of sources ({shares}), and the rows alone would lose "
            "them: give --weights resample, or leave it out"
        )
    if weights == "column" and (names := unequal_within(chosen)):
        log.warning(
            "rows of %s have different weights, which %s does not read: --weights resample, the default, repeats rows "
            "by them",
            ", ".join(names[:SHOWN]),
            form.name,
        )
    return mixture


@dataclass(frozen=True)
class _Spooled:
    """All different rows in a file, by the position of the example.

    Attributes:
        file: one row a line. examples: positions in the Selection, int64, ascending. starts: of their lines, int64.
        facts: what is true of all rows.
    """

    file: Path
    examples: np.ndarray
    starts: np.ndarray
    facts: RowFacts

    @classmethod
    def of(cls, chosen: ChosenRows, file: Path, *, chat: bool) -> _Spooled:
        examples, starts, start = [], [], 0
        kinds: dict[str, int] = {}
        last = every = True
        tools = calls = False
        with file.open("wb") as lines:
            for example, row in training_rows(chosen, chat=chat):
                line = f"{row.to_json()}\n".encode()
                lines.write(line)
                examples.append(example)
                starts.append(start)
                start += len(line)
                kinds.setdefault(row.kind, example)
                tools |= row.tools is not None
                calls |= any(set(m) > {"role", "content"} or m["role"] == "tool" for m in row.messages)
                last, every = last and row.learns_last, every and row.learns_all
        if len(kinds) > 1:
            ids = {kind: chosen.selection.ids[i].as_py() for kind, i in kinds.items()}
            raise DataError(
                f"some examples are plain text and some are chats, such as {ids}: one configuration takes one of them. "
                "Export them apart, by naming the files of each"
            )
        order = np.argsort(examples)
        facts = RowFacts(next(iter(kinds)), last, every, tools, calls)
        return cls(file, np.array(examples)[order], np.array(starts)[order], facts)

    def write(
        self, folder: Path, mixture: Mixture, chosen: ChosenRows, form: TrainerFormat, added: AddedColumns
    ) -> int:
        """Write one file a part; returns the number of rows. Warn of what a trainer learns otherwise."""
        otherwise: dict[int, None] = {}
        with self.file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as lines:
            for part in mixture.parts:
                with (folder / f"{part.key}.jsonl").open("w", encoding="utf-8", newline="\n") as out:
                    for example in part.examples.tolist():
                        lines.seek(int(self.starts[np.searchsorted(self.examples, example)]))
                        row = TrainingRow.from_json(lines.readline().decode())
                        if form.omits(row, self.facts):
                            otherwise[example] = None
                        record = form.record(row, self.facts) | _added(chosen, added, example, part.name)
                        out.write(f"{json_text(record)}\n")
                sync(folder / f"{part.key}.jsonl")
        if otherwise:
            learned = "the last answer alone" if self.facts.learns_last else "every answer"
            log.warning(
                "of %d examples, such as %s, %s learns %s, and cads learned others: it cannot be told which",
                len(otherwise),
                chosen.selection.ids[next(iter(otherwise))].as_py(),
                form.name,
                learned,
            )
        return sum(len(part.examples) for part in mixture.parts)


def _added(chosen: ChosenRows, added: AddedColumns, example: int, source: str) -> dict[str, Any]:
    """The weight and the source of a row, by the names that were asked for."""
    fields: dict[str, Any] = {}
    if added.weight is not None:
        fields[added.weight] = float(chosen.selection.weights[example])
    if added.source is not None and chosen.selection.sources is not None:
        fields[added.source] = source
    return fields


def check_added(added: AddedColumns, taken: Sequence[str]) -> None:
    """Refuse names of added columns that rows of trainers have.

    Raises:
        ConfigError: naming the setting.
    """
    for setting, name in (("weight_column", added.weight), ("source_column", added.source)):
        if name in taken:
            raise ConfigError(f"{setting} = {name!r}: rows of trainers have this field: name the column otherwise")
