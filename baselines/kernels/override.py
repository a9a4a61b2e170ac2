"""Replace a function of torch by another implementation within a block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode


class Replaced(TorchFunctionMode, ABC):
    """In the block, calls of one function go to `instead`, and on to torch if `instead` returns None.

    Args:
        function: the torch function, under the name by which it is called.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self._function = function

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is self._function and (result := self.instead(args, kwargs)) is not None:
            return result
        return func(*args, **kwargs)

    @abstractmethod
    def instead(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The result of the function, or None to leave the call to torch."""
