"""The kernels that the shipped rule chooses, and what compilers make of them for every
architecture: `budgets.json`, written and read.

    python tests/gpu_free/budgets.py --write

Those are the figures of the newest Triton. Another one brings other compilers, and its figures
stand in a file beside
that: `budgets-3.6.0.json`.

Must run where TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
import triton

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    __package__ = "gpu_free"

from fusedmoe.activation import Activation
from fusedmoe.families import adatt_sp
from fusedmoe.parts import (
    Attention,
    Dropout,
    Expert,
    Gate,
    Input,
    LayerNorm,
    Level,
    Linear,
    PReLU,
    Source,
    Static,
    Task,
    Unit,
    from_slots,
)
from fusedmoe.speed.subjects import SUBJECTS, build
from fusedmoe.table import Table

from .compiled import ARCHS, Compiled, compile_for
from .launches import Variant, kernel_of, variants

PATH = Path(__file__).with_suffix(".json")
# Layers of `fusedmoe.speed`: two levels of units with few experts, hidden layers, many units,
# shared experts; the first one in every dtype.
LAYERS = ("AdaTT T3m2", "MMoE T3e8", "AdaTT T8m2", "PLE T3m2s1")
# And what they lack: two and five units, a source too wide to be kept by a launch a level, several
# activations, an expert that a gate selects.
OTHERS = ("AdaTT T2m2 of 512", "AdaTT T5m2 of 512", "AdaTT T3m2 with every record", "every row-wise operation")
DTYPES = {"bfloat16": (*LAYERS, *OTHERS), "float16": LAYERS[:1], "float32": LAYERS[:1]}
# One launch, and a launch a level.
ROWS = (64, 4096)
FIGURES = ("registers", "stack", "shared", "mma", "occupancy", "warps")


class Case(NamedTuple):
    """A compiled kernel, and the first call that launches it."""

    kernel: str
    layer: str
    training: bool
    rows: int
    dtype: str

    def __str__(self) -> str:
        return (
            f"{self.kernel} of {self.layer}, {'training' if self.training else 'inference'}, {self.rows} "
            f"rows, {self.dtype}"
        )


def table_of(name: str) -> Table:
    """The table of one of LAYERS or OTHERS."""
    if name in LAYERS:
        return build(SUBJECTS[name]).table
    if name == "every row-wise operation":
        return rowwise()
    if name != "AdaTT T3m2 with every record":
        return adatt_sp(512, [[512], [256]], int(name.removeprefix("AdaTT T")[0]), 2)
    table = adatt_sp(256, [[256], [128]], 3, 2, activation="silu")
    level = table.levels[0]
    first, *units = level.units
    selecting = replace(first, gate=replace(first.gate, selectors=((Source("expert"),),)))
    experts = tuple(
        replace(expert, ops=(expert.ops[0], Activation("gelu"))) if e == 1 else expert
        for e, expert in enumerate(level.experts)
    )
    return replace(table, levels=(replace(level, units=(selecting, *units), experts=experts), *table.levels[1:]))


def rowwise() -> Table:
    """What is no segment of linears and units: LayerNorm, PReLU and dropout, some columns, shared linear
    maps, every kind of gate, static weights a column, a product; its parts as wide as those of the others."""
    x, some, both = Source("slot"), Source("slot", first=128, width=128), (Source("expert", 0), Source("expert", 1))
    shared = Linear(256, True, 0)
    experts = (
        Expert((x,), (shared, LayerNorm(), Activation("silu"), Dropout(0.1))),
        Expert((Source("slot", detached=True),), (shared, PReLU(True))),
        Expert((some, some), ()),
    )
    units = (
        Unit(Gate(((x, x),), (0, 1, 2), temperature=2.0), Static((0, 1), tensor=1, channels=True)),
        Unit(Attention((x,), ((both[0],), (both[1],)), (0, 1))),
        Unit(Gate((), (0, 1, 2))),
        Unit(product=(0, 1)),
    )
    towers = tuple(Task(from_slots(u, u + 1), (Linear(1), PReLU())) for u in (0, 2))
    return Table((Input(1, 256),), (Level(experts, units),), towers, ((256, 256), (2, 256)))


@cache
def cases(arch: str) -> dict[Case, Variant]:
    """Every kernel that the calls above launch, each once."""
    found: dict[Variant, Case] = {}
    for dtype, layers in DTYPES.items():
        for layer in layers:
            table = table_of(layer)
            for rows in ROWS:
                for training in (False, True):
                    for variant in variants(table, getattr(torch, dtype), rows, training, arch):
                        found.setdefault(variant, Case(variant.kernel, layer, training, rows, dtype))
    return {case: variant for variant, case in found.items()}


@cache
def figures(case: Case, arch: str) -> dict[str, object]:
    """Compile a case; return its figures by name."""
    variant = cases(arch)[case]
    compiled: Compiled = compile_for(
        kernel_of(variant), dict(variant.signature), dict(variant.constants), arch, variant.warps
    )
    values = {name: getattr(compiled, name) for name in FIGURES}
    return {**values, "occupancy": round(compiled.occupancy, 4)}


def worse(case: str, arch: str, budget: Mapping[str, object], got: Mapping[str, object]) -> list[str]:
    """Say which figures got worse: more registers, stack, spills or shared memory, fewer warps at a
    time, other instructions."""
    bad = {name: got[name] > budget[name] for name in ("registers", "stack", "spills", "shared") if name in budget}
    bad |= {"mma": got["mma"] != budget["mma"], "occupancy": got["occupancy"] < budget["occupancy"]}
    return [f"{case}, {arch}: {name}: budget {budget[name]}, got {got[name]}" for name, is_bad in bad.items() if is_bad]


@cache
def budgets() -> dict[str, dict[str, dict[str, dict[str, object]]]]:
    """The figures that are checked in, by version of Triton, case and architecture; the newest
    version's first."""
    files = [json.loads(path.read_text()) for path in (PATH, *sorted(PATH.parent.glob(f"{PATH.stem}-*.json")))]
    return {one["triton"]: one["cases"] for one in files}


