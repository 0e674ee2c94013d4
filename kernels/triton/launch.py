"""Launches of Triton's kernels; the names are those of `launchers.py`.

Triton launches the first call of each kind: it looks at every argument and option for the kernel
that it compiled for their like. The calls that follow are one operator in C++ (csrc/triton.cpp),
which launches the compiled kernels as Triton does; `bench/gpu_host.py` times both.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from triton import knobs

from fusedmoe.kernels import device
from fusedmoe.kernels.bound import (
    Backward,
    Bound,
    Forward,
    alignment,
    call_fields,
    check,
    chunk_of,
    rowwise_alignment,
    split,
    store,
)
from fusedmoe.kernels.tiles import power_of_two
from fusedmoe.kernels.triton.arguments import (
    ForwardArguments,
    GradientsArguments,
    RowsArguments,
    RowwiseArguments,
    RowwiseBackwardArguments,
    SumArguments,
)
from fusedmoe.kernels.triton.step import CURED, OPTIONS, VERSION, Step, constants, fixed_options, function_of
from fusedmoe.kernels.writer import Launch
from fusedmoe.storage import require_memory

ADD_BLOCK = 1024


class Quick(NamedTuple):
    """The extension's record of a call whose kernels are known, and its address, which the
    operators take."""

    record: object
    address: int


def watched() -> bool:
    """Whether somebody has asked Triton to be told of launches, as its profiler does."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


@functools.cache
def _extension():
    try:
        from fusedmoe import _C
    except ImportError:
        return None
    return _C


@functools.cache
def _operator(name: str):
    return getattr(torch.ops.fusedmoe, name).default


def _step(step: Step) -> object | None:
    """The extension's record of a launch, or None where only Triton may launch it."""
    found = function_of(step.compiled)
    if found is None:
        return None
    record = _extension().Step()
    record.function, record.threads, record.shared_bytes = found
    record.place, record.programs, record.rowwise = step.place, step.programs, step.rowwise
    return record


def _keep(bound: Bound, key: object, steps: Sequence[Step], **values: object) -> None:
    """Remember how the operator launches what Triton has launched. values: of the extension's
    record of the call."""
    if _extension() is None or any(step.compiled is None for step in steps):
        return
    found = _extension().Bound()
    named = {name: _step(value) if isinstance(value, Step) else value for name, value in values.items()}
    named["steps"] = [_step(step) for step in steps]
    if None not in named["steps"] and None not in named.values():
        for name, value in {**call_fields(bound), **named}.items():
            setattr(found, name, value)
        bound.made[key] = Quick(found, found.address)


def _known(bound: Bound, key: object) -> Quick | None:
    """What `_keep` has remembered, unless Triton is to launch."""
    found = bound.made.get(key)
    return None if found is None or watched() else found


def _addresses(bound: Bound, params: Sequence[Tensor], quick: Quick | None) -> tuple[Tensor, bool]:
    """The parameters' addresses on the device, as `device.addresses`; the operator is told of
    those that stay."""
    addresses, aligned16 = device.addresses(params, bound.key.device)
    if quick is not None and device.stays(params, bound.key.device):
        _operator("network_triton_addresses")(addresses, params, quick.address)
    return addresses, aligned16


def region(memory: Tensor, first: int, size: int, dtype: torch.dtype) -> Tensor:
    """So many numbers of a piece of memory, from a byte on."""
    return memory[first : first + size * dtype.itemsize].view(dtype)


def _shared(bound: Bound, align: int) -> dict[str, object]:
    return {
        "READS": bound.tiles.reads,
        "ACTS": bound.codes,
        **constants(bound.tiles, align, bound.key.precision, bound.key.arch),
    }


