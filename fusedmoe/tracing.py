"""What torch.compile is told about our functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable)


def constant(function: F) -> F:
    """Mark a function whose result torch.compile takes for a constant.

    It calls the function while it traces, and does not trace into it.
    `torch.compiler.assume_constant_result` sets this attribute too, but would import Dynamo at every
    import of this library.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
