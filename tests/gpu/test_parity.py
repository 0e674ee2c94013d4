"""Rung 9 of docs/gpu.md: every case on a device, output, mixing weights and all gradients by name.
Skipped, with a sentence, where there is none."""

import importlib.util
from functools import partial

import pytest
import torch

from fusedmoe.backends import BACKENDS
from fusedmoe.op import fusion_network
from fusedmoe.testing import Problem, assert_close, cases, evaluate, expectation, problem, smoothed

CASES = cases()
# What is not built is not tested; what is here and does not run fails, with its reason.
NOT_BUILT = pytest.mark.skipif(
    importlib.util.find_spec("fusedmoe._cuda") is None,
    reason="gpu: expected the CUDA kernels, got a build without (FUSEDMOE_BUILD=cuda)",
)
GPU_BACKENDS = [
    pytest.param(row.name, marks=NOT_BUILT) if row.name == "cuda" else row.name
    for row in BACKENDS
    if row.devices and "cuda" in row.devices
]
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="gpu: expected a device, got a machine without one"
)


def on(device: str, given: Problem) -> Problem:
    """The same problem with its tensors on a device."""
    params = tuple(p.to(device) for p in given.params)
    return given._replace(
        x=given.x.to(device),
        params=params,
        d_out=given.d_out.to(device),
        d_weights=tuple(d.to(device) for d in given.d_weights),
    )


def results(backend: str, given: Problem, device: str = "cuda") -> dict[str, torch.Tensor | None]:
    """Output, mixing weights and gradients, back on the CPU."""
    network = partial(fusion_network, backend=backend, return_mixing_weights=True)
    return {
        name: None if value is None else value.cpu() for name, value in evaluate(network, on(device, given)).items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("name", sorted(CASES))
def test_parity(name, backend, dtype):
    """In 16 bits without kinks: nearly every row has a pre-activation within rounding of one."""
    case = CASES[name] if dtype == torch.float32 else CASES[name]._replace(table=smoothed(CASES[name].table))
    given = problem(case, dtype)
    assert_close(results(backend, given), expectation(given))


@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("name", ["adatt_sp-odd", "ple-odd", "every_feature"])
def test_bits_are_the_same_from_run_to_run(name, backend):
    given = problem(CASES[name], torch.float32)
    first, second = results(backend, given), results(backend, given)
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_another_device_than_the_current_one(backend):
    if torch.cuda.device_count() < 2:
        pytest.skip("gpu: expected two devices, got one")
    given = problem(CASES["adatt_sp-odd"], torch.float32)
    with torch.cuda.device(0):
        assert_close(results(backend, given, "cuda:1"), expectation(given))


@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_the_current_stream(backend):
    """What the same stream writes late is what forward and backward read."""
    given = on("cuda", problem(CASES["adatt_sp-odd"], torch.float32))

    def step(x: torch.Tensor) -> list[torch.Tensor]:
        leaf = x.detach().requires_grad_()
        out = fusion_network(leaf, given.params, given.table, backend=backend)
        return [out, *torch.autograd.grad(out, leaf, given.d_out)]

    expected, late = step(given.x), torch.zeros_like(given.x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # Tens of milliseconds, in which a launch on another stream would read the zeros.
        torch.cuda._sleep(50_000_000)
        late.copy_(given.x)
        found = step(late)
    torch.cuda.synchronize()
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_a_cuda_graph(backend, autocast):
    """Forward and backward are captured after one warm-up, and a replay computes with what then
    stands in the tensors.

    Under autocast the parameters are cast into memory of the graph's own.
    """
    given = on("cuda", problem(CASES["adatt_sp-odd"], torch.float32))
    x, params = given.x.requires_grad_(), [p.requires_grad_() for p in given.params]

    def step() -> list[torch.Tensor]:
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
            out = fusion_network(x, params, given.table, backend=backend)
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
        return [out.detach(), *torch.autograd.grad(out, [x, *params], given.d_out.to(out.dtype))]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.mul_(0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_tuned_tiles(monkeypatch, tmp_path):
    """Every candidate compiles or is left out, and the fastest is right."""
    from fusedmoe.kernels.triton import tuning

    monkeypatch.setenv("FUSEDMOE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "enabled", lambda: True)
    given = problem(CASES["adatt_sp-odd"], torch.float32)
    assert_close(results("triton", given), expectation(given))
    assert {path.name[:6] for path in tmp_path.iterdir()} == {"tiles-"}
