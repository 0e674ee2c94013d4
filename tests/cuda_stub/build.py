"""Build the stub of CUDA's driver, and say what a process needs in its environment to run on it.

eval "$(python tests/cuda_stub/build.py)"
"""

from __future__ import annotations

import shutil
import stat
import subprocess
import sysconfig
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
TARGET = ROOT / "build" / "cuda_stub"
# The extension is linked to the runtime, not with it: NVIDIA's own does not start on a stub.
NVCC = """#!/usr/bin/env bash
exec {nvcc} "${{@/-cudart=static/-cudart=shared}}"
"""


def nvcc() -> str | None:
    """CUDA's compiler, or None where there is none."""
    return next((path for name in ("nvcc", "/usr/local/cuda/bin/nvcc") if (path := shutil.which(name))), None)


# What the sources include; torch's wheels bring some of it, a toolkit all.
NEEDED = ("cuda.h", "cudaProfiler.h", "cuda_runtime_api.h", "crt/host_defines.h")


def headers() -> Path:
    """Return the folder of CUDA's headers. Raises: FileNotFoundError where there is none."""
    folders = [Path("/usr/local/cuda/include"), Path(sysconfig.get_path("purelib"), "nvidia/cu13/include")]
    if found := nvcc():
        folders.insert(0, Path(found).resolve().parent.parent / "include")
    for folder in folders:
        if all((folder / name).exists() for name in NEEDED):
            return folder
    raise FileNotFoundError(
        f"stub of CUDA: expected {', '.join(NEEDED)} in one of {', '.join(map(str, folders))}, found none "
        f"with all of them"
    )


def build(target: Path = TARGET) -> Path:
    """Build libcuda.so.1, and a compiler `nvcc` that links what it builds to it, where there is an
    nvcc; return the library."""
    sources, library = sorted(FOLDER.glob("*.c")), target / "libcuda.so.1"
    inputs = [*sources, *FOLDER.glob("*.h"), Path(__file__)]
    if library.exists() and all(path.stat().st_mtime <= library.stat().st_mtime for path in inputs):
        return library
    target.mkdir(parents=True, exist_ok=True)
    flags = [
        "-std=gnu11",
        "-O1",
        "-g",
        "-fPIC",
        "-shared",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-isystem{headers()}",
    ]
    made = target / "made"
    subprocess.run(
        ["gcc", *flags, "-Wl,-soname,libcuda.so.1", "-o", str(made), *map(str, sources), "-ldl", "-lpthread"],
        check=True,
    )
    made.replace(library)
    if found := nvcc():
        wrapper = target / "nvcc"
        wrapper.write_text(NVCC.format(nvcc=found))
        wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    return library


def environment(library: Path, log: Path | None = None) -> dict[str, str]:
    """Return the variables under which a process runs on the stub, and writes its launches to a
    log."""
    folder = str(library.parent)
    result = {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": folder, "TRITON_LIBCUDA_PATH": folder}
    return result | ({"STUB_CUDA_LOG": str(log)} if log else {})


if __name__ == "__main__":
    for name, value in environment(build()).items():
        print(f"export {name}={value}")
