"""A GPU, with the same questions as to the stand-in of `tests.support.pretended_device`."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.state import AcceleratorState, PartialState


class RealDevice:
    """The GPU of this process. PyTorch warns of what makes the host wait, and the warnings are counted.

    Attributes:
        device: the GPU.
    """

    def __init__(self, said: list[warnings.WarningMessage]) -> None:
        self.device = torch.device("cuda")
        self._said = said

    @property
    def waits(self) -> Counter[str]:
        """Number of times that the host waited, under one name."""
        return Counter({"wait": sum("synchronizing" in str(w.message) for w in self._said)})

    @property
    def allocated(self) -> int:
        """Bytes of all tensors on it that are alive."""
        return int(torch.cuda.memory_allocated())


@contextmanager
def on_cpu() -> Iterator[None]:
    """Train on the CPU while the block runs, also where there is a GPU."""
    AcceleratorState._reset_state(True)
    PartialState(cpu=True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(True)


@contextmanager
def real_device() -> Iterator[RealDevice]:
    """Train on the GPU, and count what makes the host wait, while the block runs."""
    AcceleratorState._reset_state(True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield RealDevice(said)
        finally:
            torch.cuda.set_sync_debug_mode("default")
            AcceleratorState._reset_state(True)
