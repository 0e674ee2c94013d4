"""What the rehearsal of `make gpu` must show on a device that takes every launch and runs none:
everything but right numbers."""

import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PARTS = "abcdef"
# Where `make gpu` builds the package.
LIBRARY = Path(__file__).parent.parent.parent / "build/gpu" / f"lib-{sys.implementation.cache_tag}"
# The launches of each backend: names of Triton's kernels, and what stands in the mangled names of
# nvcc's.
KERNELS = {
    "triton": ("forward", "backward_rows", "gradients", "add_chunks"),
    "cuda": ("14forward_kernel", "20backward_rows_kernel", "16gradients_kernel"),
}


def backends(rehearsed) -> list[str]:
    return [name for name in KERNELS if rehearsed.results("a")["versions"]["backends"][name] is None]


def of_kernel(rehearsed, kernel: str) -> list[dict]:
    found = (one for one in rehearsed.launches if "launch" in one)
    return [
        one
        for one in found
        if one["launch"] == kernel or ("fusedmoe4cuda" in one["launch"] and kernel in one["launch"])
    ]


def ours(rehearsed) -> list[dict]:
    return [one for names in KERNELS.values() for kernel in names for one in of_kernel(rehearsed, kernel)]


def test_every_part_runs_to_its_end(rehearsed):
    assert {letter: part["status"] for letter, part in rehearsed.content["parts"].items()} == dict.fromkeys(
        PARTS, "done"
    )
    assert rehearsed.content["head"]["device"] == {"name": "stub of an H100", "capability": [9, 0], "compute_mode": 0}
    assert all(rehearsed.results(letter) for letter in PARTS)
    assert backends(rehearsed) == [
        name for name in KERNELS if name == "triton" or rehearsed.environment["FUSEDMOE_BUILD"] == "cuda"
    ]
    # Cases failed, as they must here, and the whole says so.
    assert rehearsed.status != 0


def test_no_package_is_asked_for(rehearsed):
    assert not (rehearsed.folder / "site/pip/called").exists(), rehearsed.said


def test_wrong_numbers_are_reported_by_tensor_and_error(rehearsed):
    results = rehearsed.results("b")
    for dtype in ("bfloat16", "float32"):
        for backend in backends(rehearsed):
            assert (
                "expected errors of at most 1 x the one allowed, got"
                in results[f"self-test, {dtype}, {backend}"]["error"]
            )
            error = results[f"every_feature, {dtype}, {backend}"]["error"]
            assert "59 differ: " in error
            assert re.search(
                r"\b(out|d_x|weights\.\d|d_[a-z]+\.[\w.]+): expected an error of at most \S+, got \S+ \(\[", error
            )
    assert "FAILED" not in results["tests/gpu"]["error"]
    assert "test_the_current_stream[triton]" in results["tests/gpu"]["error"]


def test_captures_are_refused_and_reported(rehearsed):
    for result in rehearsed.results("c").values():
        arms = result["arms"]
        graphs = [found for name, found in arms.items() if name.endswith("CUDA graph")]
        assert graphs
        assert all("operation not supported" in found["error"] for found in graphs)
        assert {"eager", *backends(rehearsed)} <= {
            name for name, found in arms.items() if found.get("device_ms", 0) > 0 and found["host_us"] > 0
        }
    shares = [result for key, result in rehearsed.results("d").items() if key != "ceilings"]
    assert shares
    assert all(
        result["how"].startswith("in a stream; no graph: ") and result["bytes_once"] > 0 and result["flops"] > 0
        for result in shares
    )


def test_compiled_arms_are_timed(rehearsed):
    (result,) = (result for key, result in rehearsed.results("c").items() if key.endswith("torch.compile"))
    assert result["arms"]["torch.compile"]["device_ms"] > 0


def test_every_kernel_is_launched_as_a_driver_takes_it(rehearsed):
    """The stub refuses what a driver would: grids, blocks and shared memory beyond limits, streams
    that are none."""
    for backend in backends(rehearsed):
        for kernel in KERNELS[backend]:
            assert of_kernel(rehearsed, kernel), kernel
    refused = [one for one in rehearsed.launches if one.get("launch") and one["refused"]]
    assert refused == []


def test_more_shared_memory_than_without_asking_is_asked_for(rehearsed):
    assert any(one["shared"] > 48 * 1024 for one in ours(rehearsed))


