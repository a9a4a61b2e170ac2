"""What a journal keeps of operations: what they are known by, what came out, and what they were charged."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from cads.accounting.ledger import Ledger, LedgerEntry
from cads.errors import CheckpointError
from cads.runtime.checkpoint import State, StoredTensors

Charges = list[dict[str, Any]]
"""What an operation added to a ledger: for each entry where it stood after, and the seconds it took."""


@dataclass
class JournalRecord:
    """One operation, finished or under way."""

    name: str
    key: str
    values: dict[str, Any]
    charges: Charges
    tensors: StoredTensors | dict[str, torch.Tensor]
    prefix: str = ""

    def state(self) -> State:
        """What came out."""
        loaded = self.tensors.load(self.prefix) if isinstance(self.tensors, StoredTensors) else self.tensors
        return State(self.values, loaded)


def key_of(index: int, name: str, arguments: Sequence[Any], before: Mapping[tuple[str, str], LedgerEntry]) -> str:
    """What an operation is known by: its place, what it does with what, and what was spent `before` it."""
    spent = [[*key, entry.flops] for key, entry in before.items()]
    return hashlib.sha256(json.dumps([index, name, list(arguments), spent]).encode()).hexdigest()


def charges_since(before: Mapping[tuple[str, str], LedgerEntry], ledger: Ledger) -> Charges:
    """What has changed in a ledger. Sums are kept as they stand, since adding again could round otherwise."""
    changed = []
    for (phase, stage), entry in ledger.entries.items():
        old = before.get((phase, stage))
        if old != entry:
            took = entry.seconds - (0.0 if old is None else old.seconds)
            changed.append({"phase": phase, "stage": stage, **asdict(entry), "seconds": took})
    return changed


def restore(ledger: Ledger, charges: Charges) -> None:
    """Put back what `charges_since` gave."""
    for charge in charges:
        entry = ledger.entries.setdefault((charge["phase"], charge["stage"]), LedgerEntry())
        entry.flops, entry.usages = charge["flops"], charge["usages"]
        entry.tokens, entry.answer_tokens = charge["tokens"], charge["answer_tokens"]
        entry.seconds += charge["seconds"]


def state_of(records: Mapping[int, JournalRecord], seconds: float) -> State:
    """Records as one checkpoint: their values in a list, their tensors under the number of each.

    Args:
        seconds: of work on the run so far.
    """
    values, tensors = [], {}
    for index, record in records.items():
        about = {"index": index, "name": record.name, "key": record.key}
        values.append({**about, "values": record.values, "charges": record.charges})
        loaded = record.state().tensors
        tensors.update({f"{index}/{name}": x for name, x in loaded.items()})
    return State({"operations": values, "seconds": seconds}, tensors)


def records_of(path: Path, values: dict[str, Any], tensors: StoredTensors) -> Iterator[tuple[int, JournalRecord]]:
    """What `state_of` put together.

    Raises:
        CheckpointError: if the values are not such as it writes.
    """
    try:
        for operation in values["operations"]:
            charges = [_checked(charge) for charge in operation["charges"]]
            about = (str(operation["name"]), str(operation["key"]), dict(operation["values"]), charges)
            index = int(operation["index"])
            yield index, JournalRecord(*about, tensors, f"{index}/")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"checkpoint {path} does not hold a journal: {type(error).__name__}: {error}") from error


def seconds_of(path: Path, values: dict[str, Any]) -> float:
    """The seconds that `state_of` was given; 0 where none are told.

    Raises:
        CheckpointError: if they are no number of seconds.
    """
    seconds = values.get("seconds", 0.0)
    if not _is_amount(seconds):
        raise CheckpointError(f"checkpoint {path} does not hold a journal: seconds = {seconds!r}")
    return float(seconds)


def _checked(charge: dict[str, Any]) -> dict[str, Any]:
    """A charge, if all its parts are there and are numbers that a ledger can hold."""
    amounts = [charge[f.name] for f in fields(LedgerEntry)]
    if not (all(map(_is_amount, amounts)) and isinstance(charge["phase"], str) and isinstance(charge["stage"], str)):
        raise ValueError(f"charge {charge!r}")
    return charge


def _is_amount(x: Any) -> bool:
    """Whether it is a number that a sum of floats can take in."""
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x <= sys.float_info.max
