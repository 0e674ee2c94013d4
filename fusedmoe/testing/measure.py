"""The measure of error: a problem, a network's results, and how far from the truth they may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fusedmoe import dtype as dtypes
from fusedmoe.activation import ROWS as ACTIVATIONS
from fusedmoe.reference import operator as reference
from fusedmoe.table import Table

KINKED = tuple(name for name, row in ACTIVATIONS.items() if row.kinked)
# A z nearer to the kink than this many roundoffs of its terms may fall on the other side in another
# order of summation.
KINK_ROUNDOFFS = 8
MOST_LEFT_OUT = 0.05
# Plain torch's error on one input may be small by luck: a sum of five numbers is often exact. Its
# error is a random variable, and the largest of seventeen draws is what the rule compares with.
NEIGHBOURS = 16

Network = Callable[[Tensor, Sequence[Tensor], Table], tuple[Tensor, Sequence[Tensor]]]


class Case(NamedTuple):
    """A table and the number of rows to run it on."""

    table: Table
    rows: int


class Problem(NamedTuple):
    """What a comparison starts from: x [B, S, D], parameters, and upstream gradients."""

    table: Table
    x: Tensor
    params: tuple[Tensor, ...]
    d_out: Tensor
    d_weights: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers, rounded to a dtype."""
        return Problem(
            self.table,
            self.x.to(dtype),
            tuple(p.to(dtype) for p in self.params),
            self.d_out.to(dtype),
            tuple(d.to(dtype) for d in self.d_weights),
        )


def error(value: Tensor, truth: Tensor) -> float:
    """Return max |value - truth| in float64; infinite if NaN or infinity is in one alone."""
    if value.shape != truth.shape:
        raise AssertionError(f"expected shape {list(truth.shape)}, got {list(value.shape)}")
    value, truth = value.detach().double(), truth.detach().double()
    difference = (value - truth).abs()
    same = (value == truth) | (value.isnan() & truth.isnan())
    return float(torch.where(same, 0.0, difference.nan_to_num(nan=math.inf)).max()) if value.numel() else 0.0


def bound(plain_error: float, truth: Tensor, dtype: torch.dtype) -> float:
    """Return the largest error that the rule allows in `dtype`, given that of plain torch."""
    largest = float(truth.detach().double().abs().max()) if truth.numel() else 0.0
    return 2 * plain_error + 8 * dtypes.row(dtype).roundoff * largest


def faults_of(
    ours: dict[str, Tensor | None], expected: dict[str, tuple[Tensor | None, float]]
) -> list[tuple[float, str]]:
    """Return the values that are further from their truth than their bound allows.

    Each is a pair: its error relative to the bound, and a sentence with its name and both.

    Args:
        ours: values by name, as `evaluate` returns them.
        expected: (truth, largest error allowed) by name, as `expectation` returns them. None stands
            for no gradient.
    """
    assert ours.keys() == expected.keys(), f"expected {sorted(expected)}, got {sorted(ours)}"
    faults = []
    for name, (truth, allowed) in expected.items():
        value = ours[name]
        if value is None or truth is None:
            if value is not truth:
                faults.append(
                    (
                        math.inf,
                        f"{name}: expected {'no gradient' if truth is None else 'a gradient'}, got "
                        f"{'none' if value is None else 'one'}",
                    )
                )
        elif not (worst := error(value, truth)) <= allowed:
            faults.append(
                (
                    worst / max(allowed, 1e-300),
                    f"{name}: expected an error of at most {allowed:.2e}, got {worst:.2e} ({list(value.shape)})",
                )
            )
    return faults


def assert_close(ours: dict[str, Tensor | None], expected: dict[str, tuple[Tensor | None, float]]) -> None:
    """Raise AssertionError, naming the worst value, if `faults_of` finds any."""
    faults = faults_of(ours, expected)
    assert not faults, f"{len(faults)} of {len(expected)} differ, the worst in {max(faults)[1]}"


def randomise(params: Iterable[Tensor], seed: int) -> None:
    """Overwrite every tensor with normal numbers of the scale 1 / sqrt(width of its rows).

    Some libraries initialise near zero, where a broken kernel passes every comparison.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in params:
            scale = param.shape[-1] ** -0.5 if param.dim() > 1 and param.shape[-1] else 0.5
            param.copy_(torch.randn(param.shape, generator=generator, dtype=torch.float64) * scale)


def problem(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """Return random inputs of a case, without rows whose gradient depends on the order of sums.

    Raises: AssertionError if more than 5 % of the rows would have to go.
    """
    table = case.table
    params = tuple(torch.empty(p.shape, dtype=dtype) for p in table.parameters)
    randomise(params, seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    x = draw(case.rows, table.inputs[0].slots, table.inputs[0].width)
    x = x[rows_off_kinks(x, params, table)]
    d_out = draw(len(x), *eager(x, params, table)[0].shape[1:])
    return Problem(
        table, x, params, d_out, tuple(draw(len(x), len(level.units), len(level.experts)) for level in table.levels)
    )


def rows_off_kinks(x: Tensor, params: Sequence[Tensor], table: Table) -> Tensor:
    """Return which rows [B] are off the kinks: |z| >= 8 roundoff x sum of |w_k x_k|, in float64.

    Raises: AssertionError if fewer than 95 % have.
    """
    # Float64 takes the margin of float32, because `expectation` measures plain torch in float32 on
    # the same rows.
    margin = KINK_ROUNDOFFS * max(dtypes.row(x.dtype).roundoff, dtypes.row(torch.float32).roundoff)
    off = torch.ones(len(x), dtype=torch.bool)
    for kind, z, scale in reference.preactivations(x.double(), [p.double() for p in params], table):
        if kind.name in KINKED:
            off &= ~((z.abs() < margin * scale).any(-1))
    assert int((~off).sum()) <= MOST_LEFT_OUT * len(x), (
        f"expected at most {MOST_LEFT_OUT:.0%} of {len(x)} rows near a kink, got {int((~off).sum())}"
    )
    return off


def eager(x: Tensor, params: Sequence[Tensor], table: Table) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The reference's forward, with the output as callers see it.

    Tasks without towers get the concatenation of their units.

    In float64 this is the truth, so it uses a softmax whose gradient keeps its digits.
    """
    out, weights = reference.forward(
        x, params, table, softmax_by_pairs if x.dtype == torch.float64 else reference.last_softmax
    )
    if table.graph.tasks:
        out = torch.stack([torch.cat([out[:, u] for u in units], -1) for units in table.graph.tasks], 1)
    return out, weights


