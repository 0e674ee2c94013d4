"""The activations in Triton: a(z) and a'(z) in float32. The formulas, and what PyTorch takes at a
kink, stand in `reference/activation.py`."""

import triton
import triton.language as tl

from fusedmoe.kernels.writer import CODES
from fusedmoe.reference import activation as reference

RELU, SIGMOID, TANH, SILU, GELU, GELU_TANH, LEAKY_RELU, ELU, SOFTPLUS = (
    tl.constexpr(CODES[name])
    for name in ("relu", "sigmoid", "tanh", "silu", "gelu", "gelu_tanh", "leaky_relu", "elu", "softplus")
)
# Constants stand to the right of tensors: the interpreter makes a constant of constant x tensor.
GELU_CUBIC = tl.constexpr(reference.GELU_CUBIC)
SOFTPLUS_LINEAR = tl.constexpr(reference.SOFTPLUS_LINEAR)
ROOT_HALF = tl.constexpr(0.5**0.5)
ROOT_TWO_OVER_PI = tl.constexpr(0.7978845608028654)
ROOT_ONE_OVER_TWO_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def shares(z):
    """sigmoid(z), sigmoid(-z)."""
    # From exp(-|z|), which cannot overflow.
    t = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + t)
    smaller = t * larger
    return tl.where(z < 0.0, smaller, larger), tl.where(z < 0.0, larger, smaller)


@triton.jit
def sigmoid(z):
    # Two quotients rather than `shares`, which takes up to 33 registers more and spills on sm_80
    # and sm_120.
    t = tl.exp(-tl.abs(z))
    return tl.where(z >= 0.0, 1.0 / (1.0 + t), t / (1.0 + t))


@triton.jit
def tanh(z):
    t = tl.exp(-2.0 * tl.abs(z))
    large = (1.0 - t) / (1.0 + t)
    # Near 0 the difference loses its digits: Taylor's series, whose next term is below a roundoff
    # for |z| < 1/4.
    u = z * z
    small = z * (
        1.0
        - u * (0.3333333333333333 - u * (0.13333333333333333 - u * (0.05396825396825397 - u * 0.021869488536155203)))
    )
    return tl.where(tl.abs(z) < 0.25, small, tl.where(z < 0.0, -large, large))


@triton.jit
def tanh_derivative(z):
    # 1 - tanh(z)^2 without a difference.
    t = tl.exp(-2.0 * tl.abs(z))
    return 4.0 * t / ((1.0 + t) * (1.0 + t))


@triton.jit
def gelu_tanh_inner(z):
    # 2 u in z (1 + tanh(u)) / 2 = z sigmoid(2 u), of which the right side does not cancel at a
    # negative z.
    return z * (z * z * GELU_CUBIC + 1.0) * ROOT_TWO_OVER_PI * 2.0


@triton.jit
def expm1(z):
    """exp(z) - 1 of a z <= 0."""
    # With h = tanh(z / 2), which keeps its digits near 0.
    h = tanh(0.5 * z)
    return 2.0 * h / (1.0 - h)


@triton.jit
def softplus(z):
    # log(1 + t) = 2 artanh(s), whose series has the digits of the smallest t too; s <= 1/3, so that
    # the next term is below a roundoff.
    t = tl.exp(-tl.abs(z))
    s = t / (2.0 + t)
    u = s * s
    series = 0.14285714285714285 + u * (0.1111111111111111 + u * (0.09090909090909091 + u * 0.07692307692307693))
    log = 2.0 * s + 2.0 * s * u * (0.3333333333333333 + u * (0.2 + u * series))
    return tl.where(z > SOFTPLUS_LINEAR, z, tl.where(z < 0.0, 0.0, z) + log)


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
        y = z * sigmoid(gelu_tanh_inner(z))
    elif CODE == LEAKY_RELU:
        y = tl.where(z > 0.0, z, parameter * z)
    elif CODE == ELU:
        y = tl.where(z > 0.0, z, parameter * expm1(tl.where(z > 0.0, 0.0, z)))
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
        share, rest = shares(z)
        y = share * rest
    elif CODE == TANH:
        y = tanh_derivative(z)
    elif CODE == SILU:
        share, rest = shares(z)
        y = share * (1.0 + z * rest)
    elif CODE == GELU:
        y = 0.5 * (1.0 + tl.erf(z * ROOT_HALF)) + z * tl.exp(-0.5 * z * z) * ROOT_ONE_OVER_TWO_PI
    elif CODE == GELU_TANH:
        share, rest = shares(gelu_tanh_inner(z))
        y = share * (1.0 + z * rest * (z * z * GELU_CUBIC * 3.0 + 1.0) * ROOT_TWO_OVER_PI * 2.0)
    elif CODE == LEAKY_RELU:
        y = tl.where(z > 0.0, 1.0, parameter)
    elif CODE == ELU:
        y = tl.where(z > 0.0, 1.0, parameter * tl.exp(tl.where(z > 0.0, 0.0, z)))
    elif CODE == SOFTPLUS:
        y = tl.where(z > SOFTPLUS_LINEAR, 1.0, sigmoid(z))
    else:
        y = tl.full(z.shape, 1.0, tl.float32)
    return y


@triton.jit
def apply(z, code, parameter, ACTS: tl.constexpr):
    """a(z) of the activation `code`, one of the codes ACTS that the launch may meet; one alone
    costs no choice."""
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
