"""The records of a journal: the key of each operation, its state, and its charges."""

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
"""What an operation added to a ledger: for each entry its sums afterwards, and the seconds of the operation."""


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
        """The state of the operation; its result if it has finished."""
        loaded = self.tensors.load(self.prefix) if isinstance(self.tensors, StoredTensors) else self.tensors
        return State(self.values, loaded)


def key_of(index: int, name: str, arguments: Sequence[Any], before: Mapping[tuple[str, str], LedgerEntry]) -> str:
    """The key of an operation: a hash of its index, name and arguments, and of what was spent `before` it."""
    spent = [[*key, entry.flops] for key, entry in before.items()]
    return hashlib.sha256(json.dumps([index, name, list(arguments), spent]).encode()).hexdigest()


def charges_since(before: Mapping[tuple[str, str], LedgerEntry], ledger: Ledger) -> Charges:
    """The entries of a ledger that have changed. Sums are kept as they are: adding again could round otherwise."""
    changed = []
    for (phase, stage), entry in ledger.entries.items():
        old = before.get((phase, stage))
        if old != entry:
            seconds = entry.seconds - (0.0 if old is None else old.seconds)
            changed.append({"phase": phase, "stage": stage, **asdict(entry), "seconds": seconds})
    return changed


def restore(ledger: Ledger, charges: Charges) -> None:
    """Put the charges that `charges_since` returned back into a ledger."""
    for charge in charges:
        entry = ledger.entries.setdefault((charge["phase"], charge["stage"]), LedgerEntry())
        entry.flops, entry.usages = charge["flops"], charge["usages"]
        entry.tokens, entry.answer_tokens = charge["tokens"], charge["answer_tokens"]
        entry.seconds += charge["seconds"]


def state_of(records: Mapping[int, JournalRecord], seconds: float) -> State:
    """Records as the state of one checkpoint: their values in a list, their tensors under the index of each.

    Args:
        seconds: of work on the run so far.
    """
    operations, tensors = [], {}
    for index, record in records.items():
        operation = {"index": index, "name": record.name, "key": record.key}
        operations.append({**operation, "values": record.values, "charges": record.charges})
        loaded = record.state().tensors
        tensors.update({f"{index}/{name}": x for name, x in loaded.items()})
    return State({"operations": operations, "seconds": seconds}, tensors)


def records_of(path: Path, values: dict[str, Any], tensors: StoredTensors) -> Iterator[tuple[int, JournalRecord]]:
    """The records that `state_of` put together, by index.

    Raises:
        CheckpointError: if the values are not those of records.
    """
    try:
        for operation in values["operations"]:
            charges = [_checked(charge) for charge in operation["charges"]]
            record = (str(operation["name"]), str(operation["key"]), dict(operation["values"]), charges)
            index = int(operation["index"])
            yield index, JournalRecord(*record, tensors, f"{index}/")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"checkpoint {path} does not hold a journal: {type(error).__name__}: {error}") from error


def seconds_of(path: Path, values: dict[str, Any]) -> float:
    """The seconds that `state_of` was given; 0 if none are stored.

    Raises:
        CheckpointError: if they are no number of seconds.
    """
    seconds = values.get("seconds", 0.0)
    if not _is_amount(seconds):
        raise CheckpointError(f"checkpoint {path} does not hold a journal: seconds = {seconds!r}")
    return float(seconds)


def _checked(charge: dict[str, Any]) -> dict[str, Any]:
    """Return a charge if it has all fields and its amounts are numbers that a ledger can hold."""
    amounts = [charge[f.name] for f in fields(LedgerEntry)]
    if not (all(map(_is_amount, amounts)) and isinstance(charge["phase"], str) and isinstance(charge["stage"], str)):
        raise ValueError(f"charge {charge!r}")
    return charge


def _is_amount(x: Any) -> bool:
    """Whether `x` is a number, >= 0 and finite as a float."""
    return isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x <= sys.float_info.max