def softmax_by_pairs(z: Tensor) -> Tensor:
    """Return the softmax as p_i = 1 / (1 + sum of exp(z_j - z_i) over j other than i).

    In this form autograd keeps its digits. PyTorch's own gradient is p (d - sum of p d), which
    where one p is nearly 1 errs by a roundoff of d, however small the other p. Here d reaches z
    through differences of two logits alone, each of which has a factor p_i p_j.
    """
    differences = z[..., None, :] - z[..., :, None]
    # A constant on the diagonal: the gradients of z_i - z_i would be large and cancel.
    differences = torch.where(torch.eye(z.shape[-1], dtype=torch.bool, device=z.device), 0.0, differences)
    return torch.exp(-torch.logsumexp(differences, -1))


def evaluate(
    network: Network, given: Problem, strided: Callable[[Tensor], Tensor] = Tensor.detach
) -> dict[str, Tensor | None]:
    """Run a network and its autograd.

    Returns: output, mixing weights and every gradient by name; None where there is no gradient.

    `strided` gives each tensor its layout: it returns the same numbers in another one.
    """
    x, *params = (strided(t.detach()).requires_grad_() for t in (given.x, *given.params))
    out, weights = network(x, params, given.table)
    # A network that keeps its mixing weights to itself returns none.
    loss = (out * strided(given.d_out)).sum() + sum(
        (w * strided(d)).sum() for w, d in zip(weights, given.d_weights, strict=False)
    )
    grads = (
        torch.autograd.grad(loss, [x, *params], allow_unused=True) if loss.requires_grad else [None] * (1 + len(params))
    )
    # An input that no output depends on has a gradient all the same: zero, as the slots have that
    # nobody reads.
    d_x = torch.zeros_like(x) if grads[0] is None else grads[0]
    names = [f"d_{p.name}" for p in given.table.parameters]
    outputs = {"out": out.detach(), **{f"weights.{i}": w.detach() for i, w in enumerate(weights)}}
    return {**outputs, "d_x": d_x, **dict(zip(names, grads[1:], strict=True))}


def expectation(
    given: Problem, network: Network = eager, neighbours: int = NEIGHBOURS
) -> dict[str, tuple[Tensor | None, float]]:
    """Return (truth, largest error allowed) by name for the outputs and gradients of a problem.

    Plain torch's error is the largest of a few runs, on the problem and on `neighbours` of it, each
    against its own truth. In float64, where plain torch is the truth itself, it is measured in
    float32 and scaled by the ratio of the roundoffs; the truth's own error is added once more.
    """
    dtype = given.x.dtype
    measured = torch.float32 if dtype == torch.float64 else dtype
    rounded = given.to(measured)
    draws = [rounded, *(neighbour(rounded, seed) for seed in range(neighbours))]
    runs = [(evaluate(network, draw), evaluate(network, draw.to(torch.float64))) for draw in draws]
    truth = runs[0][1] if measured == dtype else evaluate(network, given)
    scale = dtypes.row(dtype).roundoff / dtypes.row(measured).roundoff

    def allowed(name: str, value: Tensor | None) -> float:
        if value is None:
            return 0.0
        pairs = [(run[name], exact[name]) for run, exact in runs]
        plain = scale * max(error(got, true) for got, true in pairs if got is not None and true is not None)
        return bound(plain, value, dtype) + (0.0 if measured == dtype else plain)

    return {name: (value, allowed(name, value)) for name, value in truth.items()}


def assert_parity(network: Network, given: Problem, names: Iterable[str] | None = None) -> None:
    """Raise AssertionError unless a network is as near to the truth on a problem as the rule asks.

    Neighbours, which can only raise what is allowed, are run only if the first comparison fails.

    Args:
        names: what to compare, of the names that `evaluate` returns; None for all.
    """
    ours = evaluate(network, given)

    def compare(neighbours: int) -> None:
        expected = expectation(given, neighbours=neighbours)
        if names is None:
            assert_close(ours, expected)
        else:
            assert_close({name: ours[name] for name in names}, {name: expected[name] for name in names})

    try:
        compare(0)
    except AssertionError:
        compare(NEIGHBOURS)


def neighbour(given: Problem, seed: int) -> Problem:
    """Return the problem with every number moved by a rounding or two in its dtype.

    It has other rounding errors.
    """
    generator = torch.Generator().manual_seed(seed)

    def move(tensor: Tensor) -> Tensor:
        return moved(tensor, generator)

    return Problem(
        given.table, move(given.x), tuple(map(move, given.params)), move(given.d_out), tuple(map(move, given.d_weights))
    )


def moved(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Return the tensor with every number moved up or down by a rounding or two in its dtype."""
    sign = 2 * torch.randint(2, tensor.shape, generator=generator) - 1
    return (tensor.double() * (1 + 2 * dtypes.row(tensor.dtype).roundoff * sign)).to(tensor.dtype)
