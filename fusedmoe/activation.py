"""Names and parameters of the activations; `reference/activation.py` has the formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


class Row(NamedTuple):
    """What is known of an activation by its name: its parameter's default (negative slope, or
    alpha) where it has one, and whether its derivative jumps at 0.
    """

    parameter: float | None = None
    kinked: bool = False


ROWS = {
    "identity": Row(),
    "relu": Row(kinked=True),
    "sigmoid": Row(),
    "tanh": Row(),
    "silu": Row(),
    "gelu": Row(),
    "gelu_tanh": Row(),
    "leaky_relu": Row(0.01, kinked=True),
    "elu": Row(1.0, kinked=True),
    "softplus": Row(),
}
# name -> value of its one parameter; 0.0 where it has none.
DEFAULT_PARAMETER = {name: row.parameter or 0.0 for name, row in ROWS.items()}
PARAMETRIC = tuple(name for name, row in ROWS.items() if row.parameter is not None)


@dataclass(frozen=True)
class Activation:
    """One elementwise function.

    Args:
        name: one of the names in `DEFAULT_PARAMETER`.
        parameter: the negative slope of leaky_relu, or alpha of elu; the others have none.
    Raises: ValueError for an unknown name, for a parameter that is not finite, or for one that the
        activation does not have.
    """

    name: str = "relu"
    parameter: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in DEFAULT_PARAMETER:
            raise ValueError(f"activation: expected one of {', '.join(DEFAULT_PARAMETER)}, got {self.name!r}")
        if (
            isinstance(self.parameter, bool)
            or not isinstance(self.parameter, (int, float))
            or not math.isfinite(self.parameter)
        ):
            raise ValueError(f"activation {self.name}: expected a finite parameter, got {self.parameter!r}")
        if self.parameter != 0.0 and self.name not in PARAMETRIC:
            raise ValueError(f"activation {self.name}: expected no parameter, got {self.parameter!r}")
        object.__setattr__(self, "parameter", float(self.parameter))

    def __str__(self) -> str:
        return f"{self.name}({self.parameter:g})" if self.name in PARAMETRIC else self.name


IDENTITY = Activation("identity")
RELU = Activation("relu")


def activation(value: str | Activation) -> Activation:
    """Return the activation that `value` names.

    Args:
        value: an `Activation`, or a name in any case ("relu", "RELU").

    Raises: ValueError for an unknown name, TypeError for anything that is neither.
    """
    if isinstance(value, Activation):
        return value
    if not isinstance(value, str):
        raise TypeError(f"activation: expected a name or an Activation, got {type(value).__name__}")
    name = value.lower()
    return Activation(name, DEFAULT_PARAMETER.get(name, 0.0))
