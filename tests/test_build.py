"""The build says in one sentence what it lacks, rebuilds only what changed, and leaves a clean
tree; what it installs is quick to import."""

import os
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(tmp_path: Path, *, before: str = "pass", **environment: str) -> subprocess.CompletedProcess:
    """Run setup.py with its outputs under `tmp_path`, after the statements `before`."""
    run = (
        f"import runpy, sys; {before}; sys.argv = ['setup.py', '--quiet', 'build_ext', '--build-lib', "
        f"{str(tmp_path)!r}]; runpy.run_path('setup.py')"
    )
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", run], cwd=ROOT, env=environment, capture_output=True, text=True)


def refused(result: subprocess.CompletedProcess) -> str:
    """The one sentence with which a build stopped."""
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("fusedmoe: building needs "), result.stderr
    return lines[0]


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return str(path)


def test_compiler_that_does_not_exist(tmp_path):
    message = refused(build(tmp_path, CXX="/nonexistent/g++"))
    assert "/nonexistent/g++" in message and "No such file" in message and "apt-get install g++" in message


@pytest.mark.parametrize(
    ("text", "reason"), [("echo out of order >&2; exit 1", "out of order"), ("exit 0", "wrote no object file")]
)
def test_broken_compiler(tmp_path, text, reason):
    message = refused(build(tmp_path, CXX=script(tmp_path / "broken", text)))
    assert reason in message and "apt-get install g++" in message


def test_no_compiler_at_all(tmp_path):
    message = refused(
        build(tmp_path, before="import os; os.environ.pop('CXX', None); os.environ['PATH'] = '/nonexistent'")
    )
    assert "found no g++, clang++ or c++" in message and "apt-get install g++" in message


def test_torch_missing(tmp_path):
    message = refused(build(tmp_path, before="sys.modules['torch'] = None"))
    assert "pip install torch" in message and "--no-build-isolation" in message


def test_torch_too_old(tmp_path):
    message = refused(build(tmp_path, before="import torch; torch.__version__ = '2.9.1'"))
    assert "2.10 or later, found 2.9.1" in message


def test_pybind11_missing(tmp_path):
    assert "pip install torch pybind11" in refused(build(tmp_path, before="sys.modules['pybind11'] = None"))


def test_setuptools_too_old(tmp_path):
    assert "setuptools 77 or later, found 65.0" in refused(
        build(tmp_path, before="import setuptools; setuptools.__version__ = '65.0'")
    )


def test_an_unknown_kind_of_build(tmp_path):
    assert "FUSEDMOE_BUILD to be cpu or cuda, found 'tpu'" in refused(build(tmp_path, FUSEDMOE_BUILD="tpu"))


def test_an_unknown_architecture(tmp_path):
    message = refused(build(tmp_path, FUSEDMOE_BUILD="cuda", FUSEDMOE_CUDA_ARCHS="90a 75"))
    assert "FUSEDMOE_CUDA_ARCHS to be some of 80 90a 100a 120, found '90a 75'" in message


@pytest.mark.parametrize("variable", ["NVCC", "CUDA_HOME"])
def test_nvcc_that_does_not_exist(tmp_path, variable):
    message = refused(build(tmp_path, **{"FUSEDMOE_BUILD": "cuda", "NVCC": "", variable: "/nonexistent"}))
    assert (
        "nvcc 12.8 or later for FUSEDMOE_BUILD=cuda, and '/nonexistent" in message
        and "No such file" in message
        and "pip install nvidia-cuda-nvcc" in message
    )


def test_nvcc_too_old(tmp_path):
    nvcc = script(tmp_path / "nvcc", "echo Cuda compilation tools, release 12.4, V12.4.131")
    assert "is none (release 12.4)" in refused(build(tmp_path, FUSEDMOE_BUILD="cuda", NVCC=nvcc))


def test_no_nvcc_at_all(tmp_path):
    before = (
        "import os, pathlib, shutil; which, exists = shutil.which, pathlib.Path.exists; "
        "[os.environ.pop(name, None) for name in ('NVCC', 'CUDA_HOME')]"
    )
    before += "; shutil.which = lambda name: None if name == 'nvcc' else which(name)"
    before += "; pathlib.Path.exists = lambda path: path.name != 'nvcc' and exists(path)"
    message = refused(build(tmp_path, before=before, FUSEDMOE_BUILD="cuda"))
    assert (
        "found none in $CUDA_HOME, on the path or in /usr/local/cuda" in message
        and "pip install nvidia-cuda-nvcc" in message
    )


