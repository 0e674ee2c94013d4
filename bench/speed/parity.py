"""Nothing is timed that computes something else: outputs and gradients of the arms are held against
float64 before the clock starts.

In float32 the rule of `fusedmoe.testing`, element by element. In bfloat16, where nearly every row
is near a ReLU's kink, the same rule in the norm of each value: |ours - truth| <= 2 x |plain torch
in that dtype - truth| + 8 x roundoff x |truth|.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.func import functional_call

from fusedmoe import dtype as dtypes
from fusedmoe import testing
from fusedmoe.drafts import share_input
from fusedmoe.speed.grids import Cell
from fusedmoe.speed.restructured import Restructured, arrange
from fusedmoe.speed.subjects import Layer, Sizes, Work, build, rows_for
from fusedmoe.table import Table

Expected = dict[str, tuple[Tensor | None, float]]


def norm_error(value: Tensor, truth: Tensor) -> float:
    """Return |value - truth|, the norm over all elements, in float64."""
    return float((value.double() - truth.double()).norm())


def allowed_in_norm(plain_error: float, truth: Tensor, precision: str) -> float:
    """Return the largest |ours - truth| allowed, given that of plain torch in a precision."""
    return 2 * plain_error + 8 * dtypes.DTYPES[precision].roundoff * float(truth.double().norm())


def network_of(layer: Layer, module: torch.nn.Module) -> testing.Network:
    """Return a module with the layer's keys as a function of x [B, 1, D], which all its slots get,
    and its parameters.
    """

    def network(x: Tensor, params: Sequence[Tensor], table: Table) -> tuple[Tensor, tuple]:
        slots = x.expand(-1, layer.slots, -1) if layer.slots else x[:, 0]
        return functional_call(module, dict(zip(layer.wiring.keys, params, strict=True)), (slots,)), ()

    return network


def rewritten(network: Restructured) -> testing.Network:
    """Return the restructured network as the same function."""
    return lambda x, params, table: (functional_call(network, arrange(network.table, params), (x[:, 0],)), ())


def problem_of(layer: Layer, work: Work) -> testing.Problem:
    """Return the inputs of a case as the parity tests take them."""
    return testing.Problem(
        share_input(layer.table), work.x.unsqueeze(1), tuple(param.detach() for param in layer.params), work.d_out, ()
    )


# A few, because modes and numbers of threads of one layer and batch follow one another.
@lru_cache(maxsize=4)
def expectation(sizes: Sizes, batch: int, dtype: torch.dtype) -> Expected:
    """Return (truth in float64, largest error allowed) by name for the output and all gradients of
    a layer.
    """
    layer = build(sizes, dtype)
    given, network = problem_of(layer, rows_for(layer, batch)), network_of(layer, layer.module)
    if dtype == torch.float32:
        return testing.expectation(given, network)
    draws = [given, *(testing.neighbour(given, seed) for seed in range(testing.NEIGHBOURS))]
    runs = [(testing.evaluate(network, draw), testing.evaluate(network, draw.to(torch.float64))) for draw in draws]

    def worst(name: str) -> float:
        return max(norm_error(run[name], exact[name]) for run, exact in runs)

    precision = str(dtype).removeprefix("torch.")
    return {
        name: (truth, 0.0 if truth is None else allowed_in_norm(worst(name), truth, precision))
        for name, truth in runs[0][1].items()
    }


def check(name: str, network: testing.Network, given: testing.Problem, expected: Expected) -> None:
    """Raise AssertionError, naming the worst, unless output and gradients of an arm are as near to
    float64 as the rule allows.
    """
    ours = testing.evaluate(network, given)
    try:
        if given.x.dtype == torch.float32:
            testing.assert_close(ours, expected)
            return
        assert ours.keys() == expected.keys(), f"expected {sorted(expected)}, got {sorted(ours)}"
        for key, (truth, allowed) in expected.items():
            assert (ours[key] is None) == (truth is None), f"{key}: expected {'no ' if truth is None else ''}gradient"
            wrong = 0.0 if truth is None else norm_error(ours[key], truth)
            assert wrong <= allowed, (
                f"the worst in {key}: expected an error of at most {allowed:.2e} in the norm, got {wrong:.2e}"
            )
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None


def wrong_results(
    cell: Cell, results: Mapping[str, tuple[Tensor, str]], plain: Mapping[str, Tensor], expected: Expected
) -> dict[str, str]:
    """Return why the result of an arm is not the network's, for each arm where it is not.

    Args:
        results: (output, or d_x of a training step, and the precision it was computed in) by arm.
        plain: the same result of plain torch, by precision.
        expected: as `expectation` returns it.
    """
    truth = expected["out"][0] if cell.mode == "inference" else expected["d_x"][0][:, 0]
    allowed = {
        precision: allowed_in_norm(norm_error(result.reshape(truth.shape), truth), truth, precision)
        for precision, result in plain.items()
    }
    faults = {}
    for name, (result, precision) in results.items():
        wrong = norm_error(result.reshape(truth.shape), truth)
        if not wrong <= allowed[precision]:
            faults[name] = f"wrong: expected an error of at most {allowed[precision]:.2e} in the norm, got {wrong:.2e}"
    return faults
