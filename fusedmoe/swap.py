"""Swap the layers of a model for one call of the operator each: in place, per instance, reversible.

`fuse` sets one attribute, `forward`, on the instance of a layer; `nn.Module.__call__` finds it
before the method of the class. Class, module tree, parameters, buffers, hooks and `state_dict` stay
what they were, and `unfuse` deletes the attribute. If another library has wrapped that
forward since, the layer still counts as fused and is left as it is; `unfuse` then makes our forward
call the class's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from fusedmoe.adapters import (
    FusedForward,
    Recognised,
    Unfusable,
    installed,
    on_instance,
    recognise,
    register_adapter,
    runs_the_class,
)
from fusedmoe.backends import candidates, choose, require
from fusedmoe.kernels.launchers import LAUNCHERS
from fusedmoe.nn.binding import Binding
from fusedmoe.nn.describe import describe_table
from fusedmoe.nn.fused import Fused
from fusedmoe.table import Table
from fusedmoe.validation import require_flag


@dataclass(frozen=True)
class Entry:
    """One module of a model: its place, its family, and the backend or why there is none."""

    path: str
    module: str
    family: str = ""
    backend: str = ""
    reason: str = ""

    @property
    def place(self) -> str:
        return f"{self.path or '(the model itself)'}: {self.module}"

    def __str__(self) -> str:
        found = self.place
        if self.reason:
            return f"{found}: {self.reason}"
        return f"{found} as {self.family}, backend {self.backend}"


@dataclass(frozen=True)
class FuseReport:
    """What `fuse` did: the layers it fused, those that were fused already, and what it left alone,
    with the reasons.

    True if anything was fused by this call.
    """

    fused: tuple[Entry, ...] = ()
    declined: tuple[Entry, ...] = ()
    already: tuple[Entry, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.fused)

    def __str__(self) -> str:
        if not (self.fused or self.declined or self.already):
            return "fused: 0; no layer of this model was recognised, fusedmoe.register_adapter can teach one"
        lines = [f"fused: {len(self.fused)}", *(f"  {entry}" for entry in self.fused)]
        for word, entries in (("fused already", self.already), ("declined", self.declined)):
            if entries:
                lines += [f"{word}: {len(entries)}", *(f"  {entry}" for entry in entries)]
        return "\n".join(lines)


@dataclass(frozen=True)
class Finding:
    """A module that somebody recognised, or came near to.

    One of `binding` (fused), `fusable` and `entry.reason` (declined) says which.
    """

    entry: Entry
    module: nn.Module
    binding: Binding | None = None
    fusable: Recognised | None = None

    @property
    def frozen(self) -> bool:
        """Whether `freeze` froze the module and no parameter has changed since."""
        frozen = self.binding.frozen if self.binding else None
        return frozen is not None and frozen.holds()


def fuse(model: nn.Module, backend: str = "auto", recompute: bool = False) -> FuseReport:
    """Let every layer of `model` that is recognised run as one call of the operator, in place.

    Args:
        model: any module; it may be a layer itself. Layers are found by the names of their
            attributes and submodules, outermost first, and each is probed numerically on a copy
            before it is trusted. A layer whose inside was changed after it was fused is examined
            again.
        backend: "auto" chooses a backend at every call. A layer that only the reference could run
            is not fused, because that is slower than the layer itself. A name runs that backend or
            raises.
        recompute: keep for backward only the outputs of levels and of softmaxes
            (docs/speed.md has the bytes), and run experts and towers once more in backward. The
            results are the same bits. This does not change layers that are already fused; call
            `unfuse` first.

    Returns: the report. What could not be fused exactly runs as before, and stands in `declined`
    with the reason.

    Raises: TypeError if `model` is no module or `recompute` no bool, ValueError for an unknown
        backend, RuntimeError with the reason for one that cannot run here, or not with the dtype
        and device of a layer. The model is then as it was.
    """
    require_module(model, "fuse")
    require(backend)
    require_flag(recompute, "recompute")
    before = [(module, module.__dict__["forward"], forward, forward.retired) for module, forward in _ours(model)]
    try:
        for module, _, forward, _ in before:
            if runs_the_class(module) or forward.binding.changed():
                _take_out(module, forward)
        findings = [_with_backend(finding, backend) for finding in walk(model, "", set())]
        fusable = [(finding.module, finding.fusable) for finding in findings if finding.fusable]
        planned = [(module, _forward(module, recognised, backend, recompute)) for module, recognised in fusable]
    except BaseException:
        for module, own, forward, retired in before:
            module.__dict__["forward"] = own
            forward.retired = retired
        raise
    for module, forward in planned:
        module.__dict__["forward"] = forward
    return FuseReport(
        tuple(finding.entry for finding in findings if finding.fusable),
        tuple(finding.entry for finding in findings if finding.entry.reason),
        tuple(finding.entry for finding in findings if finding.binding and not finding.entry.reason),
    )


def unfuse(model: nn.Module) -> None:
    """Restore the class's forward on every layer of `model` that `fuse` fused; the model is then bit
    for bit what it was.

    Modules of `fusedmoe.nn` have no other forward and stay. A model without fused layers is left
    alone.

    Raises: TypeError if `model` is no module.
    """
    require_module(model, "unfuse")
    while ours := _ours(model):
        for module, forward in ours:
            _take_out(module, forward)


def describe(model: nn.Module) -> str:
    """Describe every layer found in `model`, fused or not, in text.

    For each layer: experts, slots, units and what they see, gates, static weights, widths,
    parameters and FLOPs. For a fused layer also its backend, and whether it is frozen. For a layer
    on triton or cuda also how many launches it is, and whether these kernels have ever run on the
    device's architecture. The model is not changed.

    Raises: TypeError if `model` is no module.
    """
    require_module(model, "describe")
    texts = []
    for finding in walk(model, "", set()):
        binding = finding.binding or (finding.fusable.binding if finding.fusable else None)
        table = binding.table if binding else None
        lines = [*describe_table(table).splitlines(), *_launches(finding, table)] if table else []
        state = ", frozen" if finding.frozen and not finding.entry.reason else ""
        entry = _with_backend(finding, finding.entry.backend).entry
        texts.append("\n".join([f"{entry}{state}", *(f"  {line}" for line in lines)]))
    nothing = "no layer of this model was recognised; fusedmoe.register_adapter can teach one"
    return "\n".join(texts) or nothing


def _launches(finding: Finding, table: Table) -> list[str]:
    """What the kernels of a GPU backend launch for a module that they run, or would once it is
    fused.
    """
    parameter = next(finding.module.parameters())
    try:
        chosen = choose(finding.entry.backend if finding.binding else "auto", parameter.device, parameter.dtype)
    except RuntimeError:
        return []
    if chosen not in LAUNCHERS:
        return []
    # Here, because it may import Triton.
    from fusedmoe.kernels.describe import describe_launches

    try:
        return describe_launches(table, parameter.dtype, parameter.device, chosen).splitlines()
    except ValueError as error:
        return [str(error)]


def _with_backend(finding: Finding, backend: str) -> Finding:
    """Say in the entry which backend runs the module: the one that it has, or `backend` for one
    that is to be fused.
    """
    entry = finding.entry
    if entry.reason or not (finding.fusable or finding.binding):
        return finding
    name = backend if finding.fusable else entry.backend
    if name != "auto":
        return replace(finding, entry=replace(entry, backend=name))
    parameter = next(finding.module.parameters())
    chosen = choose("auto", parameter.device, parameter.dtype)
    if chosen != "reference":
        return replace(finding, entry=replace(entry, backend=f"auto ({chosen})"))
    rest = [row for row in candidates(parameter.device) if row.name != "reference"]
    faster = "; ".join(f"{row.name}: {row.declines(parameter.device, parameter.dtype)}" for row in rest)
    if finding.binding:
        return replace(finding, entry=replace(entry, backend=f"auto (reference: {faster})"))
    reason = f"only the reference could run it, slower than the layer itself ({faster})"
    reason += '; backend="reference" asks for that'
    return replace(finding, entry=replace(entry, reason=reason), fusable=None)


def _forward(module: nn.Module, found: Recognised, backend: str, recompute: bool) -> FusedForward:
    """Return the forward for a module.

    Raises: RuntimeError if the backend asked for cannot serve its parameters.
    """
    parameter = next(module.parameters())
    choose(backend, parameter.device, parameter.dtype)
    return FusedForward(found, backend, recompute)


def walk(module: nn.Module, path: str, seen: set[int]) -> Iterator[Finding]:
    """Yield what is found in a tree, outermost first; a module that stands at two paths once."""
    if id(module) in seen:
        return
    seen.add(id(module))
    finding = _find(module, path)
    if finding:
        yield finding
        if finding.binding or finding.fusable or _wrapper(module):
            return
    for name, child in module._modules.items():
        if child is not None:
            yield from walk(child, f"{path}.{name}" if path else name, seen)


def _find(module: nn.Module, path: str) -> Finding | None:
    """Return what one module is: fused, fusable, declined with a reason, or None."""
    entry = Entry(path, type(module).__name__)
    reason = _wrapper(module)
    if reason:
        return Finding(replace(entry, reason=reason), module)
    try:
        fused = _fused(module)
        if fused:
            family, backend, binding = fused
            change = binding.changed()
            reason = f"was changed inside after it was fused. {change}" if change else ""
            return Finding(replace(entry, family=family, backend=backend, reason=reason), module, binding)
        found = recognise(module)
    except Unfusable as error:
        return Finding(replace(entry, reason=str(error)), module)
    if found is None:
        return None
    return Finding(replace(entry, family=found.match.family, backend="none (not fused)"), module, fusable=found)


def _fused(module: nn.Module) -> tuple[str, str, Binding] | None:
    """Return (family, backend, binding) of a module that `fuse` fused, or that is one of
    `fusedmoe.nn`.
    """
    forward = installed(module)
    if forward:
        return forward.family, forward.backend, forward.binding
    return (type(module).make_wiring.__name__, module.backend, module.bind()) if isinstance(module, Fused) else None


def _wrapper(module: nn.Module) -> str:
    """Return why nothing below a wrapper of PyTorch's can be fused; empty for other modules."""
    if isinstance(module, nn.DataParallel):
        reason = "it copies its modules to every device in each call"
        return f"{reason}; fused layers would read the first device's parameters. Use DistributedDataParallel"
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript; fuse the model before"
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        return "it is compiled by torch.compile; fuse the model before"
    return ""


def _ours(model: nn.Module) -> list[tuple[nn.Module, FusedForward]]:
    """Return the modules that have a forward of ours, in use or not, and that."""
    return [(module, forward) for module in model.modules() if (forward := on_instance(module) or installed(module))]


def _take_out(module: nn.Module, forward: FusedForward) -> None:
    """Give a module the forward of its class back; what others set around ours stays, and runs
    that.
    """
    # A shallow copy has the forward of its original.
    forward.retired = forward.retired or forward.binding.binds(module)
    if on_instance(module) is forward:
        del module.__dict__["forward"]


def require_module(model: object, function: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected an nn.Module, got {type(model).__name__}")


__all__ = ["Entry", "Finding", "FuseReport", "describe", "fuse", "register_adapter", "require_module", "unfuse", "walk"]
