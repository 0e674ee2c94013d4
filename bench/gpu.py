"""Time the fused layers on a GPU against eager, a CUDA graph of eager and `torch.compile`, count launches, and write one report.

    python bench/gpu.py [--json bench/results/gpu.json]

Times are of the device: medians of CUDA events around many calls, the arms in turn, after parity was asserted. Without a device it says so and
ends; it has never run on one.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fusedmoe
from fusedmoe.kernels import trial
from fusedmoe.kernels.launchers import LAUNCHERS
from fusedmoe.speed.parity import allowed_in_norm, norm_error
from fusedmoe.speed.subjects import MAIN, SUBJECTS, Called, build

BATCHES = (16, 256, 4096)
DTYPES = ("bfloat16", "float32")
MODES = ("inference", "training step")
ROUNDS, CALLS = 20, 10

Call = Callable[[], Tensor]


def call_of(network: nn.Module, mode: str, x: Tensor) -> Call:
    """Return one inference, or one forward and backward that returns d_x."""
    params = list(network.parameters())

    def inference() -> Tensor:
        with torch.inference_mode():
            return network(x)

    def step() -> Tensor:
        leaf = x.detach().requires_grad_()
        out = network(leaf)
        return torch.autograd.grad(out, [leaf, *params], torch.ones_like(out), allow_unused=True)[0]

    return inference if mode == "inference" else step


def graph_of(call: Call) -> Call:
    """Return the replay of a CUDA graph of a call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def milliseconds(call: Call) -> float:
    """Return the time of one call on the device, over CALLS of them."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / CALLS


def launches(call: Call) -> int:
    """Return how many kernels one call runs on the device, by the profiler."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)


def ours() -> list[str]:
    """The backends for GPUs that can run here."""
    return [name for name, reason in fusedmoe.backends().items() if name in LAUNCHERS and reason is None]


def arms_of(name: str, mode: str, rows: int, dtype: torch.dtype) -> dict[str, Call]:
    """Return the arms of one case by name: eager, its CUDA graph, `torch.compile`, and ours on each backend for GPUs that can run here, and its CUDA graph."""
    layer = build(SUBJECTS[name], dtype)
    network = Called(layer.module, layer.slots).cuda().train(mode != "inference")
    x = torch.randn(rows, layer.table.width, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    eager = call_of(network, mode, x)
    arms = {"eager": eager, "eager, CUDA graph": graph_of(eager), "torch.compile": call_of(torch.compile(copy.deepcopy(network)), mode, x)}
    for backend in ours():
        fused = copy.deepcopy(network)
        fusedmoe.fuse(fused, backend=backend)
        call = call_of(fused, mode, x)
        arms |= {backend: call, f"{backend}, CUDA graph": graph_of(call)}
    return arms


def check(arms: dict[str, Call], dtype: str) -> None:
    """Raise AssertionError unless every arm's result is as near to eager's as rounding explains."""
    truth = arms["eager"]().double()
    for name, call in arms.items():
        off, allowed = norm_error(call().double(), truth), allowed_in_norm(0.0, truth, dtype)
        if off > allowed:
            raise AssertionError(f"{name}: expected a result within {allowed:.3g} of eager's in the norm, got {off:.3g}")


def measure(name: str, mode: str, rows: int, dtype: str) -> dict[str, object]:
    """Check one case, time its arms in turn, and return its record."""
    arms = arms_of(name, mode, rows, getattr(torch, dtype))
    check(arms, dtype)
    times: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(ROUNDS):
        for arm, call in arms.items():
            times[arm].append(milliseconds(call))
    medians = {arm: statistics.median(values) for arm, values in times.items()}
    counts = {arm: launches(arms[arm]) for arm in ("eager", "torch.compile", *ours())}
    return {"layer": name, "mode": mode, "batch": rows, "dtype": dtype, "milliseconds": medians, "launches": counts}


def main() -> int:
    """Measure every case and write the report; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=Path("bench/results/gpu.json"), help="where to save the report (default: %(default)s)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu: expected a device, got a machine without one; nothing was timed")
        return 0
    current = torch.device("cuda", torch.cuda.current_device())
    device = f"{trial.name_of(current)} ({'; '.join(f'{backend} {trial.history(current, backend)}' for backend in ours())})"
    records = []
    for dtype in DTYPES:
        for name in MAIN:
            for mode in MODES:
                for rows in BATCHES:
                    records.append(measure(name, mode, rows, dtype))
                    print(json.dumps(records[-1]), flush=True)
                    report = {"device": device, "torch": torch.__version__, "fusedmoe": fusedmoe.__version__, "cases": records}
                    options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
