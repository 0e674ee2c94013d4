"""A small parity check before the first use on a device: kernels that nobody has run there raise,
with the figure, and never train on.

FUSEDMOE_SELF_TEST=0 turns it off.
"""

from __future__ import annotations

import functools
import os
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from fusedmoe.activation import Activation
from fusedmoe.dtype import row
from fusedmoe.families import adatt_sp, mmoe
from fusedmoe.kernels import network
from fusedmoe.kernels.device import architecture, before_capture
from fusedmoe.kernels.tiles import MANY_ROWS, WHOLE_ROWS
from fusedmoe.parts import Attention, Expert, Gate, Input, LayerNorm, Level, Linear, Source, Static, Unit
from fusedmoe.reference import operator as reference
from fusedmoe.table import Table

# What someone has run with `make gpu` and sent the result of: (backend, name of the architecture)
# -> where it stands. None so far.
KNOWN: dict[tuple[str, str], str] = {}
# One launch for all segments, a launch a level, and tiles of the most rows.
ROWS = (40, WHOLE_ROWS + 44, MANY_ROWS)


def tables(rowwise: bool = False) -> list[Table]:
    """A network of two levels with static weights, hidden layers and towers, and one whose gates
    read the root; or one of row-wise operations of every kind. Smooth, so that no row is near a kink."""
    if rowwise:
        x, experts = Source("slot"), (Source("expert", 0), Source("expert", 1))
        mlps = Expert((x,), (Linear(40), LayerNorm(), Activation("silu"))), Expert((replace(x, first=1, width=40),))
        units = (
            Unit(Attention((experts[0],), ((experts[0],), (experts[1],)), (0, 1), 0.2)),
            Unit(Gate((), (0, 1)), Static((1,), tensor=0, channels=True)),
            Unit(product=(0, 1)),
        )
        return [Table((Input(1, 41),), (Level(mlps, units),), (), ((40,),))]
    return [
        adatt_sp(40, [[32, 24], [17]], 3, 2, activation="silu", towers=(8, 1)),
        mmoe(33, [[48]], 2, 3, activation="tanh"),
    ]


def results(x: Tensor, params: list[Tensor], d_out: Tensor, table: Table, compute) -> list[Tensor]:
    """Output, d_x and the gradients of all parameters in one piece, as float64 on the CPU.

    In one piece: that of a gate's bias is a sum that cancels to three numbers, and how far two
    right kernels differ in it is a matter of luck.
    """
    out, d_x, d_params = compute(x, params, d_out, table)
    return [t.double().cpu() for t in (out, d_x, torch.cat([d.flatten() for d in d_params if d is not None]))]


def ours(x: Tensor, params: list[Tensor], d_out: Tensor, table: Table, backend: str):
    """Return out, d_x and the parameters' gradients by the kernels of a backend."""
    out, _, saved = network.forward(x, params, table, mixing=False, training=True, backend=backend)
    return out, *network.backward(d_out, None, x, params, saved, table, backend=backend)


def plain(x: Tensor, params: list[Tensor], d_out: Tensor, table: Table):
    """Return the same by plain PyTorch."""
    out, _ = reference.forward(x, params, table)
    return out, *reference.backward(x, params, table, d_out, (None,) * len(table.levels))


def worst(device: torch.device, dtype: torch.dtype, table: Table, rows: int, backend: str) -> float:
    """Return the largest error of the kernels over the allowed one: 2 x that of plain PyTorch on
    the same device + 8 roundoffs of the largest number.

    Plain PyTorch may err there as its settings let it, by tf32 for one, but no more than twice as
    far as in bfloat16 on the host: on a device that computes nothing it would allow the kernels
    that same nothing.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    x, d_out = draw(rows, table.graph.inputs[0].slots, table.graph.inputs[0].width), draw(rows, *table.output)
    params = [draw(*p.shape) / max(p.shape[-1:] or (1,)) ** 0.5 for p in table.parameters]

    def on_host(precision: torch.dtype) -> list[Tensor]:
        return results(x.to(precision), [p.to(precision) for p in params], d_out.to(precision), table, plain)

    there = [x.to(device), [p.to(device) for p in params], d_out.to(device)]
    values, simple = results(*there, table, functools.partial(ours, backend=backend)), results(*there, table, plain)
    ratios = []
    for value, other, coarse, exact in zip(
        values, simple, on_host(torch.bfloat16), on_host(torch.float64), strict=True
    ):
        plain_error = min(float((other - exact).abs().max()), 2 * float((coarse - exact).abs().max()))
        allowed = 2 * plain_error + 8 * row(dtype).roundoff * float(exact.abs().max())
        ratio = float((value - exact).abs().max()) / allowed
        ratios.append(ratio if ratio == ratio else float("inf"))
    return max(ratios)


@functools.cache
def check(device: torch.device, dtype: torch.dtype, backend: str, rowwise: bool = False) -> None:
    """Check the kernels of a backend on a device and dtype, those of linears and units or those of
    row-wise operations, the first time that they are asked for in this process.

    Raises: RuntimeError if they differ from the reference by more than rounding, or in the capture
    of a CUDA graph.
    """
    if os.environ.get("FUSEDMOE_SELF_TEST") == "0":
        return
    before_capture(device)
    with torch.no_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        found = max(worst(device, dtype, table, rows, backend) for table in tables(rowwise) for rows in ROWS)
    if found > 1.0:
        raise RuntimeError(
            f"backend {backend} on {name_of(device)} ({history(device, backend)}), {dtype}: expected the "
            f"reference's output and gradients up to rounding, "
            f'got {found:.3g} times the error allowed; use backend="reference", and please '
            "report it (FUSEDMOE_SELF_TEST=0 turns this check off)"
        )


def name_of(device: torch.device) -> str:
    """The device's name and architecture."""
    arch = architecture(device)
    return f"{torch.cuda.get_device_name(device)}, {arch}" if device.type == "cuda" else arch


def history(device: torch.device, backend: str) -> str:
    """Whether the kernels of a backend have been run on a device's architecture."""
    known = KNOWN.get((backend, architecture(device)))
    return f"run before: {known}" if known else "never run on this architecture before"
