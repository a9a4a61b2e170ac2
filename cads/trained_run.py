"""The end of the run in which a selector trained the final model, stored beside the scores as JSON and safetensors."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from cads.errors import CheckpointError, SelectionError
from cads.runtime.checkpoint import State, StoredTensors, load_json

VALUES, TENSORS = "trained.json", "trained.safetensors"
TRAINED_FILES = (VALUES, TENSORS)
"""The files of a stored state."""


def write_trained(trained: State, folder: Path) -> None:
    """Write `trained` to an existing folder; the same state gives the same bytes.

    Raises:
        SelectionError: if the state cannot be written, for example to a full disk.
    """
    state = trained.detached()
    try:
        save_file(state.tensors, folder / TENSORS)
    except SafetensorError as error:
        raise SelectionError(f"the trained run cannot be written to {folder}: {error}") from error
    (folder / VALUES).write_text(json.dumps(state.values, indent=2, sort_keys=True) + "\n")


def read_trained(folder: Path, digest: str) -> State:
    """Read the state that `write_trained` wrote. Sizes are checked before contents are read; no code is executed.

    Args:
        folder: of the Selection.
        digest: the digest of the state in the header of the Selection.

    Raises:
        SelectionError: if a file is missing, corrupt, a link or too large for this machine, or the digest differs.
    """
    try:
        values = load_json(folder / VALUES)
        if not isinstance(values, dict):
            raise CheckpointError(f"{VALUES} holds {type(values).__name__}, not names and values")
        state = State(values, StoredTensors(folder / TENSORS).load())
    except (OSError, ValueError, RecursionError, SafetensorError, MemoryError, CheckpointError) as error:
        raise SelectionError(f"the trained run in {folder} cannot be read: {error}") from error
    if state.digest != digest:
        raise SelectionError(
            f"the trained run in {folder} is not the one that the selection was saved with: its hash differs"
        )
    return state
