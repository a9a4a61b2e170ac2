"""A training run that was begun by selection, beside the scores: JSON values, and tensors as safetensors."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from cads.errors import CheckpointError, SelectionError
from cads.runtime.checkpoint import State, StoredTensors, load_json

VALUES, TENSORS = "start.json", "start.safetensors"
START_FILES = (VALUES, TENSORS)


def write_start(start: State, folder: Path) -> None:
    """Write the state to an existing folder; the same state gives the same bytes.

    Raises:
        SelectionError: if it cannot be written, for example to a full disk.
    """
    kept = start.detached()
    try:
        save_file(kept.tensors, folder / TENSORS)
    except SafetensorError as error:
        raise SelectionError(f"the start of the run cannot be written to {folder}: {error}") from error
    (folder / VALUES).write_text(json.dumps(kept.values, indent=2, sort_keys=True) + "\n")


def read_start(folder: Path, digest: str) -> State:
    """Read the state that `write_start` wrote: sizes before contents, and nothing in it is executed.

    Args:
        digest: of the state, as the Selection knows it.

    Raises:
        SelectionError: if it is missing, corrupt, a link, larger than this machine can hold, or another state.
    """
    try:
        values = load_json(folder / VALUES)
        if not isinstance(values, dict):
            raise CheckpointError(f"{VALUES} holds {type(values).__name__}, not names and values")
        found = State(values, StoredTensors(folder / TENSORS).load())
    except (OSError, ValueError, RecursionError, SafetensorError, MemoryError, CheckpointError) as error:
        raise SelectionError(f"the start of the run in {folder} cannot be read: {error}") from error
    if found.digest != digest:
        raise SelectionError(f"the start of the run in {folder} is not what the selection says: its hash differs")
    return found