def _rowwise(bound: Bound, align: int, weights: bool, seeded: bool) -> dict[str, object]:
    """What launches of row-wise operations are compiled with."""
    rows, columns = bound.rowwise
    return {
        "ACTS": bound.rowwise_codes,
        "DROPS": seeded and bound.program.drops,
        "WEIGHTS": weights,
        "ALIGN": rowwise_alignment(bound.program, align),
        "READS": power_of_two(bound.program.mixes, 16),
        **{"BLOCK_B": rows, "BLOCK_H": columns, "num_warps": 4},
        **fixed_options(bound.key.arch),
    }


def _ahead(bound: Forward) -> int:
    """Pipeline stages over experts that share a source. Triton 3.6 crashes on sm_90 where such a
    loop computes one product an iteration, of a source that is kept as one tile (`PassManager::run
    failed`; 3.9 does not): there the loop is not pipelined.
    """
    one_tile = 0 < bound.tiles.resident <= bound.tiles.reduction
    return 1 if one_tile and bound.key.arch == "sm_90" and VERSION < CURED else bound.tiles.ahead


def _forward_steps(bound: Forward, align: int, mixing: bool, seeded: bool) -> list[Step]:
    key = align, mixing, seeded
    if key not in bound.made:
        more = {
            "UNITS": bound.plan.units,
            "WEIGHTS": mixing,
            "HIDDEN": bound.program.hidden,
            "COPIES": bound.program.copies,
            "RESIDENT": bound.tiles.resident,
        }
        more = {**_shared(bound, align), **more, "AHEAD": _ahead(bound)}
        rowwise = _rowwise(bound, align, mixing, seeded)
        bound.made[key] = _steps(bound, bound.plan.launches, ("forward", "rowwise_forward"), (more, rowwise), align)
    return bound.made[key]


def _steps(
    bound: Bound,
    launches: Sequence[Launch],
    names: tuple[str, str],
    fixed: tuple[dict[str, object], dict[str, object]],
    align: int,
) -> list[Step]:
    """A step for each launch over rows. names, fixed: the kernel's name and constants, and those of
    row-wise operations."""
    found = []
    for launch in launches:
        own = {} if launch.rowwise else {"STORE": store(bound.program, launch.segments, align)}
        constants = {**fixed[launch.rowwise], **own}
        found.append(Step(names[launch.rowwise], launch.place, launch.programs, constants))
    return found


