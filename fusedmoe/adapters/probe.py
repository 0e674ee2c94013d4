"""The numerical probe: does a module compute what its wiring says?

Attributes and shapes can agree while the forward does something else. So the forward of the module's class and the fused one run
on a copy with random parameters, in train and in eval mode, and must agree in every output and gradient.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict

import torch
from torch import Tensor, nn

from fusedmoe.adapters.forward import FusedForward, Match
from fusedmoe.nn.binding import HOOKS
from fusedmoe.nn.wiring import Unfusable

# Rows of three sizes, so that a forward that clips, or saturates elsewhere, cannot hide.
ROW_SCALES = (1.0, 8.0, 0.125)


def require_agreement(module: nn.Module, match: Match) -> None:
    """Raise Unfusable, with the name and size of the worst difference, unless the wiring computes what the module's class does.

    The norm of each difference, relative to that of the module's own value, may be sqrt(eps) of the module's dtype, or of float32
    if that is less. Both sides compute in float64, where no rounding moves a pre-activation across the kink of a ReLU; in the
    module's dtype if its forward does not run in float64. Neither the module nor any generator but a private one is touched.
    """
    parameter = next(module.parameters())
    judged = min(parameter.dtype, torch.float32, key=lambda dtype: torch.finfo(dtype).eps)
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(parameter.device.type, enabled=False):
        try:
            _compare(module, match, torch.float64, math.sqrt(torch.finfo(judged).eps))
        except _DoesNotRun:
            _compare(module, match, parameter.dtype, math.sqrt(torch.finfo(parameter.dtype).eps))


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

    scales = torch.tensor(ROW_SCALES, dtype=torch.float64, device="cpu")
    x = draw((len(scales), table.width)) * scales[:, None] if match.rank == 2 else draw((len(scales), table.slots, table.width)) * scales[:, None, None]
    x = x.to(device, dtype).requires_grad_()
    fused = FusedForward(clone, match, "reference")
    for training in (True, False):
        outputs = _own_outputs(clone.train(training), x)
        try:
            ours = _outputs(fused(x))
        except (TypeError, ValueError) as error:
            raise Unfusable(f"its wiring does not run: {error}") from error
        _require_same_structure(outputs, ours)
        upstream = [draw(out.shape).to(device, dtype) for out in outputs.values()]
        expected = {**outputs, **_gradients(outputs, upstream, x, clone)}
        worst, name = _worst(expected, {**ours, **_gradients(ours, upstream, x, clone)}, allowed)
        if worst > allowed:
            mode = "train" if training else "eval"
            raise Unfusable(f"in {mode} mode its forward computes something else: {name} differs by {worst:.1e} of its norm, allowed {allowed:.1e}")


def _own_outputs(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Run the forward of the module's class; whatever random numbers it draws, the global generator keeps its state."""
    before = _attributes(module)
    try:
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
            outputs = type(module).forward(module, x)
    except Exception as error:
        raise _DoesNotRun(f"its forward raised {type(error).__name__} on x {list(x.shape)}: {error}") from error
    written = sorted(_attributes(module) ^ before)
    if written:
        raise Unfusable(f"its forward also writes to {written[0][0]}")
    return _outputs(outputs)


def _random_copy(module: nn.Module, dtype: torch.dtype, generator: torch.Generator) -> nn.Module:
    """Return a copy of the module in `dtype` with random parameters and no hooks."""
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        # Of the size that keeps outputs near 1: the module's own values may be zeros, under which anything agrees.
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


def _attributes(module: nn.Module) -> set[tuple[str, int, int]]:
    """Return what the attributes of all modules in the tree are bound to, how long plain containers are, and the buffers' versions."""
    return {
        (f"{path}.{name}" if path else name, id(value), len(value) if isinstance(value, (list, dict, set)) else 0)
        for path, inner in module.named_modules()
        for name, value in inner.__dict__.items()
    } | {(name, buffer._version, 0) for name, buffer in module.named_buffers()}


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
            raise Unfusable(f"its forward returns {name} {list(value.shape)} {value.dtype}, its wiring {list(got[name].shape)} {got[name].dtype}")


def _gradients(outputs: dict[str, Tensor], upstream: list[Tensor], x: Tensor, module: nn.Module) -> dict[str, Tensor | None]:
    """Return the gradients of the input and every parameter by name, None where there is none."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    attached = [(out, g) for out, g in zip(outputs.values(), upstream, strict=True) if out.requires_grad]
    if not attached:
        return {"d_x": torch.zeros_like(x)}
    grads = torch.autograd.grad([out for out, _ in attached], [x, *parameters], [g for _, g in attached], allow_unused=True)
    return {"d_x": torch.zeros_like(x) if grads[0] is None else grads[0], **{f"d_{name}": grad for name, grad in zip(names, grads[1:], strict=True)}}


def _worst(expected: dict[str, Tensor | None], got: dict[str, Tensor | None], allowed: float) -> tuple[float, str]:
    """Return the largest relative difference in norm, and the name of the value that has it."""
    norms = {name: _norm(value) for name, value in expected.items() if value is not None}
    # A gradient that is zero but for rounding has no scale of its own.
    floor = allowed * max(norms.values())
    worst = (0.0, "")
    for name, value in expected.items():
        other = got.get(name)
        if value is None or other is None:
            difference = 0.0 if value is other else math.inf
        else:
            difference = _norm(value - other) / max(norms[name], floor, torch.finfo(torch.float64).tiny)
        worst = max(worst, (math.inf if math.isnan(difference) else difference, name))
    return worst


def _norm(value: Tensor) -> float:
    return float(value.detach().double().norm())
