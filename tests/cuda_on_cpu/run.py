"""Build the emulator's own test and run it: `python tests/cuda_on_cpu/run.py [plain] [sanitized]
[threads]`.

Sources that nvcc compiles, `.cu`, are C++ here: csrc/cuda/device.h finds the emulator on the path.
`plain` is built as it ships to other tests, `sanitized` with the address and undefined-behaviour
sanitizers, `threads` with the one for data races.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent.resolve()
ROOT = HERE.parent.parent
JOBS = 2

# Kind -> how its objects are compiled. Debugging information names the lines of a report.
SANITIZE = {
    "plain": [],
    "sanitized": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "threads": ["-fsanitize=thread"],
}
OPTIMIZE = {"plain": ["-O2"], "sanitized": ["-O1", "-g", "-DFUSEDMOE_TEST_HEAP"], "threads": ["-O1", "-g"]}
KINDS = tuple(SANITIZE)

EMULATOR = [HERE / name for name in ("fiber.cpp", "block.cpp", "emulator.cpp")]
SAMPLES = [HERE / name for name in ("gemm.cu", "operations.cu")]
TESTS = [HERE / name for name in ("test_samples.cpp", "test_operations.cpp", "misuses.cpp")]
INCLUDES = [f"-I{path}" for path in (ROOT / "csrc", HERE, ROOT / "tests" / "cpp")]

# What nvcc compiles for ahead of time: every architecture that instructions differ in.
ARCHS = ("sm_80", "sm_90a", "sm_100a", "sm_120")

# Seed 0 is the order of the threads; and what arrives when.
SCHEDULES = [(seed, copies) for seed in range(4) for copies in ("lazy", "eager")]


@cache
def recipe() -> dict:
    """What setup.py defines, without running it."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(ROOT / "setup.py"))


@cache
def compiler() -> list[str]:
    """The command of the compiler that setup.py finds. Raises: SystemExit if it finds none."""
    return recipe()["compiler"]()


def missing(kind: str) -> str | None:
    """Why a kind cannot be tested on this machine, or None.

    Raises: ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("int main() {}\n")
        program = Path(folder, "probe")
        built = subprocess.run([*compiler(), *SANITIZE[kind], str(source), "-o", str(program)], capture_output=True)
        if built.returncode or subprocess.run([program], capture_output=True).returncode:
            return f"{kind}: the compiler's programs do not run with {' '.join(SANITIZE[kind])}"
    return None


def compiled(
    kind: str, sources: Sequence[Path], folder: Path, more: Sequence[str] = (), csrc: Path = ROOT / "csrc"
) -> list[Path]:
    """Compile what has changed for the emulator, with `more` words, and return the objects. Raises:
    SystemExit naming what does not compile.

    csrc: where the sources' headers are.
    """
    rules = recipe()
    targets, due = [], []
    for source in sources:
        target = folder / f"{source.stem}.o"
        command = [*compiler(), *rules["FLAGS"], *OPTIMIZE[kind], *SANITIZE[kind], f"-I{csrc}", *INCLUDES[1:], *more]
        command += ["-MMD", "-MF", str(target.with_suffix(".d")), "-x", "c++", "-c", str(source), "-o", str(target)]
        targets.append(target)
        if rules["stale"](target, command):
            due.append((source, target, command))
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(lambda job: rules["compile_object"](*job), due))
    return targets


def build(kind: str, samples: Sequence[Path] = SAMPLES, folder: Path | None = None) -> Path:
    """Return the test program with these sample kernels, which `folder` is for.

    Raises: SystemExit naming what does not compile.
    """
    common = ROOT / "build" / f"cuda_on_cpu-{kind}"
    folder = folder or common
    with alone(common):
        objects = compiled(kind, [*EMULATOR, *TESTS], common)
    with alone(folder):
        objects += compiled(kind, samples, folder)
        program = folder / "test_samples"
        link(kind, objects, program)
    return program


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep the other workers of a parallel test run out of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def link(kind: str, objects: Sequence[Path], program: Path, more: Sequence[str] = ()) -> None:
    """Link what has changed to a program, with `more` words.

    Raises: SystemExit if it does not link.
    """
    if program.exists() and all(target.stat().st_mtime <= program.stat().st_mtime for target in objects):
        return
    command = [*compiler(), *SANITIZE[kind], *map(str, objects), "-pthread", "-o", str(program), *more]
    if subprocess.run(command).returncode:
        raise SystemExit(f"the {kind} test of the emulator does not link; the linker's messages stand above.")


def under(
    program: Path, check: str, seed: int = 0, copies: str = "lazy", words: Path | None = None
) -> subprocess.CompletedProcess:
    """Run one check of a test program under one schedule; that of operations on `words`, if
    somebody else has computed them."""
    environment = {
        **os.environ,
        "FUSEDMOE_CUDA_SEED": str(seed),
        "FUSEDMOE_CUDA_COPIES": copies,
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    environment |= {"FUSEDMOE_OPERATIONS": str(words)} if words else {}
    return subprocess.run([program, check], env=environment, capture_output=True, text=True)


def run(kind: str) -> Iterator[str]:
    """Yield what each check says. Raises: SystemExit with the test's words where one fails."""
    program = build(kind)
    for check, schedules in (("samples", SCHEDULES), ("operations", SCHEDULES), ("misuses", SCHEDULES[:1])):
        for seed, copies in schedules:
            result = under(program, check, seed, copies)
            if result.returncode:
                raise SystemExit(
                    f"{kind}, seed {seed}, {copies}: {result.stderr or f'stopped with status {result.returncode}'}"
                )
            yield f"{kind}, seed {seed}, {copies}: {result.stdout.strip()}"


