"""Launches without Triton's search for the compiled kernel: what csrc/triton.cpp hands to the
driver is what Triton hands to it, and it knows when not to."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="gpu_free: expected the package triton, which compiles without a device, got none")

from fusedmoe.kernels.triton import launch, step

ROOT = Path(__file__).parents[2]
STUB = ROOT / "tests" / "cuda_stub" / "build.py"

# Each direction thrice: Triton, then the operator; then x at an odd address, which is Triton's
# again. Results are kept, so that addresses differ.
PROGRAM = """
import os
import torch
from fusedmoe.op import fusion_network
from fusedmoe.parts import Dropout, Expert, Gate, Input, LayerNorm, Level, Linear, Unit, from_slots
from fusedmoe.table import Table
from fusedmoe.testing import build
from fusedmoe.kernels.triton import step

table = build("adatt_sp", 16, [[16], [16]], 2, 2, towers=(16, 1))
if ROWWISE:
    experts = Expert(from_slots(0), (Linear(16), LayerNorm(), Dropout(0.5))), Expert(from_slots(1))
    table = Table((Input(2, 16),), (Level(experts, (Unit(Gate((), (0, 1))), Unit(product=(0, 1)))),))
params = [torch.zeros(p.shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for p in table.parameters]
wide = torch.zeros(ROWS * 32 + 8, device="cuda", dtype=torch.bfloat16)
results, by_triton, plain = [], [], step.Step.launch
step.Step.launch = lambda *arguments: (by_triton.append(turn), plain(*arguments))[1]
for turn, first in enumerate((0, 0, 1)):
    x = wide[first : first + ROWS * 32].view(ROWS, 2, 16).requires_grad_()
    with torch.no_grad():
        results.append(fusion_network(x, params, table, "triton"))
    out, weights = fusion_network(x, params, table, "triton", return_mixing_weights=True)
    results.append(torch.autograd.grad([out, *weights], [x, *params], [torch.zeros_like(t) for t in (out, *weights)]))
print(*sorted(set(by_triton)), flush=True)
# PyTorch's thread of the backward may be dropping its results while Python ends, which aborts the process.
os._exit(0)
"""


@pytest.fixture(scope="module")
def stub():
    if not STUB.exists() or torch.version.cuda is None:
        pytest.skip("stub of CUDA's driver: expected it and a build of torch for CUDA, got none")
    spec = importlib.util.spec_from_file_location("cuda_stub_build", STUB)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "dtype", "rowwise"),
    [(16, "bfloat16", False), (300, "float32", False), (300, "bfloat16", True)],
    ids=["one launch", "a launch a level", "row-wise operations"],
)
def test_the_driver_is_given_the_same_words(rows, dtype, rowwise, stub, tmp_path):
    """The same kernels, grids, shared memory and numbers, launch by launch; of addresses, that
    there are as many."""
    log = tmp_path / "launches"
    environment = {
        **os.environ,
        **stub.environment(stub.build(), log),
        "FUSEDMOE_SELF_TEST": "0",
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
    }
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            PROGRAM.replace("ROWWISE", str(rowwise)).replace("ROWS", str(rows)).replace("bfloat16", dtype),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["0", "2"], "expected Triton's own launches in the first turn and the last one"
    launches = [one for line in log.read_text().splitlines() if (one := json.loads(line)).get("launch") in KERNELS]
    third = len(launches) // 3
    assert third and len(launches) == 3 * third
    for triton, direct in zip(launches[:third], launches[third : 2 * third], strict=True):
        assert words(triton) == words(direct)


KERNELS = ("forward", "rowwise_forward", "backward_rows", "rowwise_backward", "gradients", "add_chunks")


def words(launch: dict) -> dict:
    """A launch without its addresses, which are eight bytes."""
    return {**launch, "parameters": [word if len(word) == 8 else len(word) for word in launch["parameters"]]}


def compiled(**changed: object) -> SimpleNamespace:
    """A compiled kernel of two arguments and a constant, but for what is changed."""
    kinds = {"x": "*bf16", "B": "i32", "BLOCK": "constexpr", **changed.pop("kinds", {})}
    target = SimpleNamespace(backend=changed.pop("backend", "cuda"), warp_size=32)
    plain = {
        "num_ctas": 1,
        "launch_cooperative_grid": False,
        "launch_pdl": False,
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
    }
    metadata = SimpleNamespace(**{"num_warps": 4, "shared": 1024, "target": target, **plain, **changed})
    params = [SimpleNamespace(is_constexpr=name == "BLOCK") for name in kinds]
    return SimpleNamespace(
        metadata=metadata, function=1 << 40, src=SimpleNamespace(signature=kinds, fn=SimpleNamespace(params=params))
    )


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setattr(step, "VERSION", step.DIRECT[0])


def test_a_plain_kernel_is_launched_directly(known):
    assert step.function_of(compiled()) == (1 << 40, 128, 1024)


ODD = {
    "clusters": {"num_ctas": 2},
    "a cooperative grid": {"launch_cooperative_grid": True},
    "a programmatic launch": {"launch_pdl": True},
    "scratch": {"global_scratch_size": 8},
    "a profile": {"profile_scratch_size": 8},
    "another maker's device": {"backend": "hip"},
    "a number of 64 bits": {"kinds": {"B": "i64"}},
    "a number that became a constant": {"kinds": {"B": "constexpr"}},
}


@pytest.mark.parametrize("what", ODD)
def test_others_are_left_to_triton(what, known):
    assert step.function_of(compiled(**ODD[what])) is None


def test_an_unknown_version_is_left_to_triton(monkeypatch):
    monkeypatch.setattr(step, "VERSION", (99, 0))
    assert step.function_of(compiled()) is None


def test_whoever_watches_launches_sees_them(monkeypatch):
    """Triton tells its profiler's hooks of its own launches alone."""
    assert not launch.watched()
    hook = lambda metadata: None  # noqa: E731
    launch.knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert launch.watched()
    finally:
        launch.knobs.runtime.launch_enter_hook.remove(hook)
    assert not launch.watched()
