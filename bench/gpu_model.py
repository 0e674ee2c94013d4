"""A model of the Triton kernels' times on three GPUs; `make model` writes docs/gpu_model.md.
**Modelled, never run on a GPU.**

    python bench/gpu_model.py [--write] [--dtype float32]

A network's time is the sum over its launches (`gpu_launches.py`) of

    max( products / (P c fill),  mixes / (F fill),  once / HBM,  moved / L2,  moved / (n W fill) )  +  launch

products [FLOP]   of matrix products, over P [FLOP/s], the dense peak, of which c is reached
mixes [FLOP]      of weighted sums, over F [FLOP/s], the ordinary cores' peak
once [byte]       each tensor of the launch once, over HBM's bandwidth [byte/s]
moved [byte]      what programs read and write, over the bandwidth [byte/s] from L2 to all n SMs,
                  and over W [byte/s], what one SM takes in
fill              programs / (n ceil(programs / n)): the SM with most programs sets the time. How
                  many programs an SM runs at once cancels: they share what it has, so r at a time
                  in ceil(programs / (n r)) waves leave the same work to the fullest SM
launch [s]        LAUNCH: from one kernel's end to the next one's start

HBM and L2 serve whichever SMs ask, so fill does not divide them; an SM's own intake it does. For
one program of a whole network that intake is its stream of all weights: 1.2 MB of AdaTT T3m2 in
bfloat16 at 100 GB/s are 12 us.

Eager: operators x launch + their bytes / HBM (`roofline.Eager`), its products left out.

Assumed: walls overlap fully inside a launch, and not between launches; programs are equally long;
all reads that HBM need not serve come from L2, none from L1; no latency (barriers, address tables,
filling a pipeline); the host keeps up, ours and eager's, which outside a CUDA graph it may not.
"""

from __future__ import annotations

import argparse
from collections import Counter
from functools import cache
from math import ceil
from pathlib import Path
from typing import NamedTuple

import gpu_launches
import torch
from gpu_launches import Launched
from roofline import ARCH, MEGA, Eager
from tables import replace_between, rows_of

from fusedmoe.kernels.lowering import inline_hidden, lower, of_one_slot
from fusedmoe.kernels.program import Program
from fusedmoe.kernels.tiles import WHOLE_ROWS, Tiles, choose
from fusedmoe.speed.subjects import MAIN, SUBJECTS, Called, build
from fusedmoe.table import Table

PAGE = Path(__file__).parent.parent / "docs/gpu_model.md"
BEGIN, END = "<!-- model: written by `make model` -->", "<!-- end of model -->"
ROWS = (1, 16, 64, 256, 1024, 4096, 16384)
# Where the forms are compared.
POWERS = tuple(2**n for n in range(15))
MODES = ("inference", "training step")
LEVELS, WHOLE, SMALL = FORMS = ("a launch a level", "one launch", "a launch a level, small tiles")
TERA, GIGA, MICRO = 1e12, 1e9, 1e-6

# Seconds of a launch: one after another in a stream, and inside a CUDA graph. Of H100, and assumed
# of the others.
LAUNCH = {"stream": 2.5 * MICRO, "graph": 1.3 * MICRO}
# c: of H100's 989 TFLOP/s good kernels reach about 800; assumed of all.
REACHED = 0.8
# W: 64 bytes a clock at 1.5 to 1.9 GHz.
INTAKE = 100 * GIGA
# Rows of a tile from which Hopper and Blackwell take their own instructions (wgmma, tcgen05).
WIDE = 64


class Gpu(NamedTuple):
    """Figures of a GPU, in units a second: `peak` dense FLOPs by dtype, `fma` FLOPs of float32 on
    ordinary cores, bytes of HBM and of L2 to the SMs.
    narrow: the share of the peak that tiles of fewer than 64 rows can reach, by HMMA.
    """

    sms: int
    bfloat16: float
    tf32: float
    fma: float
    hbm: float
    l2: float
    narrow: float

    def peak(self, dtype: torch.dtype) -> float:
        """Dense FLOP/s; float32 is three products of tf32."""
        return self.tf32 / 3 if dtype == torch.float32 else self.bfloat16


# Sources: NVIDIA's data sheets of A100 (SXM, 80 GB), H100 (SXM) and HGX B200 (an eighth of its
# eight), figures without sparsity. L2: H100's is what read benchmarks report (about 5.5 TB/s);
# A100's and B200's are assumed to be as much an SM and clock (1.41, 1.75 and 1.85 GHz). HMMA: the
# whole of A100's peak; 0.63 of H100's (Luo et al. 2024, arXiv 2402.13499); B200's is assumed to be
# H100's an SM and clock.
GPUS = {
    "A100": Gpu(108, 312 * TERA, 156 * TERA, 19.5 * TERA, 2.0 * TERA, 3.6 * TERA, 1.0),
    "H100": Gpu(132, 989 * TERA, 495 * TERA, 67 * TERA, 3.35 * TERA, 5.5 * TERA, 0.63),
    "B200": Gpu(148, 2250 * TERA, 1125 * TERA, 75 * TERA, 8.0 * TERA, 6.5 * TERA, 0.33),
}


