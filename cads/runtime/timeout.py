"""How long a process waits for the others."""

from __future__ import annotations

import math
import os

from cads.errors import ConfigError

TIMEOUT_VARIABLE, TIMEOUT = "CADS_PROCESS_TIMEOUT", 600.0
"""Seconds that a process waits for the others before it gives up: the variable, and the default without it."""


def timeout() -> float:
    """Seconds to wait for other processes.

    Raises:
        ConfigError: if the variable holds no positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise ConfigError(f"{TIMEOUT_VARIABLE} = {text!r}: it must be a positive number of seconds")
    return seconds
