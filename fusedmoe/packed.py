"""A frozen network: `freeze_cpu` packs its parameters, `network_cpu_frozen` runs from these."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, library

from fusedmoe import codec
from fusedmoe.backends import BACKENDS, EXTENSION
from fusedmoe.checks import check
from fusedmoe.inputs import join
from fusedmoe.outputs import for_tasks
from fusedmoe.table import Table

DTYPES = ("float32", "float64")


def declines(backend: str, params: Sequence[Tensor]) -> str | None:
    """Return why parameters cannot be packed for a backend ("auto" or a name), or None."""
    if backend not in ("auto", "cpu"):
        return f"expected backend auto or cpu, got {backend}, which has nothing to pack"
    for parameter in params:
        name = str(parameter.dtype).removeprefix("torch.")
        if parameter.device.type == "cpu" and name not in DTYPES:
            return f"expected {' or '.join(DTYPES)}, got {name}"
        reason = next(row for row in BACKENDS if row.name == "cpu").declines(parameter.device, parameter.dtype)
        if reason is not None:
            return reason
    return None


def pack(params: Sequence[Tensor], table: Table) -> Tensor:
    """Return a copy of the parameters as one tensor of their dtype, laid out for `runner`.

    csrc/cpu/packing.h has the layout.

    Raises: RuntimeError for tensors that are not those of `table.parameters` on the CPU, all of one
        dtype, float32 or float64.
    """
    with torch.no_grad():
        return torch.ops.fusedmoe.freeze_cpu.default([parameter.detach() for parameter in params], codec.encode(table))


def runner(table: Table) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of x and packed parameters that computes `fusion_network` of this table.

    It gives the same bits, without gradients. x: as `fusion_network` takes it, without a route,
    of the dtype of the packed tensor; any strides. The function raises RuntimeError for anything
    else. What depends on the table alone is done here, not at every call.
    """
    operator, text, handle = torch.ops.fusedmoe.network_cpu_frozen.default, codec.encode(table), codec.handle(table)

    def run(x: Tensor, packed: Tensor) -> Tensor:
        # What is compiled may run in another process, which does not know the handle.
        return operator(x, packed, text if torch.compiler.is_compiling() else handle)

    if len(table.inputs) > 1:
        return lambda x, packed: for_tasks(run(join(x, table), packed), table)
    if table.graph.tasks in ((), tuple((u,) for u in range(table.output[0]))):
        # What the operator returns is what callers see.
        return run
    return lambda x, packed: for_tasks(run(x, packed), table)


def _fake_pack(params, table_text):
    from fusedmoe import _C

    return params[0].new_empty(_C.packed_size(table_text))


def _fake_run(x, packed, table_text):
    table = codec.decode(table_text)
    slots = x if x.dim() == 3 else x.unsqueeze(1)
    check(slots, [packed.new_empty(p.shape) for p in table.parameters], table)
    return x.new_empty(x.shape[0], *table.output)


if EXTENSION is not None:
    library.register_fake("fusedmoe::freeze_cpu", _fake_pack)
    library.register_fake("fusedmoe::network_cpu_frozen", _fake_run)
