"""The activations in Triton: a(z) and a'(z) in float32. The formulas, and what PyTorch takes at a kink, stand in `reference/activation.py`."""

import triton
import triton.language as tl

from fusedmoe.kernels.plan import CODES
from fusedmoe.reference import activation as reference

RELU, SIGMOID, TANH, SILU, GELU, GELU_TANH, LEAKY_RELU, ELU, SOFTPLUS = (
    tl.constexpr(CODES[name]) for name in ("relu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh", "leaky_relu", "elu", "softplus")
)
# Constants stand to the right of tensors: the interpreter makes a constant of constant x tensor.
GELU_CUBIC = tl.constexpr(reference.GELU_CUBIC)
SOFTPLUS_LINEAR = tl.constexpr(reference.SOFTPLUS_LINEAR)
ROOT_HALF = tl.constexpr(0.5**0.5)
ROOT_TWO_OVER_PI = tl.constexpr(0.7978845608028654)
ROOT_ONE_OVER_TWO_PI = tl.constexpr(0.3989422804014327)
# log(1 + t) loses the digits of a smaller t; its first two terms err by less than a roundoff of float32 there.
SMALL = tl.constexpr(2.0**-8)


@triton.jit
def sigmoid(z):
    # From exp(-|z|), which cannot overflow.
    t = tl.exp(-tl.abs(z))
    return tl.where(z >= 0.0, 1.0 / (1.0 + t), t / (1.0 + t))


@triton.jit
def tanh(z):
    t = tl.exp(-2.0 * tl.abs(z))
    large = (1.0 - t) / (1.0 + t)
    # Near 0 the difference loses its digits: z - z^3/3 + 2 z^5/15, whose next term is below a roundoff for |z| < 1/16.
    square = z * z
    small = z * (1.0 - square * (0.3333333333333333 - square * 0.13333333333333333))
    return tl.where(tl.abs(z) < 0.0625, small, tl.where(z < 0.0, -large, large))


@triton.jit
def softplus(z):
    t = tl.exp(-tl.abs(z))
    log = tl.where(t < SMALL, t * (1.0 - t * (0.5 - t * 0.3333333333333333)), tl.log(1.0 + t))
    return tl.where(z > SOFTPLUS_LINEAR, z, tl.maximum(z, 0.0) + log)


@triton.jit
def one(z, parameter, CODE: tl.constexpr):
    """a(z) of the one activation CODE."""
    if CODE == RELU:
        # Not a maximum, which drops NaN.
        y = tl.where(z <= 0.0, 0.0, z)
    elif CODE == SIGMOID:
        y = sigmoid(z)
    elif CODE == TANH:
        y = tanh(z)
    elif CODE == SILU:
        y = z * sigmoid(z)
    elif CODE == GELU:
        y = 0.5 * z * (1.0 + tl.erf(z * ROOT_HALF))
    elif CODE == GELU_TANH:
        y = 0.5 * z * (1.0 + tanh((z + z * z * z * GELU_CUBIC) * ROOT_TWO_OVER_PI))
    elif CODE == LEAKY_RELU:
        y = tl.where(z > 0.0, z, parameter * z)
    elif CODE == ELU:
        y = tl.where(z > 0.0, z, parameter * (tl.exp(tl.minimum(z, 0.0)) - 1.0))
    elif CODE == SOFTPLUS:
        y = softplus(z)
    else:
        y = z
    return y


@triton.jit
def one_derivative(z, parameter, CODE: tl.constexpr):
    """a'(z) of the one activation CODE."""
    if CODE == RELU:
        y = tl.where(z <= 0.0, 0.0, 1.0)
    elif CODE == SIGMOID:
        s = sigmoid(z)
        y = s * (1.0 - s)
    elif CODE == TANH:
        t = tanh(z)
        y = 1.0 - t * t
    elif CODE == SILU:
        s = sigmoid(z)
        y = s * (1.0 + z * (1.0 - s))
    elif CODE == GELU:
        y = 0.5 * (1.0 + tl.erf(z * ROOT_HALF)) + z * tl.exp(-0.5 * z * z) * ROOT_ONE_OVER_TWO_PI
    elif CODE == GELU_TANH:
        t = tanh((z + z * z * z * GELU_CUBIC) * ROOT_TWO_OVER_PI)
        y = 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * ROOT_TWO_OVER_PI * (1.0 + z * z * GELU_CUBIC * 3.0)
    elif CODE == LEAKY_RELU:
        y = tl.where(z > 0.0, 1.0, parameter)
    elif CODE == ELU:
        y = tl.where(z > 0.0, 1.0, parameter * tl.exp(tl.minimum(z, 0.0)))
    elif CODE == SOFTPLUS:
        y = tl.where(z > SOFTPLUS_LINEAR, 1.0, sigmoid(z))
    else:
        y = tl.full(z.shape, 1.0, tl.float32)
    return y


@triton.jit
def apply(z, code, parameter, ACTS: tl.constexpr):
    """a(z) of the activation `code`, one of the codes ACTS that the launch may meet; one alone costs no choice."""
    if len(ACTS) == 1:
        y = one(z, parameter, ACTS[0])
    else:
        y = z
        for i in tl.static_range(len(ACTS)):
            if code == ACTS[i]:
                y = one(z, parameter, ACTS[i])
    return y


@triton.jit
def derivative(z, code, parameter, ACTS: tl.constexpr):
    """a'(z) of the activation `code`, as in `apply`."""
    if len(ACTS) == 1:
        y = one_derivative(z, parameter, ACTS[0])
    else:
        y = tl.full(z.shape, 1.0, tl.float32)
        for i in tl.static_range(len(ACTS)):
            if code == ACTS[i]:
                y = one_derivative(z, parameter, ACTS[i])
    return y