def toolkit() -> Path | None:
    """The folder of the CUDA toolkit: $CUDA_HOME, else the usual one, else where the nvcc on the
    path lies."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), "/usr/local/cuda", nvcc and Path(nvcc).resolve().parent.parent]
    return next(
        (
            Path(place)
            for place in places
            if place and Path(place, "bin", "nvcc").exists() and Path(place, "include").exists()
        ),
        None,
    )


def resources(source: Path) -> dict[tuple[str, str], str]:
    """Compile for every architecture of ARCHS with nvcc; return what the assembler says of
    registers, stack and spills by (architecture, kernel).

    Raises: SystemExit with nvcc's words if it does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHS]
        command = [
            str(toolkit() / "bin" / "nvcc"),
            "-std=c++20",
            "-O3",
            "-Werror=all-warnings",
            "-Xptxas=-v",
            *targets,
            *INCLUDES,
        ]
        result = subprocess.run(
            [*command, "-c", str(source), "-o", str(Path(folder, "object.o"))], capture_output=True, text=True
        )
    if result.returncode:
        raise SystemExit(f"{source.name} does not compile with nvcc: {result.stderr}")
    found, at = {}, None
    for line in result.stderr.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            at = (entry[2], entry[1])
        elif at and re.search(r"bytes stack frame|Used \d+ registers", line):
            found[at] = f"{found.get(at, '')} {line.strip()}".strip()
    return found


def on_device(words: Path) -> subprocess.CompletedProcess:
    """Build a program of nvcc's with the operations and run it, which writes what they gave.

    Raises: SystemExit if it does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "device")
        targets = [f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}" for arch in ARCHS]
        command = [
            str(toolkit() / "bin" / "nvcc"),
            "-std=c++20",
            "-O3",
            *targets,
            *INCLUDES,
            str(HERE / "device.cu"),
            str(HERE / "operations.cu"),
        ]
        result = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
        if result.returncode:
            raise SystemExit(f"device.cu does not compile with nvcc: {result.stderr}")
        return subprocess.run([program, words], capture_output=True, text=True)


def cutlass() -> Path | None:
    """The folder of CUTLASS's headers, which the package nvidia-cutlass brings."""
    found = importlib.util.find_spec("cutlass_library")
    folders = [Path(place, "source", "include") for place in (found.submodule_search_locations or [])] if found else []
    return next((folder for folder in folders if (folder / "cute").exists()), None)


def fragments() -> subprocess.CompletedProcess:
    """Build and run the check of the lane maps. Raises: SystemExit if it does not compile."""
    home, rules, folder = toolkit(), recipe(), ROOT / "build" / "cuda_on_cpu-plain"
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "test_fragments"
    system = [
        word for path in (cutlass(), home / "include", home / "include" / "cccl") for word in ("-isystem", str(path))
    ]
    command = [*compiler(), *rules["FLAGS"], "-O1", f"-I{HERE}", *system, "-MMD", "-MF", str(program.with_suffix(".d"))]
    command += [str(HERE / "test_fragments.cpp"), "-o", str(program)]
    if rules["stale"](program, command):
        rules["compile_object"](HERE / "test_fragments.cpp", program, command)
    return subprocess.run([program], capture_output=True, text=True)


if __name__ == "__main__":
    for kind in sys.argv[1:] or KINDS:
        for line in [reason] if (reason := missing(kind)) else run(kind):
            print(line, flush=True)
