"""What nvcc makes of every CUDA kernel that a launch can choose, for every architecture:
`cuda_budgets.json`, written and read.

python tests/gpu_free/cuda_budgets.py --write
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent.parent))
    __package__ = "tests.gpu_free"

from fusedmoe.kernels import tiles

from ..cuda_on_cpu import run
from .budgets import worse, written
from .compiled import LIMITS, NVIDIA, mma_of, occupancy

PATH = Path(__file__).with_suffix(".json")
SOURCES = ("forward_bfloat16", "forward_float16", "forward_float32", "backward", "rowwise")
ARCHS = run.ARCHS
# How sizes of a kernel stand in its name, as template arguments behind the type.
KERNELS = {
    "forward": ("rows", "columns", "units", "threads", "blocks", "inner"),
    "backward_rows": ("rows", "columns", "threads", "blocks"),
    "gradients": ("outputs", "columns", "threads", "blocks", "shared"),
    "rowwise": ("backward", "threads", "blocks"),
}
# Sizes that are true or false, and how a kernel is named for which they are true.
FLAGS = {"inner": "a map inside", "shared": "shared parameters", "backward": "backward"}
# By nvcc's names of them, and by csrc/cuda's.
TYPES = {"float": "float", "__nv_bfloat16": "bfloat16", "__half": "float16"}
DTYPES = {"float": "float32", "bfloat16": "bfloat16", "float16": "float16"}
SAID = re.compile(
    r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill "
    r"loads\s+ptxas info\s+: Used (\d+) registers"
)


class Instance(NamedTuple):
    """A kernel with its type, as csrc/cuda writes it, and sizes by name."""

    kernel: str
    number: str
    sizes: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        sizes = [f"{value} {name}" for name, value in self.sizes if name not in FLAGS]
        flags = [FLAGS[name] for name, value in self.sizes if name in FLAGS and value]
        return f"{self.kernel} of {DTYPES[self.number]}, {', '.join(sizes + flags)}"

    @property
    def inner(self) -> bool:
        return bool(dict(self.sizes).get("inner"))

    @property
    def threads(self) -> int:
        return dict(self.sizes)["threads"]

    @property
    def blocks(self) -> int:
        """Of a multiprocessor at a time, for whose registers it is compiled."""
        return dict(self.sizes)["blocks"]

    @property
    def keep(self) -> int:
        """The most columns of a source that kernels/tiles.py keeps for it."""
        rows = dict(self.sizes).get("rows")
        if self.kernel != "forward" or self.number == "float":
            return 0
        return tiles.MOST_RESIDENT[rows == 16]

    def chosen(self, arch: str) -> bool:
        """Whether a launch on this architecture can take it: all are compiled for all."""
        return dict(self.sizes).get("rows") != 128 or arch.rstrip("a") in tiles.LARGE

    @property
    def bytes(self) -> str:
        """What csrc/cuda calls the bytes of shared memory of a launch."""
        of = dict(self.sizes)
        if self.kernel == "forward":
            return (
                f"Forward<{self.number}, {of['rows']}, {of['columns']}, {of['units']}, {of['threads']}, "
                f"{str(self.inner).lower()}>::bytes({self.keep})"
            )
        if self.kernel == "backward_rows":
            return f"RowsBackward<{self.number}, {of['rows']}, {of['columns']}, {of['threads']}>::bytes"
        if self.kernel == "rowwise":
            return "0"
        shared = str(bool(of["shared"])).lower()
        return f"ParameterGradients<{self.number}, {of['outputs']}, {of['columns']}, {of['threads']}, {shared}>::bytes"


@cache
def nvcc() -> str | None:
    """The version of nvcc, or None where there is none."""
    if not run.toolkit():
        return None
    said = subprocess.run([run.toolkit() / "bin" / "nvcc", "--version"], capture_output=True, text=True).stdout
    return re.search(r"release ([\d.]+)", said)[1]


def instance_of(demangled: str) -> Instance:
    """Read a kernel's name, such as `void fusedmoe::cuda::gradients_kernel<float, 32, 32, 128,
    4>(fusedmoe::cuda::GradientsCall)`."""
    kernel, arguments = re.search(r"::(\w+)_kernel<([^>]*)>", demangled).groups()
    number, *sizes = arguments.split(", ")
    values = [int({"false": "0", "true": "1"}.get(size, size)) for size in sizes]
    return Instance(kernel, TYPES[number], tuple(zip(KERNELS[kernel], values, strict=True)))


def compiled(source: str, arch: str) -> tuple[str, Path]:
    """Compile one of SOURCES where something has changed; return what the assembler said, and the
    code. Raises: SystemExit with nvcc's words."""
    folder = run.ROOT / "build" / "cuda-budgets"
    code = folder / f"{source}-{arch}.cubin"
    said = code.with_suffix(".txt")
    command = [
        str(run.toolkit() / "bin" / "nvcc"),
        "-std=c++20",
        "-O3",
        f"-arch={arch}",
        "-Xptxas=-v",
        f"-I{run.ROOT / 'csrc'}",
    ]
    command += [
        "-MMD",
        "-MF",
        str(code.with_suffix(".d")),
        "-cubin",
        str(run.ROOT / "csrc" / "cuda" / f"{source}.cu"),
        "-o",
        str(code),
    ]
    if run.recipe()["stale"](code, command):
        folder.mkdir(parents=True, exist_ok=True)
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{source}.cu does not compile with nvcc for {arch}: {result.stderr}")
        said.write_text(result.stderr)
        code.with_suffix(".command").write_text(shlex.join(command))
    return said.read_text(), code


def shared_bytes(instances: list[Instance]) -> list[int]:
    """What each one's launch has of shared memory: csrc/cuda's own words, compiled by the
    processor's compiler against the emulator."""
    prints = "\n".join(f'  std::printf("%d\\n", int({one.bytes}));' for one in instances)
    heads = "".join(f'#include "cuda/{name}.h"\n' for name in ("forward", "backward", "gradients"))
    text = f"#include <cstdio>\n{heads}using namespace fusedmoe::cuda;\nint main() {{\n{prints}\n}}\n"
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "bytes.cpp"), Path(folder, "bytes")
        source.write_text(text)
        subprocess.run(
            [*run.compiler(), "-std=c++20", "-O1", *run.INCLUDES, str(source), "-o", str(program)], check=True
        )
        return [
            int(line) for line in subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
        ]


@cache
def figures(source: str, arch: str) -> dict[str, dict[str, object]]:
    """Compile a file; return the figures of its kernels by name, of those that launches choose
    there."""
    said, code = compiled(source, arch)
    found = SAID.findall(said)
    names = subprocess.run(
        ["c++filt"], input="\n".join(entry[0] for entry in found), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    listing = subprocess.run([NVIDIA / "cuobjdump", "-sass", code], capture_output=True, text=True, check=True).stdout
    bodies = dict(re.findall(r"Function : (\w+)(.*?)(?=Function : |\Z)", listing, flags=re.DOTALL))
    instances = [instance_of(name) for name in names]
    result = {}
    for one, shared, (symbol, stack, stores, loads, registers) in zip(
        instances, shared_bytes(instances), found, strict=True
    ):
        if not one.chosen(arch):
            continue
        warps = one.threads // 32
        fits = occupancy(arch.rstrip("a"), int(registers), shared, warps)
        result[str(one)] = {
            "registers": int(registers),
            "stack": int(stack),
            "spills": int(stores) + int(loads),
            "shared": shared,
            "mma": mma_of(bodies[symbol]),
            "occupancy": round(fits, 4),
            "warps": warps,
            "most": LIMITS[arch.rstrip("a")].registers // (one.threads * one.blocks),
        }
    return dict(sorted(result.items()))


def budgets() -> dict[str, dict[str, dict[str, object]]]:
    """The figures that are checked in, by kernel and architecture."""
    return json.loads(PATH.read_text())["cases"]


def written_by() -> str:
    """The version of nvcc that the figures are of."""
    return json.loads(PATH.read_text())["nvcc"]


def source_of(name: str) -> str:
    """The file of SOURCES that makes a kernel."""
    kernel, _, number = name.replace(",", "").split()[:3]
    return f"forward_{number}" if kernel == "forward" else "rowwise" if kernel == "rowwise" else "backward"


def faults(source: str, arch: str, kept: Mapping[str, Mapping[str, Mapping[str, object]]]) -> list[str]:
    """Say which figures got worse, and which kernels came or went."""
    got = figures(source, arch)
    known = {name for name, of in kept.items() if arch in of and source_of(name) == source}
    bad = [f"{name}, {arch}: expected a budget, got none" for name in got if name not in known]
    bad += [f"{name}, {arch}: expected a kernel, got none" for name in sorted(known) if name not in got]
    return bad + [fault for name in got if name in known for fault in worse(name, arch, kept[name][arch], got[name])]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels for every architecture, without a device.")
    parser.add_argument(
        "--write", action="store_true", help=f"write tests/gpu_free/{PATH.name}; otherwise print what got worse"
    )
    chosen = parser.parse_args()
    if chosen.write:
        values: dict[str, dict[str, dict[str, object]]] = {}
        for source in SOURCES:
            for arch in ARCHS:
                for name, one in figures(source, arch).items():
                    values.setdefault(name, {})[arch] = one
        PATH.write_text(written("nvcc", nvcc(), values, ARCHS))
        return
    bad = [fault for source in SOURCES for arch in ARCHS for fault in faults(source, arch, budgets())]
    print("\n".join(bad) or "nothing got worse")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