def fill(programs: int, sms: int) -> float:
    """The share of the SMs' time that has work, where the fullest SM sets the end."""
    return programs / (sms * ceil(programs / sms))


def walls(launched: Launched, gpu: Gpu, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of a launch by what could bound it."""
    filled = fill(launched.programs, gpu.sms)
    reached = REACHED * (1.0 if launched.rows >= WIDE else gpu.narrow)
    return {
        "products": launched.products / (gpu.peak(dtype) * reached * filled),
        "mixes": launched.mixes / (gpu.fma * filled),
        "HBM": launched.once / gpu.hbm,
        "L2": launched.moved / gpu.l2,
        "intake": launched.moved / (gpu.sms * INTAKE * filled),
    }


class Time(NamedTuple):
    """Modelled seconds of a network by wall: each launch's on its highest one, and those between
    launches on `launches`."""

    by: Counter[str]

    @property
    def seconds(self) -> float:
        return self.by.total()

    @property
    def nearest(self) -> str:
        return self.by.most_common(1)[0][0]


def time_of(launches: list[Launched], gpu: Gpu, dtype: torch.dtype, launch: float) -> Time:
    """Add up a network's launches, of `launch` seconds each besides their work."""
    by: Counter[str] = Counter(launches=launch * len(launches))
    for launched in launches:
        wall, seconds = max(walls(launched, gpu, dtype).items(), key=lambda item: item[1])
        by[wall] += seconds
    return Time(by)


def tiles_of(program: Program, rows: int, form: str, dtype: torch.dtype) -> Tiles:
    """The tiles of a form, at rows for which the rule would take it. Small tiles are those of one
    launch, which no rule takes for a launch a level."""
    if form == LEVELS:
        return choose(program, dtype, max(rows, WHOLE_ROWS + 1), ARCH)
    return choose(program, dtype, min(rows, WHOLE_ROWS), ARCH)._replace(whole=form == WHOLE)


@cache
def table_of(layer: str) -> Table:
    return build(SUBJECTS[layer]).table


@cache
def launches_of(layer: str, mode: str, rows: int, form: str, dtype: torch.dtype) -> list[Launched]:
    """The launches of a layer in one form: of the forward, and in a training step of the backward
    besides. Its caller expands one x to all slots."""
    program = inline_hidden(table_of(layer)) if mode == "inference" else lower(table_of(layer))
    tiles, size = tiles_of(program, rows, form, dtype), dtype.itemsize
    found = gpu_launches.forward(of_one_slot(program), tiles, rows, size)
    return found + (gpu_launches.backward(program, tiles.backward, rows, size) if mode != "inference" else [])


class Operators(NamedTuple):
    """What eager runs: its operators on the device, and the bytes that they read and write."""

    count: int
    bytes: int


def counted(layer: str, mode: str, rows: int, dtype: torch.dtype) -> Operators:
    """Run a layer in eager on the CPU and count, without views."""
    built = build(SUBJECTS[layer], dtype)
    network = Called(built.module, built.slots)
    x = torch.zeros(rows, built.table.inputs[0].width, dtype=dtype, requires_grad=mode != "inference")
    if mode == "inference":
        with torch.no_grad(), Eager() as eager:
            network(x)
    else:
        d_out = torch.ones_like(network(x))
        with Eager() as eager:
            torch.autograd.grad(network(x), [x, *network.parameters()], d_out)
    return Operators(eager.operators, eager.read + eager.written)


@cache
def eager_of(layer: str, mode: str, rows: int, dtype: torch.dtype) -> Operators:
    """As `counted`, for any number of rows: every tensor is a constant and a multiple of the rows,
    which two small batches tell."""
    few, more = (counted(layer, mode, batch, dtype) for batch in (16, 32))
    return Operators(few.count, few.bytes + (more.bytes - few.bytes) * (rows - 16) // 16)


def eager_seconds(layer: str, mode: str, rows: int, gpu: Gpu, dtype: torch.dtype, launch: float) -> Time:
    operators = eager_of(layer, mode, rows, dtype)
    return Time(Counter(launches=operators.count * launch, HBM=operators.bytes / gpu.hbm))


def crossing(layer: str, mode: str, gpu: Gpu, dtype: torch.dtype, launch: float) -> int | None:
    """The least power of two of rows from which on one launch is never the faster form; None if it
    is at the most."""

    def seconds(rows: int, form: str) -> float:
        return time_of(launches_of(layer, mode, rows, form, dtype), gpu, dtype, launch).seconds

    slower = [seconds(rows, WHOLE) >= seconds(rows, LEVELS) for rows in POWERS]
    return next((rows for at, rows in enumerate(POWERS) if all(slower[at:])), None)


def cell(stream: Time, graph: Time) -> str:
    """Microseconds in a stream / in a CUDA graph, and the highest wall of the former."""
    streamed, graphed = (
        f"{time.seconds / MICRO:.{0 if time.seconds >= 100 * MICRO else 1}f}" for time in (stream, graph)
    )
    return f"{streamed} / {graphed} {stream.nearest}"


def times_table(layer: str, mode: str, dtype: torch.dtype) -> list[str]:
    """A row for each GPU and form and for eager, a column for each number of rows."""
    table = [["", *(f"B = {rows}" for rows in ROWS)]]
    for name, gpu in GPUS.items():
        for form in (LEVELS, WHOLE):
            times = [
                [time_of(launches_of(layer, mode, rows, form, dtype), gpu, dtype, launch) for launch in LAUNCH.values()]
                for rows in ROWS
            ]
            table.append([f"{name}, {form}", *(cell(*pair) for pair in times)])
        times = [[eager_seconds(layer, mode, rows, gpu, dtype, launch) for launch in LAUNCH.values()] for rows in ROWS]
        table.append([f"{name}, eager", *(cell(*pair) for pair in times)])
    return rows_of(table)


def launch_table(layer: str, rows: int, gpu: str, dtype: torch.dtype) -> list[str]:
    """What each launch of the form with one a level does, and its walls on one GPU in microseconds."""
    table = [
        [
            "",
            "programs",
            "fill",
            "GFLOP",
            "MB once",
            "MB moved",
            *walls(Launched("", 1, 1, 0, 0, 0, 0), GPUS[gpu], dtype),
        ]
    ]
    for mode in MODES:
        for launched in launches_of(layer, mode, rows, LEVELS, dtype):
            seconds = walls(launched, GPUS[gpu], dtype)
            high = max(seconds, key=seconds.get)
            cells = [
                f"**{value / MICRO:.1f}**" if wall == high else f"{value / MICRO:.1f}"
                for wall, value in seconds.items()
            ]
            counts = [f"{launched.products / GIGA:.2f}", f"{launched.once / MEGA:.1f}", f"{launched.moved / MEGA:.1f}"]
            table.append(
                [
                    f"{mode}: {launched.name}",
                    str(launched.programs),
                    f"{fill(launched.programs, GPUS[gpu].sms):.2f}",
                    *counts,
                    *cells,
                ]
            )
    return rows_of(table)


def crossing_table(dtype: torch.dtype) -> list[str]:
    """Where the forms cross, in a stream / in a CUDA graph."""
    table = [["", *GPUS]]
    for mode in MODES:
        for layer in MAIN:
            found = [[crossing(layer, mode, gpu, dtype, launch) for launch in LAUNCH.values()] for gpu in GPUS.values()]
            table.append(
                [
                    f"{layer}, {mode}",
                    *(" / ".join(str(rows or f"over {POWERS[-1]}") for rows in pair) for pair in found),
                ]
            )
    return rows_of(table)


def forms_table(rows: int, dtype: torch.dtype) -> list[str]:
    """The three forms at a number of rows, in a stream."""
    table = [["", *GPUS]]
    for mode in MODES:
        for layer in MAIN:
            times = [
                [time_of(launches_of(layer, mode, rows, form, dtype), gpu, dtype, LAUNCH["stream"]) for form in FORMS]
                for gpu in GPUS.values()
            ]
            table.append(
                [f"{layer}, {mode}", *(" / ".join(f"{time.seconds / MICRO:.1f}" for time in of) for of in times)]
            )
    return rows_of(table)


def figures_table() -> list[str]:
    """The figures of the GPUs."""
    table = [
        ["", "SMs", "bfloat16, TFLOP/s", "tf32", "float32 on ordinary cores", "HBM, TB/s", "L2, TB/s", "HMMA's share"]
    ]
    for name, gpu in GPUS.items():
        rates = (gpu.bfloat16, gpu.tf32, gpu.fma, gpu.hbm, gpu.l2)
        table.append([name, str(gpu.sms), *(f"{rate / TERA:g}" for rate in rates), f"{gpu.narrow:g}"])
    return rows_of(table)


def page(dtype: torch.dtype) -> str:
    """All tables."""
    lines = [
        *figures_table(),
        "",
        f"The rows from which one launch is no longer the faster form (1: it never is; the rule says "
        f"{WHOLE_ROWS}), in a stream / in a CUDA graph:",
        "",
    ]
    lines += crossing_table(dtype)
    lines += ["", f"At 64 rows in a stream, microseconds (modelled): {' / '.join(FORMS)}:", "", *forms_table(64, dtype)]
    lines += [
        "",
        f"Launches of {MAIN[0]} at 4,096 rows, a launch a level, and their walls on H100 in microseconds (modelled):",
        "",
    ]
    lines += launch_table(MAIN[0], 4096, "H100", dtype)
    for mode in MODES:
        for layer in MAIN:
            lines += [
                "",
                f"{layer}, {mode}: microseconds (modelled) in a stream / in a CUDA graph, and the highest wall:",
                "",
            ]
            lines += times_table(layer, mode, dtype)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--write", action="store_true", help="put the tables of bfloat16 into docs/gpu_model.md; otherwise print them"
    )
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="what to print (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.write:
        PAGE.write_text(replace_between(PAGE.read_text(), page(torch.bfloat16), BEGIN, END, "docs/gpu_model.md"))
    else:
        print(page(getattr(torch, options.dtype)))


if __name__ == "__main__":
    main()
