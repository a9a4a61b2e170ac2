"""The model card: a README beside a trained model that says its data, budget, selection and metrics.

Its head is the metadata of the Hugging Face Hub, so that the folder can be pushed as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from cads.accounting.ledger import GLOSSARY, PHASES, Ledger
from cads.accounting.units import duration
from cads.runtime.atomic_files import whole_file

CARD = "README.md"
MOST_SOURCES = 30
"""Sources that a card lists; the others are counted."""


def write_card(folder: Path, results: Mapping[str, Any]) -> None:
    """Write the model card of the model in `folder`; `results`: the contents of its `results.json`."""
    if "data" in results:
        library = "peft" if (folder / "adapter_config.json").exists() else None
        if library is None and (folder / "config.json").exists():
            library = "transformers"
        whole_file(folder / CARD, model_card(folder.resolve().name, results, library))


def model_card(name: str, results: Mapping[str, Any], library: str | None = None) -> str:
    """The card of the model `name` as Markdown.

    Args:
        results: as `results.json` has them, with `data`, `budget` and `selection`.
        library: that loads the model, by its name on the Hub; None: no such library.
    """
    data, selection = results["data"], results["selection"]
    base = data.get("base_model")
    # A folder of this machine is no model of the Hub.
    hub_base = None if base is None or Path(base).exists() else base
    tags = ["cads", "data-selection", selection["method"]]
    head = ModelCardData(library_name=library, base_model=hub_base, tags=tags).to_yaml()
    parts = [f"---\n{head}\n---", f"# {_plain(name)}", *_data(data), *_budget(results), *_selection(selection)]
    parts += ["## Metrics", _table(["metric", "value"], [[n, f"{v:.6g}"] for n, v in results["metrics"].items()])]
    parts.append("On the test set, and by further evaluations, which no selection has seen.")
    if results.get("validation"):
        last = results["validation"][-1]
        values = ", ".join(f"{n} {v:.4g}" for n, v in last["metrics"].items())
        parts.append(f"On the target, at the end of training (step {last['step']}): {values}.")
    parts.append(f"Made by cads-select {version('cads-select')}. Terms: `{GLOSSARY}`.")
    return "\n\n".join(parts) + "\n"


def _data(data: Mapping[str, Any]) -> list[str]:
    rows = [[part, f"{data[part]['examples']:,}", data[part]["hash"][:16]] for part in ("pool", "target", "test")]
    base = f" It starts from {_plain(Path(data['base_model']).name)}." if data.get("base_model") else ""
    return [f"A model of the task {_plain(data['task'])}.{base}", "## Data", _table(["part", "examples", "hash"], rows)]


def _budget(results: Mapping[str, Any]) -> list[str]:
    budget, ledger = results["budget"], Ledger.from_json(results["ledger"])
    covers = "selection and training" if budget["covers_selection"] else "training; selection comes on top"
    given = "" if budget["given"].endswith("FLOPs") else f" ({_plain(budget['given'])})"
    rows = []
    for phase, words in PHASES.items():
        spent = ledger.total(phase)
        if spent.flops or spent.seconds:
            rows.append([words, f"{spent.flops:.4g}", f"{spent.usages:,}", duration(spent.seconds)])
    return [
        "## Budget",
        f"{budget['flops']:.4g} FLOPs{given}, for {covers}. {results['steps']:,} steps, seed {budget['seed']}.",
        _table(["", "FLOPs", "examples", "time"], rows),
    ]


def _selection(selection: Mapping[str, Any]) -> list[str]:
    text = f"By the method `{_plain(selection['method'])}` with seed {selection['seed']}: "
    text += f"{selection['selected']:,} of {selection['examples']:,} examples of the pool."
    if selection["target_fraction"]:
        text += f" {selection['target_fraction']:.0%} of each batch is drawn from the target."
    if "guard" in selection["notes"]:
        text += f" {_plain(selection['notes']['guard'])}."
    if "end" in selection["notes"]:
        text += f" The budget was not used up: {_plain(selection['notes']['end'])}."
    parts = ["## Selection", text]
    shares = sorted(selection["shares"].items(), key=lambda item: -item[1])
    if shares:
        rows = [[source, f"{share:.1%}"] for source, share in shares[:MOST_SOURCES]]
        parts.append(_table(["source", "share of what training draws from the pool"], rows))
        if len(shares) > MOST_SOURCES:
            parts.append(f"{len(shares) - MOST_SOURCES} more sources have smaller shares.")
    return parts


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_plain(cell).replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plain(text: object) -> str:
    """Text on one line, without markup of HTML or links."""
    line = " ".join(str(text).split())
    for sign in "<>[]":
        line = line.replace(sign, f"\\{sign}")
    return line
