"""`--model package.module:factory`: one's own model, as it is and fused."""

from __future__ import annotations

import copy
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import fusedmoe
from fusedmoe import testing
from fusedmoe.speed.arms import Local
from fusedmoe.speed.calls import Call
from fusedmoe.speed.measuring import ROUNDS, SETTLE, Times, measure, pinned

FORM = "expected package.module:factory, a function that returns (model, inputs), and may take the number of rows"


class Measured(NamedTuple):
    """What fusing one's own model did: the report, and the times of each arm by mode."""

    report: fusedmoe.FuseReport
    times: dict[str, dict[str, Times]]


def load(name: str) -> Callable:
    """Return the factory that `package.module:factory` names.

    Raises: ValueError, with the form expected, if there is none.
    """
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"--model: {FORM}; got {name!r}")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--model: {FORM}; got {name!r}: {error}") from None
    if not callable(found):
        raise ValueError(f"--model: {FORM}; got {name!r}, of type {type(found).__name__}")
    return found


def make(factory: Callable, rows: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Call the factory, with the number of rows if it takes one; return the model and its inputs.

    Raises: ValueError, with the form expected, if it returns something else.
    """
    made = factory(rows) if inspect.signature(factory).parameters else factory()
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise ValueError(f"--model: {FORM}; it returned {type(made).__name__}")
    model, inputs = made
    return model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)


def tensors_of(output: object) -> list[Tensor]:
    """Return the floating-point tensors in an output: one, or tuples, lists and dicts of them."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    parts = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def inference(model: nn.Module, inputs: Sequence[Tensor]) -> Call:
    def call() -> object:
        with torch.inference_mode():
            return model(*inputs)

    return call


def training_step(model: nn.Module, inputs: Sequence[Tensor]) -> Call:
    """Return a call that runs the model and the backward of all its outputs, with fixed upstream
    gradients.
    """
    params = [param for param in model.parameters() if param.requires_grad]
    d_outs = [torch.randn(out.shape, dtype=out.dtype) for out in tensors_of(model(*inputs))]

    def call() -> object:
        return torch.autograd.grad(tensors_of(model(*inputs)), params, d_outs, allow_unused=True)

    return call


def check(model: nn.Module, fused: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Raise AssertionError unless the fused model's outputs are as near to float64 as the rule of
    `fusedmoe.testing` allows.

    In evaluation mode, since dropout draws anew at every call; gradients were probed when the
    layers were fused.
    """
    exact, *arms = (copy.deepcopy(m).eval() for m in (model, model, fused))
    exact.double()
    with torch.no_grad():
        truths = tensors_of(exact(*(x.double() if x.is_floating_point() else x for x in inputs)))
        plain, ours = (tensors_of(arm(*inputs)) for arm in arms)
    for number, (truth, theirs, mine) in enumerate(zip(truths, plain, ours, strict=True)):
        allowed, wrong = testing.bound(testing.error(theirs, truth), truth, mine.dtype), testing.error(mine, truth)
        assert wrong <= allowed, f"output {number}: expected an error of at most {allowed:.2e}, got {wrong:.2e}"


def measure_model(factory: Callable, rows: int, threads: int, backend: str, rounds: int = ROUNDS) -> Measured:
    """Fuse a copy of the model, hold it against the model, and time both in turn.

    Raises: ValueError if the factory returns something else; AssertionError if the fused model
        computes something else; RuntimeError for a backend that cannot run.
    """
    model, inputs = make(factory, rows)
    fused = copy.deepcopy(model)
    report = fusedmoe.fuse(fused, backend=backend)
    if not report:
        return Measured(report, {})
    check(model, fused, inputs)
    times = {}
    with pinned(threads):
        for mode, call in (("inference", inference), ("training step", training_step)):
            arms = {
                name: Local(call(arm.train(mode != "inference"), inputs))
                for name, arm in (("fused", fused), ("eager", model))
            }
            times[mode] = measure(arms, rounds, SETTLE if threads > 1 else 0.0)
    return Measured(report, times)
