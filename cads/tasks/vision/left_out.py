"""What of the data cannot be used: refused, or left out and counted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cads.errors import DataError
from cads.tasks.vision.folders import some

log = logging.getLogger(__name__)


@dataclass
class LeftOut:
    """What cannot be used. Without `drop` the first of it is refused.

    Attributes:
        drop: leave it out, and count it.
        names: of what was left out, by the reason.
        details: what is known of the first of them, by the reason.
    """

    drop: bool
    names: dict[str, list[str]] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, names: Sequence[str], detail: str = "") -> None:
        """Leave out these files or folders.

        Args:
            reason: what they are, as in "images that cannot be read".
            detail: what is known of the first of them.

        Raises:
            DataError: if they may not be left out.
        """
        if not names:
            return
        if not self.drop:
            raise DataError(
                f"{len(names)} {reason}: {some(names)}{detail}: repair, fill or remove them, or set drop: "
                "true to leave them out"
            )
        self.names.setdefault(reason, []).extend(names)
        self.details.setdefault(reason, detail)

    def report(self, location: str | Path) -> dict[str, Any]:
        """Say what was left out, and how much of it.

        Returns:
            the number and the names of what was left out, by the reason.
        """
        counts = "; ".join(f"{len(n)} {why}: {some(n)}{self.details[why]}" for why, n in self.names.items())
        if counts:
            log.warning("%s: left out %s", location, counts)
        return {why: {"number": len(names), "names": names} for why, names in self.names.items()}


def first_error(errors: dict[int, str]) -> str:
    """The first of some errors, for the end of a message."""
    return f" (the first: {next(iter(errors.values()))})" if errors else ""
