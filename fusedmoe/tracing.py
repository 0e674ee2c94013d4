"""What torch.compile is told about our functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def constant(function: F) -> F:
    """Mark a function that torch.compile calls while it traces, and whose result it takes for a constant; it does not trace into it.

    `torch.compiler.assume_constant_result` sets this attribute, but imports Dynamo to do so: 1 s at every import of this library.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
