"""The budget of training: FLOPs, usages, epochs or tokens, or a time, or money for machines by the hour."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from cads.accounting.costs import Workload
from cads.errors import BudgetError

UNITS = {
    "": "FLOPs",
    "flop": "FLOPs",
    "flops": "FLOPs",
    "usage": "usages",
    "usages": "usages",
    "epoch": "epochs",
    "epochs": "epochs",
    "pass": "epochs",
    "passes": "epochs",
    "token": "tokens",
    "tokens": "tokens",
    "s": "seconds",
    "second": "seconds",
    "seconds": "seconds",
}
FACTORS = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
"""Letters before a unit that is no time: `2M tokens`, `225k usages`, `3 PFLOPs`. B is a billion."""
SECONDS = {"min": 60.0, "minute": 60.0, "minutes": 60.0, "h": 3600.0, "hour": 3600.0, "hours": 3600.0}
"""Seconds in other units of time."""
NUMBER = r"([-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)"
BY_HOUR = r"(?:/|an|a|per)?\s*(?:h|hour)\s*"
MONEY = re.compile(rf"\s*\$\s*{NUMBER}\s*at\s*\$?\s*{NUMBER}\s*{BY_HOUR}")
EATEN_MONEY = re.compile(rf"[0-9.]*\s*at\s.*{BY_HOUR}")
"""What is left of money in double quotes: the shell puts a parameter, which is mostly empty, where `$5` stood."""


@dataclass(frozen=True)
class Budget:
    """Compute allowed for training the final model.

    Every unit is converted to FLOPs; seconds by the measured speed of training (`cads.training.speed`). A usage is one
    forward and backward pass of one example, with its share of the optimizer step. An epoch is one usage of each pool
    example. Tokens are those that the model computes on.

    Attributes:
        amount: number of units; positive and finite.
        unit: "FLOPs", "usages", "epochs", "tokens" or "seconds".
        count_selection: whether the budget also has to cover selection.
    """

    amount: float
    unit: str = "FLOPs"
    count_selection: bool = False

    def __post_init__(self) -> None:
        if self.unit not in UNITS.values():
            raise BudgetError(f"budget unit {self.unit!r} is unknown: use one of {sorted(set(UNITS.values()))}")
        if not (math.isfinite(self.amount) and self.amount > 0):
            raise BudgetError(f"the budget must be a positive, finite number of {self.unit}, not {self.amount}")

    @classmethod
    def parse(cls, text: str | float, *, count_selection: bool = False) -> Budget:
        """Parse `2e15`, `225000 usages`, `5 epochs`, `3e6 tokens`, `2M tokens`, `30 minutes` or `$5 at 2.50 an hour`.

        Raises:
            BudgetError: if the text is not a number and a unit, or the number is not positive.
        """
        money = MONEY.fullmatch(str(text))
        if money is not None:
            dollars, by_hour = (_number(word) for word in money.groups())
            return cls(3600 * dollars / by_hour if by_hour > 0 else math.inf, "seconds", count_selection)
        match = re.fullmatch(rf"\s*{NUMBER}\s*([A-Za-z]*)(?:\s+([A-Za-z]+))?\s*", str(text))
        if match is not None:
            amount, words = _number(match[1]), [word for word in match.groups()[1:] if word]
            unit, factor = _unit(words)
            if unit is not None:
                return cls(amount * factor, unit, count_selection)
        in_quotes = (
            " in single quotes: within double quotes the shell replaces $5"
            if EATEN_MONEY.fullmatch(str(text).strip())
            else ""
        )
        raise BudgetError(
            f"budget {text!r} does not parse: write a number and FLOPs (or nothing), usages, epochs, tokens, "
            "minutes or hours, such as '2e15', '5 epochs' or '2M tokens', or money as '$5 at 2.50 an hour'" + in_quotes
        )

    def flops(self, task: Workload) -> float:
        """The budget in FLOPs, converted through the task's costs.

        Raises:
            BudgetError: if it is a time: that depends on the speed of the machine.
        """
        if self.unit == "FLOPs":
            return self.amount
        if self.unit == "seconds":
            raise BudgetError(
                f"a budget of {self} is no number of FLOPs: `cads select` and `cads train` measure the "
                "speed; comparisons are at equal FLOPs, usages, epochs or tokens"
            )
        usages = self.amount
        if self.unit == "epochs":
            usages *= len(task.pool)
        elif self.unit == "tokens":
            usages /= task.costs.tokens_per_example(task.pool)
        flops = usages * task.costs.per_usage(task.pool, task.recipe.batch_size)
        # FLOPs are whole numbers. Without rounding up, float error would cost an exact budget its last step.
        return float(math.ceil(flops)) if math.isfinite(flops) else flops

    def __str__(self) -> str:
        rounded = f"{self.amount:g}"
        return f"{rounded if float(rounded) == self.amount else repr(float(self.amount))} {self.unit}"


def _unit(words: list[str]) -> tuple[str | None, float]:
    """The unit that the words behind a number name, and its factor; None if they name none."""
    *before, last = words or [""]
    if not before:
        word = last.lower()
        if word in SECONDS:
            return "seconds", SECONDS[word]
        if word in UNITS:
            return UNITS[word], 1.0
        before, last = [last[:1]], last[1:]
    unit = UNITS.get(last.lower())
    if not last or unit in (None, "seconds") or before[0] not in FACTORS:
        return None, 1.0
    return unit, FACTORS[before[0]]


def _number(text: str) -> float:
    return float(text.replace("_", ""))


def check_step(task: Workload, flops: float) -> None:
    """Refuse a budget that does not buy one training step.

    Raises:
        BudgetError: if it does not; the message gives the cost of a step.
    """
    batch_size = task.recipe.batch_size
    step_flops = task.costs.per_usage(task.pool, batch_size) * batch_size
    if flops < step_flops * (1 - 1e-9):
        raise BudgetError(
            f"a budget of {flops:.4g} FLOPs does not buy one step of {batch_size} examples, which costs "
            f"{step_flops:.4g}: raise the budget or lower batch_size"
        )
