"""A Selection on the hub, and its card: what was chosen, from what, by which method, and at what cost."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import yaml

from cads.accounting.budget import Budget
from cads.accounting.ledger import SELECT, Ledger
from cads.data.origin import Origin
from cads.runtime.checkpoint import State
from cads.runtime.hub_upload import check_repo_id, upload_folder

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
"""Categories of sizes on the hub, by the number of rows below which they hold."""


class Chosen(Protocol):
    """What is needed of a Selection."""

    selected: np.ndarray
    weighted: bool
    target_fraction: float
    method: str
    seed: int
    budget: Budget
    ledger: Ledger
    config: dict[str, Any]
    pool_hash: str
    versions: dict[str, str]
    trained: State | None
    origin: Origin | None

    def save(self, folder: Path | str) -> Path:
        """Write it to a new folder."""
        ...

    @property
    def shares(self) -> dict[str, float]:
        """The share of each source in what training draws."""
        ...

    def source_counts(self) -> list[tuple[str, int, int, float]]:
        """Name, examples, selected examples and mean probability of each source."""
        ...


SelectionT = TypeVar("SelectionT", bound=Chosen)


def upload_selection(selection: Chosen, repo_id: str, *, private: bool, token: str | None) -> str:
    """Upload a Selection and its card, without rows, the state of a run, or folders of files; returns the address.

    Args:
        repo_id: USER/NAME. private: whether a data set that is made is private.
        token: of the hub; None: that of `hf auth login`.

    Raises:
        ConfigError: if that is no name of a data set, or the hub refuses.
    """
    check_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as name:
        write_repository(selection, Path(name), repo_id, rows=None, data_file=None)
        message = f"Selection of {selection.method}"
        return upload_folder(Path(name), repo_id, private=private, token=token, message=message)


def write_repository(selection: Chosen, folder: Path, repo_id: str, *, rows: int | None, data_file: str | None) -> None:
    """Write the Selection, without what is of this machine, and its card. Arguments: as `data_card`."""
    portable(selection).save(folder / "selection")
    card = data_card(selection, repo_id, rows=rows, data_file=data_file)
    (folder / "README.md").write_text(card, encoding="utf-8")


def portable(selection: SelectionT) -> SelectionT:
    """The Selection without the state of a run, and without the folders of the pool's files."""
    origin = selection.origin
    if origin is not None:
        files = tuple(replace(file, location=Path(file.location).name) for file in origin.files)
        origin = replace(origin, files=files)
    return replace(selection, trained=None, origin=origin)  # type: ignore[type-var]


def data_card(selection: Chosen, repo_id: str, *, rows: int | None, data_file: str | None) -> str:
    """A README with metadata, as Markdown.

    Args:
        repo_id: of the data set. rows: that are in it; None: none, it holds the Selection alone.
        data_file: of the rows.
    """
    configs = [{"config_name": "scores", "data_files": "selection/scores.parquet"}]
    if data_file is not None:
        configs.insert(0, {"config_name": "default", "data_files": data_file})
    size = len(selection.selected) if rows is None else rows
    metadata = {
        "tags": ["cads", "data-selection"],
        "size_categories": [next((name for limit, name in SIZES if size < limit), "n>10M")],
        "configs": configs,
    }
    parts = [
        f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n",
        f"# {repo_id.rpartition('/')[2]}\n",
        _what(selection, rows),
        "## Sources\n",
        _table(selection),
        "## Selection\n",
        _how(selection),
        "## Use\n",
        _use(repo_id, data_file),
        "## Licence\n",
        "That of the data from which the rows were chosen.\n" if rows is not None else "Ids and scores only.\n",
    ]
    return "\n".join(parts)


def _what(selection: Chosen, rows: int | None) -> str:
    chosen, pool = int(selection.selected.sum()), len(selection.selected)
    lines = [f"{chosen:,} of {pool:,} examples, chosen by `{selection.method}` with cads."]
    lines.append("The rows themselves are here." if rows is not None else "The rows themselves are not here.")
    if selection.weighted:
        lines.append("They have different weights: training draws each in proportion to its weight.")
    if selection.target_fraction:
        lines.append(
            f"Training also drew {selection.target_fraction:.1%} of each batch from the target, which is not here."
        )
    return " ".join(lines) + "\n"


def _table(selection: Chosen) -> str:
    shares: Mapping[str, float] = selection.shares
    lines = ["| source | examples | selected | share of training |", "| --- | --- | --- | --- |"]
    for name, examples, selected, _ in selection.source_counts():
        share = f"{shares[name]:.1%}" if name in shares else "-"
        lines.append(f"| {_cell(name)} | {examples:,} | {selected:,} | {share} |")
    return "\n".join(lines) + "\n"


def _how(selection: Chosen) -> str:
    cost = selection.ledger.total(SELECT).flops
    facts = {
        "method": selection.method,
        "options": ", ".join(f"{name} = {value}" for name, value in selection.config.items()) or "none",
        "budget": str(selection.budget),
        "FLOPs of selection": f"{cost:.4g}",
        "FLOPs of training and selection": f"{selection.ledger.total().flops:.4g}",
        "seed": selection.seed,
        "hash of the pool": f"`{selection.pool_hash}`",
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(selection.versions.items())),
    }
    lines = ["| | |", "| --- | --- |", *(f"| {name} | {_cell(str(value))} |" for name, value in facts.items())]
    return "\n".join(lines) + "\n"


def _use(repo_id: str, data_file: str | None) -> str:
    load = [f'rows = load_dataset("{repo_id}", split="train")'] if data_file is not None else []
    lines = ["```python", "from datasets import load_dataset", "", *load]
    lines += [f'scores = load_dataset("{repo_id}", "scores", split="train")', "```", ""]
    lines.append("The folder `selection` is read by `cads.Selection.load` after a download.")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that stays in its cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")
