"""The activations in plain PyTorch: each function, and its derivative as autograd takes it.

At a kink the derivative is PyTorch's: relu'(0) = 0, leaky_relu'(0) = its slope, elu'(0) = alpha.
NaN passes through all of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedmoe.activation import Activation

# Above it PyTorch takes softplus(z) = z.
SOFTPLUS_LINEAR = 20.0
GELU_CUBIC = 0.044715

_APPLY = {
    "identity": lambda z, _: z,
    "relu": lambda z, _: F.relu(z),
    "sigmoid": lambda z, _: torch.sigmoid(z),
    "tanh": lambda z, _: torch.tanh(z),
    "silu": lambda z, _: F.silu(z),
    "gelu": lambda z, _: F.gelu(z),
    "gelu_tanh": lambda z, _: F.gelu(z, approximate="tanh"),
    "leaky_relu": lambda z, slope: F.leaky_relu(z, slope),
    "elu": lambda z, alpha: F.elu(z, alpha),
    "softplus": lambda z, _: F.softplus(z, threshold=SOFTPLUS_LINEAR),
}


def apply(activation: Activation, z: Tensor) -> Tensor:
    """Return a(z), elementwise. z: [...]."""
    return _APPLY[activation.name](z, activation.parameter)


def pullback(activation: Activation, z: Tensor, d: Tensor) -> Tensor:
    """Return d * a'(z), elementwise; it can be differentiated again. z, d: [...]."""
    if activation.name == "identity":
        return d
    if activation.name == "relu":
        # Not a product: an infinite d must not turn into NaN where the unit is off.
        return torch.where(z <= 0, torch.zeros_like(d), d)
    return d * _DERIVATIVE[activation.name](z, activation.parameter)


def _sigmoid(z: Tensor, _) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 - s)


def _silu(z: Tensor, _) -> Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _gelu(z: Tensor, _) -> Tensor:
    return 0.5 * (1 + torch.erf(z * math.sqrt(0.5))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _gelu_tanh(z: Tensor, _) -> Tensor:
    scale = math.sqrt(2 / math.pi)
    t = torch.tanh(scale * (z + GELU_CUBIC * z * z * z))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * scale * (1 + 3 * GELU_CUBIC * z * z)


def _leaky_relu(z: Tensor, slope: float) -> Tensor:
    return torch.where(z > 0, torch.ones_like(z), slope)


def _elu(z: Tensor, alpha: float) -> Tensor:
    # Clamped, since exp overflows on the side that is not taken, and its derivative times 0 would
    # be NaN.
    return torch.where(z > 0, torch.ones_like(z), alpha * torch.exp(z.clamp(max=0)))


def _softplus(z: Tensor, _) -> Tensor:
    return torch.where(z > SOFTPLUS_LINEAR, torch.ones_like(z), torch.sigmoid(z))


_DERIVATIVE = {
    "sigmoid": _sigmoid,
    "tanh": lambda z, _: 1 - torch.tanh(z) ** 2,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "softplus": _softplus,
}
