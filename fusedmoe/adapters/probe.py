"""The numerical probe: does a module compute what its wiring says?

Attributes and shapes can agree while the forward does something else. So the forward of the
module's class and the fused one run on a copy with random parameters, in train and in eval mode,
over the inputs of `_inputs`, and must agree in every output and, where gradients are asked for, in
every gradient. That is evidence, not proof: a forward that differs on other inputs only (for one
batch size, or past a threshold that no row here crosses) passes.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusedmoe.adapters.forward import Match, one_per_task
from fusedmoe.adapters.surroundings import put_back
from fusedmoe.nn.guards import HOOKS
from fusedmoe.nn.parameters import Parameters
from fusedmoe.nn.wiring import Unfusable
from fusedmoe.op import fusion_network

# Of the rows of one batch: usual features, and rows on which activations saturate or are linear.
ROW_SCALES = (1.0, 8.0, 0.125)
# Of whole batches: for a clamp at the size that a guard against outliers, or against overflow, has.
LARGE_SCALES = (1e4, 1e8)


class _Input(NamedTuple):
    """What both forwards run on. `gradients`: compare gradients, too; otherwise under no_grad."""

    name: str
    x: Tensor
    gradients: bool = False


def require_agreement(module: nn.Module, match: Match) -> None:
    """Raise Unfusable, with the worst difference, unless the wiring computes what the class does.

    The norm of each difference, relative to that of the module's own value, may be sqrt(eps) of the
    module's dtype, or of float32 if that is less. Both sides compute in float64, where no rounding
    moves a pre-activation across the kink of a ReLU; in the module's dtype if its forward does not
    run in float64. The module is not touched, and what its forward does to generators, defaults and
    modes is put back.
    """
    parameter = next(module.parameters())
    judged = min(parameter.dtype, torch.float32, key=lambda dtype: torch.finfo(dtype).eps)
    with (
        put_back(parameter.device),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(parameter.device.type, enabled=False),
    ):
        try:
            try:
                _compare(module, match, torch.float64, math.sqrt(torch.finfo(judged).eps))
            except _DoesNotRun:
                _compare(module, match, parameter.dtype, math.sqrt(torch.finfo(parameter.dtype).eps))
        except Unfusable:
            raise
        except RuntimeError as error:
            # Of a backward, say: one layer's trouble is not the model's.
            raise Unfusable(f"it could not be probed: {error}") from error


class _DoesNotRun(Unfusable):
    """The module's own forward raised."""


def _compare(module: nn.Module, match: Match, dtype: torch.dtype, allowed: float) -> None:
    """Compare both forwards in `dtype`, in train and in eval mode."""
    generator = torch.Generator("cpu").manual_seed(0)
    clone = _random_copy(module, dtype, generator)
    device = next(clone.parameters()).device
    table = match.wiring.table

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    shape = (table.inputs[0].width,) if match.rank == 2 else (table.inputs[0].slots, table.inputs[0].width)
    inputs = [case._replace(x=case.x.to(device, dtype)) for case in _inputs(draw, shape, dtype)]
    fused = _fused(clone, match)
    for training in (True, False):
        clone.train(training)
        for case in inputs:
            worst, name = _difference(clone, fused, case, draw, allowed)
            if worst > allowed:
                where = f"in {'train' if training else 'eval'} mode, on {case.name}"
                difference = f"{name} differs by {worst:.1e} of its norm, allowed {allowed:.1e}"
                raise Unfusable(f"{where}, its forward computes something else: {difference}")


def _fused(module: nn.Module, match: Match) -> Callable[[Tensor], object]:
    """Return what the wiring says that the module computes, as a function of its input."""
    parameters = Parameters(module, match.wiring)
    apart = match.returns is one_per_task

    def forward(x: Tensor) -> object:
        out = fusion_network(x, parameters.tensors(), match.wiring.table, "reference", tasks_apart=apart)
        return out if apart else match.returns(out)

    return forward


