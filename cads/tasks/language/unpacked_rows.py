"""Tells transformers that each row holds one sequence: to find that out, the host would wait in each forward pass.

Rows without a mask have the positions 0, 1, 2, ... In each forward pass transformers reads them back from the device,
to see whether several sequences are packed into a row. Here that is answered, for the passes of this package alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, wraps

from torch import Tensor

_unpacked: ContextVar[bool] = ContextVar("unpacked_rows", default=False)


@contextmanager
def unpacked_rows() -> Iterator[None]:
    """While the block runs, in this thread, no row is packed."""
    _answer_for_transformers()
    token = _unpacked.set(True)
    try:
        yield
    finally:
        _unpacked.reset(token)


@cache
def _answer_for_transformers() -> None:
    """Let transformers ask `unpacked_rows` first; versions that do not look for packed rows stay as they are."""
    try:
        from transformers import masking_utils

        find = masking_utils.find_packed_sequence_indices
    except (ImportError, AttributeError):
        return

    @wraps(find)
    def found(position_ids: Tensor) -> Tensor | None:
        return None if _unpacked.get() else find(position_ids)

    masking_utils.find_packed_sequence_indices = found
