"""What the parts of `make gpu` that time have in common: which backends may run, the arms of a
case, and two clocks."""

from __future__ import annotations

import copy
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import gpu_cases
import torch
from gpu_cases import Skipped
from torch import Tensor, nn

import fusedmoe
from fusedmoe.kernels import self_test
from fusedmoe.kernels.launchers import LAUNCHERS
from fusedmoe.speed.calls import MODES, Call
from fusedmoe.speed.parity import allowed_in_norm, norm_error
from fusedmoe.speed.restructured import Restructured
from fusedmoe.speed.subjects import SUBJECTS, Called, Layer, Work, build

ROUNDS = 20
# So many calls between two events, and between two reads of the host's clock: few enough for the
# queue of launches.
CALLS = 10
# Milliseconds of the calls between two events, where one is shorter.
SHORTEST = 3.0
# Rows whose results are held against float64.
CHECKED = 512
DEVICE = torch.device("cuda", 0)
# Whether whoever runs this asks for times of kernels that err: a rehearsal on a device that
# computes nothing.
DESPITE = os.environ.get("FUSEDMOE_SELF_TEST") == "0"


class Cell(NamedTuple):
    """What is timed: a layer of `subjects`, the mode, the rows and the dtype."""

    layer: str
    mode: str
    rows: int
    dtype: str

    @property
    def key(self) -> str:
        return f"{self.layer}, {self.mode}, {self.rows} rows, {self.dtype}"


def present() -> list[str]:
    """The backends for GPUs that this machine can run."""
    return [name for name, reason in fusedmoe.available_backends().items() if name in LAUNCHERS and reason is None]


def verdict(book: dict, backend: str, dtype: str) -> str | None:
    """Return why the kernels of a backend must not be used in a dtype, by part b's self-test, or by
    one now where b has none; None: they are right."""
    if DESPITE:
        return None
    found = book["parts"].get("b", {}).get("results", {}).get(f"self-test, {dtype}, {backend}")
    if found is None:
        try:
            self_test.check(DEVICE, getattr(torch, dtype), backend)
        except RuntimeError as error:
            return str(error)
        return None
    return found.get("error") or found.get("skipped")


def proven(book: dict, dtypes: tuple[str, ...]) -> dict[str, list[str]]:
    """Return the backends that passed the self-test, by dtype, and run no further one in this
    process. Raises: Skipped where none has."""
    faults, right = [], {dtype: [] for dtype in dtypes}
    for dtype in dtypes:
        for backend in present():
            if fault := verdict(book, backend, dtype):
                faults.append(f"{backend} in {dtype}: {fault}")
                print(f"left out: {faults[-1]}", flush=True)
            else:
                right[dtype].append(backend)
    if not any(right.values()):
        raise Skipped(
            f"no backend passed the self-test ({'; '.join(faults) or 'there is none'}); FUSEDMOE_SELF_TEST=0 "
            f"runs this all the same"
        )
    os.environ["FUSEDMOE_SELF_TEST"] = "0"
    return right


