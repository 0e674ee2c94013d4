"""`make gpu` run once, on the stub of CUDA's driver, in an environment from which no package
registry can be reached."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
# What stands for the tools of NVIDIA that watch a process: they run it, and say what the real ones
# say of a sound one.
SANITIZER = """#!/usr/bin/env bash
while [[ $1 == -* || $1 == memcheck || $1 == racecheck || $1 == all ]]; do tool=$1; shift; done
"$@" || exit
echo "========= COMPUTE-SANITIZER"
echo "========= ERROR SUMMARY: 0 errors"
"""
NCU = """#!/usr/bin/env bash
while [[ $1 != *python* ]]; do shift; done
"$@" || exit
echo "==PROF== Connected to process 1"
echo '"ID","Kernel Name","gpu__time_duration.sum","lts__t_bytes.sum","device__attribute_warp_size"'
echo '"","","us","Mbyte",""'
echo '"0","forward","21.5","12.0","32"'
echo '"1","void at::native::fill","1.0","0.1","32"'
echo '"2","forward","31.5","14.0","32"'
echo '"3","backward_rows","41.5","15.0","32"'
"""
# Not a link: a virtual environment's Python finds its packages by the place that it is called at.
PYTHON = f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n'
PIP = (
    "from pathlib import Path\n\nPath(__file__).with_name('called').touch()\nraise SystemExit('a "
    "rehearsal calls no pip')\n"
)


def stub():
    """The module tests/cuda_stub/build.py, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("cuda_stub_build", ROOT / "tests/cuda_stub/build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def offline() -> list[str]:
    """What in front of a command takes the network away from it, where this user may: elsewhere
    pip's absence must do."""
    command = ["unshare", "--net", "true"]
    may = shutil.which("unshare") and subprocess.run(command, capture_output=True).returncode == 0
    return command[:-1] if may else []


class Rehearsal(NamedTuple):
    """What `make gpu` left: its status, the JSON, the launches, the folder of both, and the
    environment that it ran in."""

    status: int
    said: str
    content: dict
    launches: list[dict]
    folder: Path
    environment: dict[str, str]

    def results(self, letter: str) -> dict[str, dict]:
        return self.content["parts"][letter]["results"]

    def make(self, *words: str, **variables: str) -> subprocess.CompletedProcess:
        """Run make again, with other variables; None takes one away."""
        environment = {name: value for name, value in (self.environment | variables).items() if value}
        return make(environment, *words)


def make(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*offline(), "make", "-C", str(ROOT), *words], capture_output=True, text=True, env=environment
    )


def environment_of(folder: Path) -> dict[str, str]:
    """The environment of a session on a machine with a device: a Python on the path, no virtual
    environment that is active, no registry."""
    built = stub()
    library = built.build()
    tools = folder / "bin"
    (folder / "site/pip").mkdir(parents=True)
    (folder / "site/pip/__main__.py").write_text(PIP)
    tools.mkdir()
    for name, text in (
        ("compute-sanitizer", SANITIZER),
        ("ncu", NCU),
        ("pip", "#!/usr/bin/env bash\npython3 -m pip\n"),
        ("python3", PYTHON),
    ):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    result = {
        name: value
        for name, value in os.environ.items()
        if name not in ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "MAKEFLAGS", "GPU_CASES")
    }
    result |= built.environment(library, folder / "launches.jsonl")
    result |= {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder / "site"),
        "PIP_NO_INDEX": "1",
    }
    # Every tensor in memory of its own, so that an address of one that is gone shows. What cannot
    # pass here does not stop what stands behind it.
    result |= {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "FUSEDMOE_SELF_TEST": "0",
        "GPU_CASES": "few",
        "GPU_PATIENCE": "10",
        "STUB_CUDA_BRIEF": "1",
    }
    result.setdefault("FUSEDMOE_BUILD", "cpu")
    if (wrapper := library.parent / "nvcc").exists():
        result["NVCC"] = str(wrapper)
    return result


@pytest.fixture(scope="session")
def rehearsed(tmp_path_factory) -> Rehearsal:
    if torch.version.cuda is None:
        pytest.skip("rehearsal: expected a build of torch for CUDA, got one without")
    folder = tmp_path_factory.mktemp("rehearsal")
    environment = environment_of(folder)
    done = make(environment, "gpu", f"GPU_JSON={folder / 'gpu.json'}")
    print(done.stdout[-5000:], done.stderr[-5000:])
    launches = [json.loads(line) for line in (folder / "launches.jsonl").read_text().splitlines()]
    return Rehearsal(
        done.returncode,
        done.stdout + done.stderr,
        json.loads((folder / "gpu.json").read_text()),
        launches,
        folder,
        environment,
    )
