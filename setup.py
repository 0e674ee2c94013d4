"""Build of fusedmoe: the extension `fusedmoe._C` out of csrc/, and with FUSEDMOE_BUILD=cuda
`fusedmoe._cuda` out of csrc/cuda.

csrc/cpu/isa.cpp is compiled once per instruction set and every other file once; the library picks
among them at run time, so a wheel runs on any CPU of its architecture. Objects are rebuilt when a
file that they include, or their command, has changed. The CUDA kernels are an extension of their
own: a build without them is unchanged, and if one extension does not load, the other still does.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, __version__, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 10)
OLDEST_SETUPTOOLS = 77
PREPARE = (
    f"run `pip install torch pybind11 'setuptools>={OLDEST_SETUPTOOLS}'`, then `pip install --no-build-isolation .`"
)

# Flags of each build of csrc/cpu/isa.cpp. Only x86-64 chooses at run time; elsewhere the compiler's
# own default is the one build.
ISAS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS["avx2"] = ["-mavx2", "-mfma"]
    # GCC and Clang halve AVX-512 vectors by default: their cost model is that of CPUs that clocked
    # down.
    ISAS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
    # These two differ from it in bfloat16 alone: dot products of pairs, and tiles.
    ISAS["avx512_bf16"] = [*ISAS["avx512"], "-mavx512bf16"]
    ISAS["amx"] = [*ISAS["avx512_bf16"], "-mamx-tile", "-mamx-bf16"]

FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fvisibility-inlines-hidden",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
]
# A row's bits must not depend on the kernel that computes it, so every a*b+c is contracted (GCC's
# default, not Clang's).
FLAGS += ["-ffp-contract=fast"]
# The oldest torch whose stable ABI the binary asks for: one build serves every later version.
FLAGS += [f"-DTORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"]

BUILDS = ("cpu", "cuda")
# The first that knows sm_100 and sm_120.
OLDEST_NVCC = (12, 8)
# Code for each, and PTX of the oldest, from which a driver compiles for whatever is not here: 10.3,
# 11.0 and what is yet to come.
CUDA_ARCHS, PTX_ARCH = ("80", "90a", "100a", "120"), "80"
CPU_ONLY = "the CPU alone; FUSEDMOE_BUILD=cuda adds the CUDA kernels"
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-math-errno,-Wall,-Wextra"]

PROBE = "#include <concepts>\n#include <span>\nint probe(std::span<int> s) { return static_cast<int>(s.size()); }\n"
INSTALL = "install one (Debian and Ubuntu: `apt-get install g++`, version 11 or later) or name one in CXX"
INSTALL_NVCC = (
    "install CUDA's toolkit, or `pip install nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl`, or "
    "name one in NVCC"
)


def compiler() -> list[str]:
    """Return the command of a working C++20 compiler: $CXX, else the first of g++, clang++ and c++.

    Raises: SystemExit with one sentence that tells what to install.
    """
    named = os.environ.get("CXX")
    if named is None:
        named = next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)
    if named is None:
        raise SystemExit(f"fusedmoe: building needs a C++20 compiler, found no g++, clang++ or c++; {INSTALL}.")
    command = shlex.split(named)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "probe.cpp"), Path(folder, "probe.o")
        source.write_text(PROBE)
        try:
            result = subprocess.run(
                [*command, "-std=c++20", "-c", str(source), "-o", str(target)], capture_output=True, text=True
            )
            fault = (
                None
                if result.returncode == 0 and target.exists()
                else (result.stderr.strip().splitlines() or ["it wrote no object file"])[0]
            )
        except OSError as error:
            fault = error.strerror
    if fault:
        raise SystemExit(
            f"fusedmoe: building needs a C++20 compiler, and {named!r} does not compile a three-line program "
            f"({fault}); {INSTALL}."
        )
    return command


def with_cuda() -> bool:
    """Whether FUSEDMOE_BUILD asks for the CUDA kernels.

    Raises: SystemExit with one sentence for a value that it does not know.
    """
    named = os.environ.get("FUSEDMOE_BUILD") or "cpu"
    if named not in BUILDS:
        raise SystemExit(f"fusedmoe: building needs FUSEDMOE_BUILD to be {' or '.join(BUILDS)}, found {named!r}.")
    return named == "cuda"


def nvcc() -> list[str]:
    """Return the command of CUDA's compiler: $NVCC, else that in $CUDA_HOME, on the path, of
    NVIDIA's packages on PyPI, in /usr/local/cuda.

    Raises: SystemExit with one sentence that tells what to install.
    """
    home, found = os.environ.get("CUDA_HOME"), shutil.which("nvcc")
    named = os.environ.get("NVCC") or (home and str(Path(home, "bin", "nvcc"))) or found
    if not named:
        folders = [Path(sysconfig.get_path("purelib"), "nvidia", name) for name in ("cu13", "cuda_nvcc")]
        named = next(
            (str(path) for folder in (*folders, Path("/usr/local/cuda")) if (path := folder / "bin" / "nvcc").exists()),
            None,
        )
    wanted = f"nvcc {'.'.join(map(str, OLDEST_NVCC))} or later for FUSEDMOE_BUILD=cuda"
    if not named:
        raise SystemExit(
            f"fusedmoe: building needs {wanted}, found none in $CUDA_HOME, on the path or in /usr/local/cuda; "
            f"{INSTALL_NVCC}."
        )
    command = shlex.split(named)
    try:
        said = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        said = error.strerror
    release = re.search(r"release (\d+)\.(\d+)", said)
    if not release or tuple(map(int, release.groups())) < OLDEST_NVCC:
        got = (
            f"release {release[1]}.{release[2]}"
            if release
            else (said.strip().splitlines() or ["one that says nothing"])[0]
        )
        raise SystemExit(f"fusedmoe: building needs {wanted}, and {named!r} is none ({got}); {INSTALL_NVCC}.")
    return command


def host_compiler(cxx: list[str]) -> list[str]:
    """What tells nvcc which compiler compiles the host's half, for a command that may have
    something in front (ccache) and flags behind.
    """
    return ["-ccbin", next((word for word in reversed(cxx) if not word.startswith("-")), cxx[0])]


def torch_folders() -> tuple[list[str], list[str]]:
    """Return torch's include and library folders.

    Raises: SystemExit with one sentence for a torch that is missing or too old.
    """
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError:
        raise SystemExit(f"fusedmoe: building needs torch, which this Python does not have; {PREPARE}.") from None
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        raise SystemExit(
            f"fusedmoe: building needs torch {'.'.join(map(str, OLDEST_TORCH))} or later, found "
            f"{torch.__version__}; {PREPARE}."
        )
    return include_paths(), library_paths()


def python_folders() -> list[str]:
    """Return the include folders of Python and pybind11.

    Raises: SystemExit with one sentence if either is missing.
    """
    try:
        import pybind11
    except ImportError:
        raise SystemExit(f"fusedmoe: building needs pybind11, which this Python does not have; {PREPARE}.") from None
    headers = sysconfig.get_path("include")
    if not (Path(headers) / "Python.h").exists():
        raise SystemExit(
            f"fusedmoe: building needs Python.h, found none in {headers}; install it (Debian and Ubuntu: "
            f"`apt-get install python3-dev`)."
        )
    return [headers, pybind11.get_include()]


def system_folders(python: list[str], torch: list[str]) -> list[str]:
    """Return the compiler's words for the include folders, as system folders: a warning inside
    torch's headers is not ours to mend.

    Python's come first: torch's folder holds a pybind11 of its own, which refuses
    TORCH_TARGET_VERSION.
    """
    return [word for path in (*python, *torch) for word in ("-isystem", path)]


def objects(folder: Path) -> list[tuple[Path, Path, list[str]]]:
    """Return (source, object, extra flags) of every compilation."""
    result = []
    for source in sorted([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")]):
        name = "-".join(source.relative_to(ROOT / "csrc").with_suffix("").parts)
        if source == ROOT / "csrc/cpu/isa.cpp":
            result += [
                (source, folder / f"{name}-{isa}.o", [f"-DFUSEDMOE_ISA={isa}", *flags]) for isa, flags in ISAS.items()
            ]
        else:
            result.append((source, folder / f"{name}.o", []))
    return result


def cuda_archs() -> tuple[str, ...]:
    """Return the architectures to compile CUDA for: those that FUSEDMOE_CUDA_ARCHS names ("90a
    120"), else all.

    Raises: SystemExit for any other.
    """
    named = os.environ.get("FUSEDMOE_CUDA_ARCHS", "").split() or CUDA_ARCHS
    if not set(named) <= set(CUDA_ARCHS):
        raise SystemExit(
            f"fusedmoe: building needs FUSEDMOE_CUDA_ARCHS to be some of {' '.join(CUDA_ARCHS)}, found "
            f"{' '.join(named)!r}."
        )
    return tuple(named)


def gencode() -> list[str]:
    """Return nvcc's flags for the architectures."""
    return [
        *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in cuda_archs()),
        f"-gencode=arch=compute_{PTX_ARCH},code=compute_{PTX_ARCH}",
    ]


