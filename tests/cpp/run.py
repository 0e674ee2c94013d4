"""Build the kernels' own C++ test and run it under every ISA of this processor: `python
tests/cpp/run.py [plain] [sanitized] [neon]`.

The flags are those of setup.py; torch is not needed, and what is run knows neither Python nor
PyTorch: it reads its networks from a file, which `tables.py` writes. `plain` tests the kernels as
they ship, `sanitized` under the address and undefined-behaviour sanitizers, `neon` cross-compiled
for AArch64 and run by qemu-user.
"""

from __future__ import annotations

import os
import platform
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent.parent.resolve()
KINDS = ("plain", "sanitized", "neon")
JOBS = 2

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# The emulator and the sanitizers are slow. Up to 21 rows there are the kernels of few rows, whole
# and ragged vectors, every width and, for several threads, blocks of 16 rows.
ROWS = {"plain": [], "sanitized": ["21"], "neon": ["33"]}
CROSS = "aarch64-linux-gnu-g++"
EMULATORS = ("qemu-aarch64-static", "qemu-aarch64")


def recipe(kind: str) -> dict:
    """What setup.py defines for the machine that a kind is built for, without running it."""
    machine = "aarch64" if kind == "neon" else platform.machine()
    with mock.patch("setuptools.setup"), mock.patch("platform.machine", return_value=machine):
        return runpy.run_path(str(ROOT / "setup.py"))


def emulator() -> str | None:
    """The first of EMULATORS that is installed."""
    return next(filter(None, map(shutil.which, EMULATORS)), None)


def missing(kind: str) -> str | None:
    """Why a kind cannot be tested on this machine, or None.

    Raises: ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "neon":
        if platform.machine() == "aarch64":
            return "neon: this machine is AArch64, where the plain kind tests NEON"
        if not shutil.which(CROSS) or not emulator():
            return (
                f"neon: expected {CROSS} and one of {', '.join(EMULATORS)}, found not both (Debian: "
                f"apt-get install g++-aarch64-linux-gnu qemu-user-static)"
            )
    if kind == "sanitized":
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text("int main() {}\n")
            command = [*recipe(kind)["compiler"](), *SANITIZE, str(source), "-o", str(Path(folder, "probe"))]
            if subprocess.run(command, capture_output=True).returncode:
                return "sanitized: the compiler links no address and undefined-behaviour sanitizers"
    return None


def build(kind: str) -> Path:
    """Compile what has changed and return the test program.

    Raises: SystemExit naming what does not compile.
    """
    rules, folder = recipe(kind), ROOT / "build" / f"cpp-{kind}"
    folder.mkdir(parents=True, exist_ok=True)
    cxx = [CROSS] if kind == "neon" else rules["compiler"]()
    # The rest of csrc/ knows PyTorch.
    kernels = [job for job in rules["objects"](folder) if job[0].parent.name == "cpu" or job[0].name == "table.cpp"]
    # -O2: they are small loops that run once. The note on psABI is about compilers of before 2020.
    tests = [
        (source, folder / f"{source.stem}.o", ["-O2", "-Wno-psabi"])
        for source in sorted(Path(__file__).parent.glob("*.cpp"))
    ]
    if kind == "sanitized":
        # The test's own loops run at full speed; its memory is the heap's, which the sanitizer
        # watches.
        kernels = [(source, target, [*flags, "-O1", "-g", *SANITIZE]) for source, target, flags in kernels]
        tests = [(source, target, [*flags, "-DFUSEDMOE_TEST_HEAP"]) for source, target, flags in tests]
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cpp'}"]
    due = []
    for source, target, flags in [*kernels, *tests]:
        command = [
            *cxx,
            *rules["FLAGS"],
            *flags,
            *includes,
            "-MMD",
            "-MF",
            str(target.with_suffix(".d")),
            "-c",
            str(source),
            "-o",
            str(target),
        ]
        if rules["stale"](target, command):
            due.append((source, target, command))
    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(lambda job: rules["compile_object"](*job), due))
    program = folder / "test_kernels"
    link = {"plain": [], "sanitized": SANITIZE, "neon": ["-static"]}[kind]
    if subprocess.run(
        [*cxx, *link, *(str(target) for _, target, _ in [*kernels, *tests]), "-pthread", "-o", str(program)]
    ).returncode:
        raise SystemExit(f"the {kind} test of the kernels does not link; the linker's messages stand above.")
    return program


def tables(folder: Path) -> Path:
    """Write the networks of the test, and return their file.

    In a process of its own, because tables.py stands in for the package's `__init__`.
    """
    target = folder / "tables.txt"
    subprocess.run([sys.executable, str(Path(__file__).with_name("tables.py")), str(target)], check=True)
    return target


def run(kind: str) -> Iterator[str]:
    """Yield what the test says under each ISA.

    Raises: SystemExit with the test's words where it fails.
    """
    program = build(kind)
    command = [*([emulator()] if kind == "neon" else []), str(program)]
    networks = str(tables(program.parent))
    isas = subprocess.run([*command, "isas"], capture_output=True, text=True, check=True).stdout.split()

    def under(isa: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, networks, *ROWS[kind]], env={**os.environ, "FUSEDMOE_ISA": isa}, capture_output=True, text=True
        )

    with ThreadPoolExecutor(JOBS) as pool:
        for isa, result in zip(isas, pool.map(under, isas), strict=True):
            if result.returncode:
                raise SystemExit(f"{kind}, {isa}: {result.stderr or f'stopped with status {result.returncode}'}")
            yield f"{kind}, {result.stdout.strip()}"


if __name__ == "__main__":
    for kind in sys.argv[1:] or KINDS:
        for line in [reason] if (reason := missing(kind)) else run(kind):
            print(line, flush=True)
