"""What this process has used of the machine: its age, and its memory."""

from __future__ import annotations

import time
from pathlib import Path

import psutil

STATUS = Path("/proc/self/status")
PEAK = "VmHWM:"


def age() -> float:
    """Seconds since this process began, with the loading of the interpreter."""
    return max(0.0, time.time() - psutil.Process().create_time())


def memory() -> int:
    """Bytes of memory that this process holds."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """The most bytes of memory that this process has held; where the system does not say, those that it holds."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        usage = psutil.Process().memory_info()
        return int(getattr(usage, "peak_wset", usage.rss))
    kilobytes = next((line.split()[1] for line in lines if line.startswith(PEAK)), None)
    return memory() if kilobytes is None else 1024 * int(kilobytes)


def free_memory() -> int:
    """Bytes of memory that the machine has left for processes."""
    return int(psutil.virtual_memory().available)