def cuda_objects(folder: Path) -> list[tuple[Path, Path, list[str]]]:
    """Return (source, object, extra flags) of every compilation of the CUDA extension.

    nvcc has those that end in .cu.
    """
    sources = sorted([*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.cpp")])
    return [(source, folder / f"cuda-{source.name.replace('.', '-')}.o", []) for source in sources]


def stale(target: Path, command: list[str]) -> bool:
    """Whether `target` is missing, was made by another command, or is older than a file that went
    into it.
    """
    made_by, depends = target.with_suffix(".command"), target.with_suffix(".d")
    if not (target.exists() and made_by.exists() and depends.exists()) or made_by.read_text() != shlex.join(command):
        return True
    # nvcc puts a space in front of the colon.
    inputs = shlex.split(depends.read_text().replace("\\\n", " ").partition(": ")[2])
    return any(not Path(path).exists() or Path(path).stat().st_mtime > target.stat().st_mtime for path in inputs)


def compile_object(source: Path, target: Path, command: list[str]) -> None:
    """Run one compilation; its warnings go to standard error.

    Raises: SystemExit naming the file that does not compile.
    """
    print(f"  {target.stem}", flush=True)
    target.unlink(missing_ok=True)
    result = subprocess.run(command, capture_output=True, text=True)
    sys.stderr.write(result.stderr)
    if result.returncode:
        raise SystemExit(
            f"fusedmoe: {source.relative_to(ROOT)} does not compile with {command[0]}; the compiler's "
            f"messages stand above."
        )
    target.with_suffix(".command").write_text(shlex.join(command))


class Build(build_ext):
    """Compile csrc/ with flags per object, two at a time (`--parallel` changes that), and link."""

    def run(self) -> None:
        cuda = with_cuda()
        # Before anything is compiled: what is missing is told at once.
        archs = cuda_archs() if cuda else ()
        self.cxx, self.nvcc = compiler(), nvcc() if cuda else []
        print(
            f"fusedmoe: building for "
            f"{'the CPU and for ' + ', '.join('sm_' + arch for arch in archs) if cuda else CPU_ONLY}",
            flush=True,
        )
        if not cuda:
            # Of an earlier build: its kernels may be others than those of this source, and a wheel
            # takes whatever stands in its folder.
            for extension in (
                Path(self.get_ext_fullpath("fusedmoe._cuda")),
                Path(self.build_lib, self.get_ext_filename("fusedmoe._cuda")),
            ):
                extension.unlink(missing_ok=True)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        # Not `self.build_temp`: pip gives a fresh one each time, and every installation would
        # compile everything again.
        folder = ROOT / "build" / f"objects-{sys.implementation.cache_tag}-{self.plat_name}"
        folder.mkdir(parents=True, exist_ok=True)
        cuda = ext.name == "fusedmoe._cuda"
        headers, libraries = torch_folders()
        includes = system_folders(python_folders(), headers)
        jobs = []
        for source, target, flags in cuda_objects(folder) if cuda else objects(folder):
            outputs = ["-MMD", "-MF", str(target.with_suffix(".d")), "-c", str(source), "-o", str(target)]
            # What nvcc compiles knows no torch.
            command = (
                [*self.nvcc, *host_compiler(self.cxx), *NVCC_FLAGS, *gencode()]
                if source.suffix == ".cu"
                else [*self.cxx, *FLAGS, *flags, *includes]
            )
            jobs.append((source, target, [*command, f"-I{ROOT / 'csrc'}", *outputs]))
        if not jobs:
            raise SystemExit(
                f"fusedmoe: building needs the sources in {ROOT / 'csrc'}, found none; take the whole "
                f"repository or source archive."
            )
        due = [job for job in jobs if stale(job[1], job[2])]
        print(f"fusedmoe: compiling {len(due)} of {len(jobs)} objects", flush=True)
        # nvcc's first: each takes as long as many of the others.
        due.sort(key=lambda job: job[0].suffix != ".cu")
        with ThreadPoolExecutor(self.parallel or 2) as pool:
            list(pool.map(lambda job: compile_object(*job), due))
        # CUDA's runtime is linked in: a machine has the driver, but need not have the runtime, nor
        # the same one.
        linker = (
            [*self.nvcc, *host_compiler(self.cxx), "-cudart=static", "-Xlinker=--exclude-libs=ALL"]
            if cuda
            else self.cxx
        )
        self.link(linker, [target for _, target, _ in jobs], Path(self.get_ext_fullpath(ext.name)), libraries)

    def link(self, linker: list[str], targets: list[Path], library: Path, folders: list[str]) -> None:
        """Link the objects to torch. No run path: `fusedmoe` imports torch first, and the loader
        takes the library already there.
        """
        library.parent.mkdir(parents=True, exist_ok=True)
        if library.exists() and all(target.stat().st_mtime <= library.stat().st_mtime for target in targets):
            return
        command = [
            *linker,
            "-shared",
            *map(str, targets),
            "-o",
            str(library),
            *(f"-L{path}" for path in folders),
            "-ltorch_cpu",
        ]
        if subprocess.run(command).returncode:
            raise SystemExit("fusedmoe: the extension does not link to torch; the linker's messages stand above.")


if int(__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    raise SystemExit(
        f"fusedmoe: building needs setuptools {OLDEST_SETUPTOOLS} or later, found {__version__}; {PREPARE}."
    )

# Packages that do not lie in fusedmoe/, and their folders: the kernels, the benchmark and the
# demonstration.
ELSEWHERE = {
    "fusedmoe.kernels": "kernels",
    "fusedmoe.kernels.triton": "kernels/triton",
    "fusedmoe.speed": "bench/speed",
    "fusedmoe.demo": "examples/census",
}

setup(
    package_dir={"fusedmoe": "fusedmoe", **ELSEWHERE},
    packages=[*find_packages(include=["fusedmoe", "fusedmoe.*"]), *ELSEWHERE],
    # What MANIFEST.in names goes into source archives alone: the data of the demonstration are
    # larger than a wheel may be.
    include_package_data=False,
    package_data={"fusedmoe": ["py.typed", "_C.pyi"]},
    ext_modules=[Extension(f"fusedmoe.{name}", sources=[]) for name in ("_C", *(["_cuda"] if with_cuda() else []))],
    cmdclass={"build_ext": Build},
)
