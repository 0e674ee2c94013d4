"""nvcc's PTX of the sample kernels, executed as tests/gpu_free executes Triton's: the instructions
of csrc/cuda/ptx.h, which the emulator replaces."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..gpu_free.ptx import Counts, Executable, Range
from . import run

ARCH = "sm_80"
# Where the names of Triton's modules end, and nvcc's begin.
SHARED_SYMBOL = re.compile(r"\b\w*fusedmoe_shared\w*")
CONSTANT = re.compile(r"mov\.\w+\s+(%r\d+), (-?\d+);")
# A vector's registers are all written.
WRITTEN = re.compile(r"^\s*(?:@!?%p\d+\s+)?(?!st\.|cp\.|bra|ret|bar)[a-z][\w.:]*\s+(\{[^}]*\}|%\w+)", re.MULTILINE)


def kernels(source: Path) -> dict[str, str]:
    """Compile with nvcc; return a module of its own for every kernel, by its mangled name.

    Raises: SystemExit if it does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "kernels.ptx")
        command = [
            str(run.toolkit() / "bin" / "nvcc"),
            "-std=c++20",
            "-O3",
            f"-arch={ARCH}",
            *run.INCLUDES,
            "-ptx",
            str(source),
            "-o",
            str(target),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"{source.name} does not compile with nvcc: {result.stderr}")
        text = target.read_text()
    head = text[: text.index(".entry")].replace(".visible", "")
    entries = re.findall(r"^(?:\.visible )?(\.entry (\w+)\(.*?^\})", text, flags=re.MULTILINE | re.DOTALL)
    return {name: in_tritons_words(head + entry) for entry, name in entries}


def in_tritons_words(text: str) -> str:
    """The same module as the executor reads it: shared memory under Triton's name, constants in
    shuffles instead of registers that hold them, and no barriers of a warp, whose lanes go together
    there anyway.
    """
    text = re.sub(r"bar\.warp\.sync[^;]*;", "", SHARED_SYMBOL.sub("global_smem", text))
    written = [name for registers in WRITTEN.findall(text) for name in re.findall(r"%\w+", registers)]
    constants = {name: value for name, value in CONSTANT.findall(text) if written.count(name) == 1}
    operands = re.compile(r"(?<=, )%r\d+(?=[,;])")
    return re.sub(
        r"shfl[^;]*;", lambda shuffle: operands.sub(lambda name: constants.get(name[0], name[0]), shuffle[0]), text
    )


def execute(
    module: str, shared: int, grid: tuple[int, ...], tensors: dict[str, Tensor], numbers: Sequence[int] = ()
) -> Counts:
    """Run a kernel with `shared` bytes of shared memory on tensors, which it may use from end to
    end, and then numbers. Raises: KernelFault."""
    ranges = [Range(name, tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for name, tensor in tensors.items()]
    return Executable(module, shared).launch(
        grid, [*(tensor.data_ptr() for tensor in tensors.values()), *numbers], ranges
    )