def forward(
    bound: Forward, x: Tensor, params: Sequence[Tensor], mixing: bool, seed: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Run a bound forward: out, the mixing weights or None, and what it leaves for the backward."""
    key, asked = (mixing, seed is not None), (mixing, seed)
    quick = _known(bound, key)
    if quick is None:
        check(x, params, bound.program.table)
    else:
        found = _run(bound, x, params, quick, asked, None)
        if found:
            return found
    params = [p.contiguous() for p in params]
    addresses, aligned16 = _addresses(bound, params, quick)
    found = _run(bound, x, params, quick, asked, addresses) if quick is not None else None
    if found:
        return found
    align = alignment(x, aligned16, bound.program)
    steps, rows = _forward_steps(bound, align, *key), x.shape[0]
    out, weights, memory = _launched(bound, x, steps, asked, addresses)
    if rows:
        compiled = {"aligned": align > 1, "weights": mixing, "seeded": seed is not None}
        _keep(bound, key, steps, softmax=bound.plan.softmax, **compiled)
    return out, weights, memory


def _run(
    bound: Forward,
    x: Tensor,
    params: Sequence[Tensor],
    quick: Quick,
    asked: tuple[bool, Tensor | None],
    addresses: Tensor | None,
):
    """As `forward`, in C++; None where that is not for these tensors. asked: for the mixing weights, and
    the seed."""
    mixing, seed = asked
    try:
        found = _operator("network_triton")(x, params, quick.address, mixing, seed, addresses)
    except RuntimeError:
        device.room(x, bound.needs(x.shape[0]))
        raise
    return (found[0], found[2] if mixing else None, found[1]) if found else None


def _launched(
    bound: Forward, x: Tensor, steps: list[Step], asked: tuple[bool, Tensor | None], addresses: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `_run`, by Triton's launches."""
    (mixing, seed), rows, (x_row, x_slot, _) = asked, x.shape[0], x.stride()
    first_buffer, size = bound.saved(rows)
    out, memory = x.new_empty((rows, *bound.output)), x.new_empty(size, dtype=torch.uint8)
    weights = x.new_zeros(rows, bound.mixing) if mixing else None
    p = region(memory, 0, bound.plan.softmax * rows, torch.float32)
    buffers = region(memory, first_buffer, bound.program.buffer_width * rows, x.dtype)
    shared = {
        **{"x": x, "buffers": buffers, "out": out, "p": p, "weights": x if weights is None else weights},
        **{"addresses": addresses, "plan": bound.ints, "floats": bound.floats, "B": rows},
        **{"x_row": x_row, "x_slot": x_slot, "mixing": bound.mixing},
    }
    for step in steps if rows else ():
        arguments = (
            RowwiseArguments(**shared, place=step.place, seed=bound.ints if seed is None else seed)
            if step.rowwise
            else ForwardArguments(**shared, place=step.place)
        )
        step.launch(bound.blocks(rows, step.rowwise), step.programs, arguments)
    return out, weights, memory


class _BackwardSteps(NamedTuple):
    """The launches over rows; and the two for the parameters, or none."""

    rows: list[Step]
    gradients: Step | None
    add: Step | None


def _backward_steps(bound: Backward, align: int, given: bool, chunk: int, seeded: bool) -> _BackwardSteps:
    key = align, given, chunk, seeded
    if key not in bound.made:
        shared, plan = {**_shared(bound, align), "WEIGHTS": given}, bound.plan
        fixed = shared, _rowwise(bound, align, given, seeded)
        rows = _steps(bound, plan.launches, ("backward_rows", "rowwise_backward"), fixed, align)
        of_parameters = {**shared, "CHUNK": chunk, "BLOCK_N": bound.tiles.outputs, "SHARED": bound.program.shared}
        for name in ("READS", "ACTS", "BLOCK_B"):
            del of_parameters[name]
        added = {"BLOCK": ADD_BLOCK, "num_warps": 4, **OPTIONS}
        two = (
            Step("gradients", plan.place, plan.tasks, of_parameters),
            Step("add_chunks", 0, -(-bound.total // ADD_BLOCK), added),
        )
        bound.made[key] = _BackwardSteps(rows, *(two if bound.total else (None, None)))
    return bound.made[key]


def backward(
    bound: Backward,
    d_out: Tensor,
    d_weights: Tensor | None,
    x: Tensor,
    params: Sequence[Tensor],
    memory: Tensor,
    seed: Tensor | None,
    apart: bool,
) -> list[Tensor]:
    """Run a bound backward: d_x, and the gradients of all live parameters, apart or one after
    another in one tensor."""
    given, chunk = d_weights is not None, chunk_of(x.shape[0])
    key = given, chunk, seed is not None
    quick = _known(bound, key)
    tensors = (d_out, d_weights, x, params, memory, seed)
    found = quick and _run_backward(bound, tensors, quick, chunk, apart, None)
    if found:
        return found
    check(x, params, bound.program.table)
    for name, tensor in (("d_out", d_out), ("d_weights", d_weights), ("saved", memory)):
        if tensor is not None:
            require_memory(tensor, name)
    params = [p.contiguous() for p in params]
    addresses, aligned16 = _addresses(bound, params, quick)
    tensors = (d_out, d_weights, x, params, memory, seed)
    found = quick and _run_backward(bound, tensors, quick, chunk, apart, addresses)
    if found:
        return found
    align = alignment(x, aligned16, bound.program)
    steps = _backward_steps(bound, align, *key)
    # Rows of the output are read in vectors of 16 bytes, where their distance allows it; what a
    # hook has put aside may lie anywhere.
    d_out, d_weights, memory = (
        t
        if t is None or (t.is_contiguous() and t.data_ptr() % 16 == 0)
        else t.clone(memory_format=torch.contiguous_format)
        for t in (d_out, d_weights, memory)
    )
    d_x, flat = _launched_backward(bound, (d_out, d_weights, x, memory, addresses, seed), steps, chunk)
    if x.shape[0] and steps.gradients:
        more = {
            "columns": bound.plan.columns,
            "sums": bound.plan.rows,
            "total": bound.total,
            "grads": bound.program.gradients[0],
        }
        more |= {"softmax": bound.forward.softmax, "gradients": steps.gradients, "add": steps.add}
        _keep(bound, key, steps.rows, aligned=align > 1, weights=given, seeded=seed is not None, **more)
    return [d_x, *split(flat, bound.program)] if apart else [d_x, flat]


def _run_backward(
    bound: Backward, tensors: tuple, quick: Quick, chunk: int, apart: bool, addresses: Tensor | None
) -> list[Tensor]:
    """As `backward`, in C++; nothing where that is not for these tensors."""
    try:
        *given, seed = tensors
        return _operator("network_triton_backward")(*given, quick.address, chunk, apart, seed, addresses)
    except RuntimeError:
        x = tensors[2]
        device.room(x, bound.needs(x.shape[0], chunk))
        raise


def _launched_backward(bound: Backward, tensors: tuple, steps: _BackwardSteps, chunk: int) -> tuple[Tensor, Tensor]:
    """d_x and the gradients one after another, by Triton's launches."""
    d_out, d_weights, x, memory, addresses, seed = tensors
    rows, (x_row, x_slot, _), total = x.shape[0], x.stride(), bound.total
    d_x = x.new_empty(x.shape)
    if not rows:
        return d_x, x.new_zeros(total)
    flat, chunks = x.new_empty(total), -(-rows // chunk)
    places = bound.scratch(rows, chunks)
    scratch = x.new_empty(places.size, dtype=torch.uint8)
    buffer_size, weights = bound.program.buffer_width * rows, d_out if d_weights is None else d_weights
    p = region(memory, 0, bound.forward.softmax * rows, torch.float32)
    buffers = region(memory, bound.saved(rows)[0], buffer_size, x.dtype)
    dw = region(scratch, 0, bound.plan.rows * rows, torch.float32)
    parts = region(scratch, places.parts, chunks * total, torch.float32)
    dz = region(scratch, places.dz, rows * bound.plan.columns, x.dtype)
    d_buffers = region(scratch, places.buffers, buffer_size, x.dtype)
    shared = {
        **{"x": x, "buffers": buffers, "out": d_out, "dw": dw, "d_weights": weights, "plan": bound.ints},
        **{"B": rows, "x_row": x_row, "x_slot": x_slot, "mixing": bound.mixing},
    }
    of_rows = {
        **{"p": p, "d_x": d_x, "d_buffers": d_buffers, "d_out": d_out, "addresses": addresses},
        **{"floats": bound.floats, "d_row": d_x.stride(0), "d_slot": d_x.stride(1), **shared},
    }
    of_linears = {"dz": dz, "dz_row": bound.plan.columns}
    for step in steps.rows:
        arguments = (
            RowwiseBackwardArguments(**of_rows, place=step.place, seed=bound.ints if seed is None else seed)
            if step.rowwise
            else RowsArguments(**of_rows, **of_linears, place=step.place)
        )
        step.launch(bound.blocks(rows, step.rowwise), step.programs, arguments)
    if steps.gradients:
        arguments = GradientsArguments(**shared, **of_linears, parts=parts, place=steps.gradients.place, total=total)
        steps.gradients.launch(steps.gradients.programs, chunks, arguments)
        steps.add.launch(steps.add.programs, 1, SumArguments(parts, flat, total, chunks))
    return d_x, flat
