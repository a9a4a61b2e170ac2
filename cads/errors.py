"""The errors that cads raises on purpose. A message says what is wrong, where, and what to do."""

from __future__ import annotations


class CadsError(Exception):
    """Base class of all errors of this package. The message names the setting or file, its value and the remedy."""


class ConfigError(CadsError):
    """A setting, flag or configuration file that cannot be used."""


class DataError(CadsError):
    """A pool, target or test set that cannot be used: empty, duplicate ids, missing fields, leaks."""


class BudgetError(CadsError):
    """A budget that does not parse, that does not buy one step, or that would be exceeded."""


class NotAffordableError(BudgetError):
    """A budget that buys the final training, and no search beside it. The message says what is done instead."""


class NonFiniteError(CadsError):
    """A loss or gradient that is NaN or infinite, caught before the weights were updated.

    Attributes:
        step: the optimizer step (0-based) that was not taken.
        ids: the examples in the batch.
        learning_rate: the learning rate of that step.
    """

    def __init__(self, message: str, *, step: int, ids: list[str], learning_rate: float) -> None:
        super().__init__(message)
        self.step = step
        self.ids = ids
        self.learning_rate = learning_rate


class SelectionError(CadsError):
    """A Selection on disk that is missing, of another format, corrupt, or made for another pool."""


class CheckpointError(CadsError):
    """A file of saved state that is missing, of another format, or corrupt."""
