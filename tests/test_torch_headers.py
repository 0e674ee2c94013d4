"""The claim "torch >= 2.10": every source that knows PyTorch compiles against the headers of each
version since then.

A wheel's folder `include` has them. That of macOS is the smallest, some 90 MB, and its headers of
the stable ABI are byte for byte those of Linux; what is needed of it, 2 MB a version, is kept in
build/torch-headers for later runs.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
VERSIONS = ("2.10.0", "2.11.0", "2.12.0", "2.13.0")
# torch's pybind11 too: it must not come in front of the installed one.
FOLDERS = ("torch/csrc/stable", "torch/headeronly", "torch/csrc/inductor/aoti_torch", "pybind11")
NEEDED = tuple(f"torch/include/{folder}/" for folder in FOLDERS)
PIP = (sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps")
MACOS = ("--only-binary=:all:", "--python-version=3.12", "--platform=macosx_11_0_arm64", "--platform=macosx_14_0_arm64")


@pytest.fixture(scope="module")
def recipe():
    """What setup.py defines, without running it."""
    import setuptools

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(ROOT / "setup.py"))


def headers(version: str) -> Path:
    """The include folder of a version, fetched if it is not there yet; skips where it cannot be."""
    kept = ROOT / "build" / "torch-headers" / version
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            command = [*PIP, *MACOS, f"--dest={folder}", f"torch=={version}"]
            fetched = subprocess.run(command, capture_output=True, text=True)
            wheels = list(Path(folder).glob("torch-*.whl"))
            if not wheels:
                reason = (fetched.stderr.strip().splitlines() or ["no wheel"])[-1]
                pytest.skip(f"torch headers: expected a package registry with torch {version}, got {reason}")
            with zipfile.ZipFile(wheels[0]) as wheel:
                names = [name for name in wheel.namelist() if name.startswith(NEEDED)]
                wheel.extractall(Path(folder, "unpacked"), names)
            # Another process may have been first.
            if not kept.exists():
                Path(folder, "unpacked", "torch", "include").rename(kept)
    return kept


def with_headers(path: Path, seen: set[Path] | None = None) -> set[Path]:
    """A source and our own headers that it includes, and that these include."""
    seen = set() if seen is None else seen
    if path not in seen:
        seen.add(path)
        for name in re.findall(r'^#include "(.+)"', path.read_text(), re.MULTILINE):
            found = (folder / name for folder in (path.parent, ROOT / "csrc"))
            with_headers(next(file for file in found if file.exists()), seen)
    return seen


def knows(path: Path, *folders: str) -> bool:
    """Whether a source includes something of these folders, itself or by our headers."""
    return any(f"#include <{folder}/" in one.read_text() for one in with_headers(path) for folder in folders)


HOST = [path for folder in ("csrc", "csrc/cpu", "csrc/cuda") for path in sorted((ROOT / folder).glob("*.cpp"))]
SOURCES = [path for path in HOST if knows(path, "torch", "pybind11")]


def test_the_versions_are_those_from_the_oldest_to_the_pinned_one(recipe):
    pinned = re.search(r"^torch==(\S+)$", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)[1]
    first, *_, last = [tuple(map(int, version.split(".")[:2])) for version in VERSIONS]
    assert first == recipe["OLDEST_TORCH"] and VERSIONS[-1] == pinned
    assert len(VERSIONS) == last[1] - first[1] + 1 and last[0] == first[0]


def test_the_sources_are_those_that_know_torch():
    names = {path.relative_to(ROOT / "csrc").as_posix() for path in SOURCES}
    assert {"bindings.cpp", "frozen.cpp", "host.cpp", "guards.cpp", "cuda/bindings.cpp", "cuda/stream.cpp"} <= names


def compile_against(recipe, folder: Path, source: Path) -> str:
    """What the compiler says of a source, with setup.py's flags and its order of folders.

    No code is generated, which takes longest, but templates are instantiated: the last test holds
    the compiler to that.
    """
    words = recipe["system_folders"](recipe["python_folders"](), [str(folder)])
    flags = [*recipe["FLAGS"], "-fsyntax-only", f"-I{ROOT / 'csrc'}"]
    command = [*recipe["compiler"](), *flags, *words, str(source)]
    return subprocess.run(command, capture_output=True, text=True).stderr


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.relative_to(ROOT / "csrc").as_posix())
def test_a_source_compiles(recipe, source, version):
    said = compile_against(recipe, headers(version), source)
    assert said == "", said[:3000]


@pytest.mark.slow
def test_what_is_newer_is_noticed(recipe, tmp_path):
    """What 2.13 has and 2.10 lacks fails, though it stands in a template."""
    source = tmp_path / "newer.cpp"
    source.write_text(
        "#include <torch/csrc/stable/accelerator.h>\n#include <torch/csrc/stable/ops.h>\n"
        "template <class T> void ask(T value) { STABLE_TORCH_ERROR_CODE_CHECK(value); }\nvoid use() { ask(0); }\n"
    )
    assert "STABLE_TORCH_ERROR_CODE_CHECK" in compile_against(recipe, headers(VERSIONS[0]), source)
    assert compile_against(recipe, headers(VERSIONS[-1]), source) == ""