def path_of(version: str) -> Path:
    """The file of a version's figures: its own, or that of the newest, which a version without one
    is about to be."""
    _, *others = budgets()
    return PATH.with_name(f"{PATH.stem}-{version}.json") if version in others else PATH


def written(
    compiler: str, version: str, values: Mapping[str, Mapping[str, Mapping[str, object]]], archs: Iterable[str]
) -> str:
    """As JSON, an architecture a line, behind the compiler's version."""
    kernels = []
    for case, by_arch in values.items():
        lines = ",\n".join(
            f"      {json.dumps(arch)}: {json.dumps(by_arch[arch])}" for arch in archs if arch in by_arch
        )
        kernels.append(f"    {json.dumps(case)}: {{\n{lines}\n    }}")
    return f'{{\n  {json.dumps(compiler)}: {json.dumps(version)},\n  "cases": {{\n' + ",\n".join(kernels) + "\n  }\n}\n"


def measured(archs: Iterable[str]) -> dict[str, dict[str, dict[str, object]]]:
    """Compile every case for these architectures, with a bar."""
    from rich.progress import track

    jobs = [(case, arch) for arch in archs for case in cases(arch)]
    result: dict[str, dict[str, dict[str, object]]] = {}
    for case, arch in track(jobs, description="compiling"):
        result.setdefault(str(case), {})[arch] = figures(case, arch)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compile the kernels that the shipped tiles choose, for every architecture, without a device."
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"write tests/gpu_free/{PATH.name}, or this Triton's own file; otherwise print what got worse",
    )
    parser.add_argument(
        "--arch", choices=ARCHS, nargs="+", default=ARCHS, help="only these; the figures of the others stay as they are"
    )
    chosen = parser.parse_args()
    got = measured(chosen.arch)
    path = path_of(triton.__version__)
    kept = json.loads(path.read_text())["cases"]
    if chosen.write:
        others = {case: {arch: one for arch, one in of.items() if arch not in chosen.arch} for case, of in kept.items()}
        path.write_text(
            written(
                "triton", triton.__version__, {case: {**others.get(case, {}), **of} for case, of in got.items()}, ARCHS
            )
        )
        return
    faults = [
        fault
        for case, of in got.items()
        for arch, one in of.items()
        for fault in worse(case, arch, kept[case][arch], one)
    ]
    print("\n".join(faults) or "nothing got worse")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