def test_every_address_of_a_launch_is_of_live_memory(rehearsed):
    launches = ours(rehearsed)
    assert launches
    # RowsCall ends in three bools, and what a struct has behind its last member is whatever was
    # there.
    padding = {one["launch"]: {one["bytes"] - 8} for one in launches if "20backward_rows_kernel" in one["launch"]}
    stray = [one for one in launches if set(one["stray"]) - padding.get(one["launch"], set())]
    assert stray == []
    assert all(one["live"] >= 2 for one in launches)


def test_launches_are_on_the_current_stream(rehearsed):
    """tests/gpu runs forward and backward on a stream of its own; part c times on the default one."""
    for backend in backends(rehearsed):
        for kernel in KERNELS[backend][:2]:
            assert {0} < {one["stream"] for one in of_kernel(rehearsed, kernel)}, kernel


def test_tools_are_called_and_read(rehearsed):
    results = rehearsed.results("e")
    for backend in backends(rehearsed):
        assert results[f"memcheck, {backend}"]["summary"] == "ERROR SUMMARY: 0 errors"
        assert results[f"racecheck, {backend}"]["summary"] == "ERROR SUMMARY: 0 errors"
        kernels = results[f"ncu, {backend}"]["kernels"]
        assert kernels["forward"] == {"gpu__time_duration.sum": "21.5 us", "lts__t_bytes.sum": "12.0 Mbyte"}
        assert list(kernels) == ["forward", "backward_rows"]


def test_tiles_are_tried(rehearsed):
    for result in rehearsed.results("f").values():
        assert len(result["chosen"]["inference"]["milliseconds"]) > 1


def test_the_report_has_what_was_found_and_no_more(rehearsed):
    done = rehearsed.make("gpu-report", f"GPU_JSON={rehearsed.folder / 'gpu.json'}")
    assert done.returncode == 0, done.stderr
    page = (rehearsed.folder / "gpu.md").read_text()
    assert [line[3] for line in page.splitlines() if line.startswith("## ")] == list(PARTS)
    assert "None" not in page
    assert "nan" not in page.split()
    for part in rehearsed.content["parts"].values():
        for key, result in part["results"].items():
            assert "error" not in result or f"- {key}: error: " in page


def test_recorded_captures_are_timed_as_graphs(rehearsed):
    path = rehearsed.folder / "recorded.json"
    done = rehearsed.make("gpu", f"GPU_JSON={path}", "PART=d", STUB_CUDA_CAPTURE="record")
    assert path.exists(), done.stdout + done.stderr
    shares = [
        result for key, result in json.loads(path.read_text())["parts"]["d"]["results"].items() if key != "ceilings"
    ]
    assert shares
    assert {result["how"] for result in shares} == {"CUDA graph"}


def test_parts_behind_a_failed_self_test_are_left_out(rehearsed):
    path = rehearsed.folder / "failed.json"
    path.write_text(json.dumps({"head": {}, "parts": {"b": rehearsed.content["parts"]["b"]}}))
    for part in "cf":
        done = rehearsed.make("gpu", f"GPU_JSON={path}", f"PART={part}", FUSEDMOE_SELF_TEST="")
        assert done.returncode != 0
        found = json.loads(path.read_text())["parts"][part]
        assert found["status"].startswith(
            "skipped: no backend passed the self-test (triton in bfloat16: AssertionError: expected errors of "
            "at most 1 x"
        )
        assert found["results"] == {}


CALL = """
import sys, torch
from fusedmoe.families import mmoe
from fusedmoe.op import fusion_network
table = mmoe(8, [[6]], 2, 3)
params = [torch.zeros(p.shape, device="cuda", requires_grad=True) for p in table.parameters]
out = fusion_network(torch.zeros(5, table.inputs[0].slots, 8, device="cuda"), params, table, backend=sys.argv[1])
out.sum().backward()
"""


@pytest.mark.parametrize("kernel", ["forward", "backward_rows", "gradients"])
@pytest.mark.parametrize("backend", list(KERNELS))
def test_a_refused_launch_raises(rehearsed, backend, kernel):
    if backend not in backends(rehearsed):
        pytest.skip("rehearsal: expected FUSEDMOE_BUILD=cuda for the CUDA kernels")
    environment = rehearsed.environment | {"STUB_CUDA_REFUSE": kernel, "PYTHONPATH": str(LIBRARY)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(CALL), backend], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: ")
    assert f"{backend}: the launch of {kernel} failed" in last
    assert re.search("invalid argument|CUDA_ERROR_INVALID_VALUE", last)