class Subject:
    """The layer of a cell on the device, with its inputs, and one call of whatever computes it."""

    def __init__(self, cell: Cell) -> None:
        self.cell, self.dtype = cell, getattr(torch, cell.dtype)
        self.layer: Layer = build(SUBJECTS[cell.layer], self.dtype)
        self.network = Called(self.layer.module, self.layer.slots).to(DEVICE).train(cell.mode != "inference")
        # Drawn on the host: a capture that failed leaves the device's generator unusable.
        generator = torch.Generator().manual_seed(1)
        shapes = (cell.rows, self.layer.table.inputs[0].width), (cell.rows, *self.layer.table.output)
        self.work = Work(*(torch.randn(shape, generator=generator).to(DEVICE, self.dtype) for shape in shapes))

    def call(self, network: nn.Module, work: Work | None = None) -> Call:
        """One inference, or one forward and backward that returns d_x."""
        return MODES[self.cell.mode](network, list(network.parameters()), work or self.work)

    def eager(self) -> Call:
        return self.call(self.network)

    def compiled(self, **options: object) -> Call:
        torch._dynamo.reset()
        return self.call(torch.compile(copy.deepcopy(self.network), dynamic=False, **options))

    def restructured(self) -> Call:
        params = [self.network.layer.get_parameter(key) for key in self.layer.wiring.keys]
        return self.call(Restructured(self.layer.table, [p.detach().cpu() for p in params]).to(DEVICE))

    def ours(self, backend: str) -> Call:
        """Raises: RuntimeError where the layer is not taken over: what would be timed then is
        eager."""
        # On the host: what is held against float64 there is the layer, and not this device.
        fused = Called(build(SUBJECTS[self.cell.layer], self.dtype).module, self.layer.slots)
        report = fusedmoe.fuse(fused)
        if not report.fused:
            raise RuntimeError(f"expected a fused layer, got: {report}")
        fused.layer.forward.backend = backend
        return self.call(fused.to(DEVICE).train(self.cell.mode != "inference"))

    def expected(self) -> tuple[Tensor, Tensor, float]:
        """Rows, their result in float64, and the largest error that the rule of parity allows there
        in the cell's dtype; all from the host.

        Output and d_x of a row depend on that row alone.
        """
        rows = torch.linspace(0, self.cell.rows - 1, min(CHECKED, self.cell.rows)).long()
        work = Work(*(t.cpu()[rows] for t in self.work))
        network = Called(build(SUBJECTS[self.cell.layer], self.dtype).module, self.layer.slots)
        plain = self.call(network, work)()
        exact = self.call(copy.deepcopy(network).double(), Work(*(t.double() for t in work)))()
        return rows, exact, allowed_in_norm(norm_error(plain, exact), exact, self.cell.dtype)


def graph_of(call: Call) -> Call:
    """Return the replay of a CUDA graph of a call.

    Raises: RuntimeError where it cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            result = call()
    except Exception:
        # PyTorch's random numbers stay in the capture that failed.
        gpu_cases.spoilt = True
        raise

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def device_milliseconds(call: Call, calls: int = CALLS) -> float:
    """Return the time of one call between two events of the device, the mean of some in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def host_microseconds(call: Call, calls: int = CALLS) -> float:
    """Return the time until one call comes back, with nothing waited for, the mean of some in a
    row."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    passed = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * passed / calls


def calls_of(call: Call) -> int:
    """Warm a call up; return how many in a row are timed: long ones need no others beside them."""
    for _ in range(3):
        call()
    return max(1, min(CALLS, round(SHORTEST / max(device_milliseconds(call, 1), 1e-3))))


def medians(arms: dict[str, Call], rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Time the arms in turn; return the median of each on both clocks."""
    calls = {name: calls_of(call) for name, call in arms.items()}
    seen = {name: ([], []) for name in arms}
    for _ in range(rounds):
        for name, call in arms.items():
            seen[name][0].append(device_milliseconds(call, calls[name]))
            seen[name][1].append(host_microseconds(call, calls[name]))
    return {
        name: {"device_ms": statistics.median(device), "host_us": statistics.median(host)}
        for name, (device, host) in seen.items()
    }


def measured(
    arms: Iterator[tuple[str, Callable[[], Call]]], rows: Tensor, exact: Tensor, allowed: float
) -> dict[str, dict]:
    """Make, check and time arms; return times by name, or why an arm has none. A wrong one has
    none, unless DESPITE asks for them."""
    calls, results, wrong = {}, {}, {}
    for name, make in arms:
        try:
            call = make()
            error = norm_error(call().cpu()[rows], exact)
        except Exception as fault:
            traceback.print_exc()
            results[name] = {"error": f"{type(fault).__name__}: {fault}"[:1000]}
            continue
        if not error <= allowed:
            wrong[name] = {"error": f"wrong: expected an error of at most {allowed:.3g} in the norm, got {error:.3g}"}
        if DESPITE or name not in wrong:
            calls[name] = call
    times = medians(calls)
    return results | {
        name: times.get(name, {}) | wrong.get(name, {}) for name in (*calls, *(wrong.keys() - calls.keys()))
    }