def test_a_build_for_the_cpu_says_so_and_drops_the_cuda_kernels_of_an_earlier_one(tmp_path):
    left = tmp_path / "fusedmoe" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    left.parent.mkdir()
    left.touch()
    result = build(tmp_path, FUSEDMOE_BUILD="")
    assert result.returncode == 0, result.stderr
    assert "fusedmoe: building for the CPU alone; FUSEDMOE_BUILD=cuda adds the CUDA kernels" in result.stdout
    assert [path.name.split(".")[0] for path in left.parent.iterdir()] == ["_C"]


@pytest.fixture
def recipe(monkeypatch):
    """What setup.py defines, without running it."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(ROOT)
    return runpy.run_path("setup.py")


def test_an_object_is_stale_when_its_inputs_or_its_command_change(recipe, tmp_path):
    source, header, target = tmp_path / "a file.cpp", tmp_path / "part.h", tmp_path / "a.o"
    source.write_text('#include "part.h"\n')
    header.write_text("#pragma once\n")
    command = [
        *recipe["compiler"](),
        "-MMD",
        "-MF",
        str(target.with_suffix(".d")),
        "-c",
        str(source),
        "-o",
        str(target),
    ]
    stale = recipe["stale"]
    assert stale(target, command)
    recipe["compile_object"](source, target, command)
    assert not stale(target, command)
    # nvcc's list of inputs has a space in front of its colon.
    target.with_suffix(".d").write_text(f"{target} : {str(source).replace(' ', chr(92) + ' ')} \\\n    {header}\n")
    assert not stale(target, command)
    assert stale(target, [*command, "-O1"])
    after = target.stat().st_mtime + 1
    os.utime(header, (after, after))
    assert stale(target, command)
    recipe["compile_object"](source, target, command)
    header.unlink()
    assert stale(target, command)


def test_every_isa_has_an_object(recipe, tmp_path):
    names = [target.stem for _, target, _ in recipe["objects"](tmp_path)]
    assert len(names) == len(set(names))
    assert {f"cpu-isa-{isa}" for isa in recipe["ISAS"]} <= set(names) and "cpu-isa" not in names


def test_every_source_of_the_cuda_kernels_has_an_object(recipe, tmp_path):
    jobs = recipe["cuda_objects"](tmp_path)
    assert len({target for _, target, _ in jobs}) == len(jobs)
    assert {source.suffix for source, _, _ in jobs} == {".cu", ".cpp"}
    # What nvcc compiles knows no PyTorch, and what the compiler of the host does no CUDA.
    assert all("torch/" not in source.read_text() for source, _, _ in jobs if source.suffix == ".cu")
    assert all("cuda_runtime" not in source.read_text() for source, _, _ in jobs if source.suffix == ".cpp")


@pytest.mark.parametrize(("cxx", "host"), [("g++", "g++"), ("ccache clang++ -stdlib=libc++", "clang++")])
def test_the_hosts_compiler_of_nvcc(recipe, cxx, host):
    assert recipe["host_compiler"](cxx.split()) == ["-ccbin", host]


def recipe_of(target: str) -> str:
    """What `make` would run for a target."""
    return subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_demo_leaves_tracked_files_alone():
    assert "--picture build/demo.png" in recipe_of("demo") and "docs/" not in recipe_of("demo")
    assert "cp build/demo.png docs/demo.png" in recipe_of("picture")


@pytest.mark.parametrize("path", ["Makefile", ".ci/wheel"])
def test_pip_is_quiet_about_package_indices(path):
    """Once quiet it still prints a warning for every index that does not answer."""
    calls = [line for line in (ROOT / path).read_text().splitlines() if "-m pip " in line]
    assert calls and all(" -qq " in line for line in calls)


# Seconds of the processor beyond torch's own: what a user waits for at every start. Not of the
# clock, which runs on while others work.
LONGEST_IMPORT = 0.3


def test_import_is_quick():
    program = "import time, torch; start = time.process_time(); import fusedmoe; print(time.process_time() - start)"
    runs = [
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    assert min(float(run.stdout) for run in runs) < LONGEST_IMPORT
