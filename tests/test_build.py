"""The build says in one sentence what it lacks, rebuilds only what changed, and leaves a clean tree; what it installs is quick to import."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(tmp_path: Path, *, before: str = "pass", **environment: str) -> subprocess.CompletedProcess:
    """Run setup.py with its outputs under `tmp_path`, after the statements `before`."""
    run = f"import runpy, sys; {before}; sys.argv = ['setup.py', '--quiet', 'build_ext', '--build-lib', {str(tmp_path)!r}]; runpy.run_path('setup.py')"
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


@pytest.mark.parametrize(("text", "reason"), [("echo out of order >&2; exit 1", "out of order"), ("exit 0", "wrote no object file")])
def test_broken_compiler(tmp_path, text, reason):
    message = refused(build(tmp_path, CXX=script(tmp_path / "broken", text)))
    assert reason in message and "apt-get install g++" in message


def test_no_compiler_at_all(tmp_path):
    message = refused(build(tmp_path, before="import os; os.environ.pop('CXX', None); os.environ['PATH'] = '/nonexistent'"))
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
    assert "setuptools 77 or later, found 65.0" in refused(build(tmp_path, before="import setuptools; setuptools.__version__ = '65.0'"))


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
    command = [*recipe["compiler"](), "-MMD", "-MF", str(target.with_suffix(".d")), "-c", str(source), "-o", str(target)]
    stale = recipe["stale"]
    assert stale(target, command)
    recipe["compile_object"](source, target, command)
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


# Seconds of the processor beyond torch's own: what a user waits for at every start. Not of the clock, which runs on while others work.
LONGEST_IMPORT = 0.3


def test_import_is_quick():
    program = "import time, torch; start = time.process_time(); import fusedmoe; print(time.process_time() - start)"
    runs = [subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < LONGEST_IMPORT