def _inputs(draw: Callable[[tuple[int, ...]], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[_Input]:
    """Yield the inputs of the probe, rows of `shape` in float64."""
    rows = len(ROW_SCALES)
    scales = torch.tensor(ROW_SCALES, dtype=torch.float64, device="cpu").view(-1, *[1] * len(shape))
    yield _Input("rows of three sizes", draw((rows, *shape)) * scales, gradients=True)
    yield _Input("rows of three sizes without gradients", draw((rows, *shape)) * scales)
    for count in (1, 9):
        yield _Input(f"a batch of {count}", draw((count, *shape)), gradients=True)
    for scale in LARGE_SCALES:
        # What overflows depends on the order of a sum.
        if scale**2 < torch.finfo(dtype).max:
            yield _Input(f"rows of size {scale:.0e}", draw((rows, *shape)) * scale)
    for value in (math.nan, math.inf, -math.inf):
        x = draw((rows, *shape))
        x[1, ..., 0] = value
        yield _Input(f"a row with {value}", x)


def _difference(
    module: nn.Module,
    fused: Callable[[Tensor], object],
    case: _Input,
    draw: Callable[[tuple[int, ...]], Tensor],
    allowed: float,
) -> tuple[float, str]:
    """Run both forwards on one input.

    Return the largest relative difference in norm, and the name of the value that has it.
    """
    x = case.x.clone().requires_grad_(case.gradients)
    with torch.set_grad_enabled(case.gradients):
        expected = _own_outputs(module, x)
        try:
            got = _outputs(fused(x))
        except (TypeError, ValueError, RuntimeError) as error:
            raise Unfusable(f"its wiring does not run: {error}") from error
    _require_same_structure(expected, got)
    if not case.gradients:
        return _worst(expected, got, allowed)
    upstream = [draw(out.shape).to(x.device, x.dtype) for out in expected.values()]
    d_expected, d_got = _gradients(expected, upstream, x, module), _gradients(got, upstream, x, module)
    return _worst(expected | d_expected, got | d_got, allowed)


def _own_outputs(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Run the forward of the module's class."""
    before = _held(module)
    try:
        with put_back(x.device):
            outputs = type(module).forward(module, x)
    except Exception as error:
        raise _DoesNotRun(f"its forward raised {type(error).__name__} on x {list(x.shape)}: {error}") from error
    after = _held(module)
    written = sorted(name for name in before.keys() | after.keys() if not _unwritten(before.get(name), after.get(name)))
    if written:
        raise Unfusable(f"its forward also writes to {written[0]}")
    if x._version:
        raise Unfusable("its forward also writes to its input")
    return _outputs(outputs)


def _random_copy(module: nn.Module, dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
    """Return a copy of the module in `dtype` with random parameters and no hooks."""
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        # Of the size that keeps outputs near 1: the module's own values may be zeros, under which
        # anything agrees.
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 and parameter.shape[-1] else 0.5
        value = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu") * scale
        memo[id(parameter)] = nn.Parameter(value.to(parameter.device, dtype))
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to(dtype if buffer.is_floating_point() else buffer.dtype, copy=True)
    for inner in module.modules():
        # A hook may be the method of a trainer, which would be copied with it.
        memo.update((id(getattr(inner, kind)), OrderedDict()) for kind in HOOKS)
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:
        raise Unfusable(f"it could not be copied to be probed: {type(error).__name__}: {error}") from error


def _held(module: nn.Module) -> dict[str, tuple[object, int]]:
    """Return the attributes of all modules in the tree, and the items of their plain containers.

    By name, each as (value, version of a tensor).
    """
    seen: set[int] = set()
    return {
        name: (value, _version(value))
        for path, inner in module.named_modules()
        for key, attribute in inner.__dict__.items()
        for name, value in _items(f"{path}.{key}" if path else key, attribute, seen)
    }


def _items(name: str, value, seen: set[int]) -> Iterator[tuple[str, object]]:
    """Yield a value by name, and what is in it if it is a container that was not seen before."""
    yield name, value
    if isinstance(value, (Mapping, list, tuple, set, deque)) and id(value) not in seen:
        seen.add(id(value))
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _items(f"{name}[{key!r}]", item, seen)


def _version(value) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _unwritten(before: tuple[object, int] | None, after: tuple[object, int] | None) -> bool:
    return before is not None and after is not None and before[0] is after[0] and before[1] == after[1]


def _outputs(value) -> dict[str, Tensor]:
    """Return the tensors of an output by name: one tensor, or a list or tuple of them."""
    items = value if isinstance(value, (list, tuple)) else [value]
    if not items or not all(isinstance(item, Tensor) for item in items):
        raise Unfusable(f"its forward returns {type(value).__name__}, expected a tensor or a list of tensors")
    kind = "output" if isinstance(value, Tensor) else type(value).__name__
    return {f"{kind}[{i}]" if kind != "output" else kind: item for i, item in enumerate(items)}


def _require_same_structure(expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    if list(expected) != list(got):
        raise Unfusable(f"its forward returns {', '.join(expected)}, its wiring {', '.join(got)}")
    for name, value in expected.items():
        if value.shape != got[name].shape or value.dtype != got[name].dtype:
            forward, wiring = f"{list(value.shape)} {value.dtype}", f"{list(got[name].shape)} {got[name].dtype}"
            raise Unfusable(f"its forward returns {name} {forward}, its wiring {wiring}")


def _gradients(
    outputs: dict[str, Tensor], upstream: list[Tensor], x: Tensor, module: nn.Module
) -> dict[str, Tensor | None]:
    """Return the gradients of the input and every parameter by name, None where there is none."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    attached = [(out, g) for out, g in zip(outputs.values(), upstream, strict=True) if out.requires_grad]
    if not attached:
        return {"d_x": torch.zeros_like(x)}
    grads = torch.autograd.grad(
        [out for out, _ in attached], [x, *parameters], [g for _, g in attached], allow_unused=True
    )
    return {
        "d_x": torch.zeros_like(x) if grads[0] is None else grads[0],
        **{f"d_{name}": grad for name, grad in zip(names, grads[1:], strict=True)},
    }


def _worst(
    expected: Mapping[str, Tensor | None], got: Mapping[str, Tensor | None], allowed: float
) -> tuple[float, str]:
    """Return the largest relative difference in norm, and the name of the value that has it.

    It is infinity where one side is finite alone.
    """
    norms = {name: _norm(value) for name, value in expected.items() if value is not None}
    # A gradient that is zero but for rounding has no scale of its own.
    floor = allowed * max(norms.values())
    worst = (0.0, "")
    for name, value in expected.items():
        other = got.get(name)
        if value is None or other is None:
            difference = 0.0 if value is other else math.inf
        elif not torch.equal(value.isfinite(), other.isfinite()):
            difference = math.inf
        else:
            difference = _norm(value - other) / max(norms[name], floor, torch.finfo(torch.float64).tiny)
        worst = max(worst, (difference, name))
    return worst


def _norm(value: Tensor) -> float:
    """Return the norm of what is finite."""
    value = value.detach().double()
    return float(value.where(value.isfinite(), 0.0).norm())
