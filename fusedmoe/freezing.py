"""Freeze the layers of a model for serving: calls read parameters that were packed once."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fusedmoe.packed import declines
from fusedmoe.swap import Entry, Finding, require_module, walk


@dataclass(frozen=True)
class FreezeReport:
    """What `freeze` did: layers that are frozen now, and those it left alone, with the reasons.

    True if any layer is frozen.
    """

    frozen: tuple[Entry, ...] = ()
    declined: tuple[Entry, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.frozen)

    def __str__(self) -> str:
        if not (self.frozen or self.declined):
            return "frozen: 0; no layer of this model was recognised"
        lines = [f"frozen: {len(self.frozen)}", *(f"  {entry}" for entry in self.frozen)]
        if self.declined:
            lines += [f"declined: {len(self.declined)}", *(f"  {entry}" for entry in self.declined)]
        return "\n".join(lines)


def freeze(model: nn.Module) -> FreezeReport:
    """Pack the parameters of every fused layer of `model` once, which speeds up small batches.

    The results stay the same bits.

    Args:
        model: a model whose layers `fuse` fused, or that has modules of `fusedmoe.nn`, in
            evaluation mode. Give the whole model: a layer alone does not show whether FSDP manages
            its parameters.

    A frozen layer takes as much memory again as its parameters. It raises RuntimeError where it is
    called in training mode, with gradients wanted, or under autocast.

    A changed parameter (in place, by an optimizer, `load_state_dict`, `to`, `half`, a replaced
    `Parameter`) unfreezes the layer at the next call that it does not refuse, with a warning, before
    anything is computed. Writes that PyTorch does not count (through `.data`, a NumPy view, from
    another process) are noticed only if they change the middle element of a parameter; after others
    call `freeze` again.

    Code compiled by torch.compile refuses the same calls and otherwise reads the live parameters,
    so it is never outdated. (torch 2.11 does not notice if `requires_grad` of a
    parameter is set after compiling; this holds for every module.) An exported program is not frozen, nor are
    copies and pickles. Threads may call a model while another freezes or unfreezes it.

    Returns: the report. What could not be frozen runs as before, and stands in `declined` with the
        reason.

    Raises: TypeError if `model` is no module; ValueError, naming the layer, if a fused layer is in
        training mode. Nothing is frozen then.
    """
    require_module(model, "freeze")
    findings = list(walk(model, "", set()))
    for finding in findings:
        if finding.binding and finding.module.training:
            got = f"{finding.entry.place} in training mode; call model.eval() before"
            raise ValueError(f"freeze: expected a model in evaluation mode, got {got}")
    sharded = _sharded(model)
    frozen, declined = [], []
    for finding in findings:
        reason = finding.entry.reason or sharded or _obstacle(finding)
        if reason:
            declined.append(replace(finding.entry, reason=reason))
        else:
            assert finding.binding is not None
            finding.binding.freeze(finding.entry.backend)
            frozen.append(finding.entry)
    return FreezeReport(tuple(frozen), tuple(declined))


def unfreeze(model: nn.Module) -> None:
    """Drop the packed parameters of every layer of `model` that `freeze` froze.

    A model without such layers is left alone.

    Raises: TypeError if `model` is no module.
    """
    require_module(model, "unfreeze")
    for finding in walk(model, "", set()):
        if finding.binding:
            finding.binding.frozen = None


def _obstacle(finding: Finding) -> str | None:
    """Return why a layer cannot be frozen, or None."""
    if finding.binding is None:
        return "it is not fused; fusedmoe.fuse(model) before"
    for key, parameter in zip(finding.binding.parameters.keys, finding.binding.tensors(), strict=True):
        if type(parameter) not in (nn.Parameter, Tensor):
            return f"{key}: expected an ordinary parameter, got {type(parameter).__name__}"
        if parameter.is_inference():
            return f"{key}: was made in inference mode, where PyTorch counts no changes; build the model outside it"
    return declines(finding.entry.backend, finding.binding.tensors())


def _sharded(model: nn.Module) -> str | None:
    """Return why nothing of a model under FSDP can be frozen, or None.

    FSDP gathers parameters into memory of the same address and version again and again while their
    values change.
    """
    # A model can be under FSDP only if somebody imported it, which takes long.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    kinds = tuple(kind for name in ("FSDPModule", "FullyShardedDataParallel") if (kind := getattr(fsdp, name, None)))
    if any(isinstance(module, kinds) for module in model.modules()):
        return "the model is under FSDP, where a changed parameter cannot be told from an unchanged one"
    return None


__all__ = ["FreezeReport", "freeze", "unfreeze"]
