"""What is timed, against what, and how: shared by `bench/` and `python -m fusedmoe bench`.

The rivals are what a user of plain PyTorch has: the layer as it is (eager), the network rewritten by hand into few large products
(restructured), each also under "medium" matmul precision, and `torch.compile` of the layer. Every arm computes the same network with
the same weights on the same rows, in one process, on one thread, and the arms take turns, so that whatever slows the machine down
slows all of them. Before a case is timed, the outputs and all gradients of the fused and the restructured arm are held against
float64 by the rule of `fusedmoe.testing`.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

import fusedmoe
from fusedmoe import testing
from fusedmoe.families import share_input
from fusedmoe.nn import wiring
from fusedmoe.reference.layers import PLE, AdaTTSp, MMoE
from fusedmoe.restructured import Restructured, arrange
from fusedmoe.table import Table

INPUT = 256
BATCHES = (1, 64, 1024)
# Long enough that a call of 20 us is timed to a percent by a clock that ticks in tens of nanoseconds and costs as much to read.
SHORTEST_ROUND = 2e-3
ROUNDS = 30


class Subject(NamedTuple):
    """A layer to time: its constructor, how its table is read, and the slots its callers expand x to (0: it takes x [B, D])."""

    build: Callable[[], nn.Module]
    wire: Callable[[nn.Module], wiring.Wiring]
    slots: int


SUBJECTS = {
    "AdaTT T3m2": Subject(lambda: AdaTTSp(INPUT, [[256], [128]], 3, 2), wiring.adatt_sp, 3),
    "PLE T3m2s1": Subject(lambda: PLE(INPUT, [[256], [128]], 3, 2, 1), wiring.ple, 4),
    "MMoE T3e8": Subject(lambda: MMoE(INPUT, [256, 128], [], 3, 8), wiring.mmoe, 0),
}


class Work(NamedTuple):
    """Inputs of one call: x [B, D], and the upstream gradient, contiguous [B, T, H], as a loss over towers hands it down."""

    x: Tensor
    d_out: Tensor


Call = Callable[[], object]
Forward = Callable[[Tensor], Tensor]


def inference(forward: Forward, params: Sequence[Tensor], work: Work) -> Call:
    """Return a call that runs one forward without gradients."""

    def call() -> Tensor:
        with torch.inference_mode():
            return forward(work.x)

    return call


def training_step(forward: Forward, params: Sequence[Tensor], work: Work) -> Call:
    """Return a call that runs forward and backward, with gradients of x and every parameter."""
    wanted = [work.x.detach().requires_grad_(), *params]

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(wanted[0]), wanted, work.d_out)

    return call


MODES = {"inference": inference, "training step": training_step}


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Set torch's float32 matmul precision inside the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def under_medium(call: Call) -> Call:
    """Return the call under "medium" precision: on a CPU without AMX still float32, and oneDNN's kernels in place of MKL's."""

    def medium() -> object:
        with matmul_precision("medium"):
            return call()

    return medium


class Case:
    """One layer, one batch size, one mode, and its arms by name: "fused" is ours, the others are plain PyTorch's."""

    def __init__(self, subject: str, batch: int, mode: str, compiled: bool = False) -> None:
        self.name = f"{subject}, {mode}, B = {batch}"
        self.subject, self.batch, self.mode = SUBJECTS[subject], batch, mode
        self.eager = self.subject.build()
        testing.randomise(self.eager.parameters(), seed=0)
        self.table, self.keys = self.subject.wire(self.eager)
        self.fused = copy.deepcopy(self.eager)
        if not fusedmoe.fuse(self.fused).fused:
            raise RuntimeError(f"{self.name}: expected a layer that can be fused, got\n{fusedmoe.describe(self.fused)}")
        self.restructured = Restructured(self.table, [self.eager.get_parameter(key) for key in self.keys])
        self.work = self._rows()
        self.arms: dict[str, Call] = {"fused": self._call(self._forward(self.fused), self.fused), "eager": self._call(self._forward(self.eager), self.eager)}
        self.arms["eager, medium"] = under_medium(self.arms["eager"])
        self.arms["restructured"] = self._call(self.restructured, self.restructured)
        self.arms["restructured, medium"] = under_medium(self.arms["restructured"])
        if compiled:
            # Otherwise the second batch size would be compiled for any size, and later cases would meet the limit of recompilations.
            torch.compiler.reset()
            self.arms["torch.compile"] = self._call(torch.compile(self._forward(self.eager)), self.eager)

    def _forward(self, layer: nn.Module) -> Forward:
        """Return x [B, D] -> layer, called as `CentralTaskArch` does: x expanded to its slots, without a copy."""
        slots = self.subject.slots
        return lambda x: layer(x.unsqueeze(1).expand(-1, slots, -1) if slots else x)

    def _call(self, forward: Forward, layer: nn.Module) -> Call:
        return MODES[self.mode](forward, list(layer.parameters()), self.work)

    @property
    def flops(self) -> int:
        """Floating-point operations of one call; a backward counts twice its forward (d_x and dW for each linear map)."""
        return self.batch * self.table.flops * (1 if self.mode == "inference" else 3)

    def _rows(self) -> Work:
        """Draw rows that are off every ReLU's kink, so that parity does not depend on the order of summation."""
        torch.manual_seed(1)
        spare = torch.randn(2 * self.batch + 20, INPUT)
        params = [self.eager.get_parameter(key) for key in self.keys]
        off = testing.rows_off_kinks(spare.unsqueeze(1).expand(-1, self.table.slots, -1), params, self.table)
        return Work(spare[off][: self.batch].clone(), torch.randn(self.batch, *self.table.output))

    def check(self) -> None:
        """Raise AssertionError unless outputs and gradients of the fused and the restructured arm are as near to float64 as the eager arm's allow."""
        params = tuple(self.eager.get_parameter(key) for key in self.keys)
        given = testing.Problem(share_input(self.table), self.work.x.unsqueeze(1), params, self.work.d_out, ())
        expected = testing.expectation(given, self._network(self.eager))
        for network in (self._network(self.fused), self._rewritten):
            testing.assert_close(testing.evaluate(network, given), expected)

    def _network(self, layer: nn.Module) -> testing.Network:
        """Return the layer as a function of x [B, 1, D], which all its slots get, and its parameters."""

        def network(x: Tensor, params: Sequence[Tensor], table: Table) -> tuple[Tensor, tuple]:
            slots = x.expand(-1, self.subject.slots, -1) if self.subject.slots else x[:, 0]
            return functional_call(layer, dict(zip(self.keys, params, strict=True)), (slots,)), ()

        return network

    def _rewritten(self, x: Tensor, params: Sequence[Tensor], table: Table) -> tuple[Tensor, tuple]:
        """The restructured network as the same function."""
        return functional_call(self.restructured, arrange(self.table, params), (x[:, 0],)), ()


def repeats_of(call: Call) -> int:
    """Return how many calls in a row last `SHORTEST_ROUND`; warms the call up by the way."""
    for _ in range(3):
        call()
    start = time.perf_counter()
    call()
    return max(1, round(SHORTEST_ROUND / (time.perf_counter() - start)))


def seconds_of(call: Call, repeats: int) -> float:
    """Return the mean seconds of so many calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


class Times(NamedTuple):
    """Seconds of a call: the median over the rounds, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


def times_of(rounds: Sequence[float]) -> Times:
    """Summarise the rounds of one arm."""
    fifths = statistics.quantiles(rounds, n=5, method="inclusive")
    return Times(statistics.median(rounds), fifths[0], fifths[3])


def measure(case: Case, rounds: int = ROUNDS) -> dict[str, Times]:
    """Time the arms of a case in turn and return their times by name."""
    repeats = {name: repeats_of(call) for name, call in case.arms.items()}
    seen: dict[str, list[float]] = {name: [] for name in case.arms}
    names = list(case.arms)
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seen[name].append(seconds_of(case.arms[name], repeats[name]))
    return {name: times_of(values) for name, values in seen.items()}


def main(arguments: Sequence[str]) -> int:
    """Measure every case under a progress bar and print a table; return 0."""
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table as RichTable

    options = argparse.ArgumentParser(prog="fusedmoe bench", description="Time the fused layers against plain PyTorch's ways, on one thread.")
    options.add_argument("--compile", action="store_true", help="time torch.compile of the reference layers too (minutes of compilation)")
    compiled = options.parse_args(arguments).compile
    torch.set_num_threads(1)
    table = RichTable("case", "fused", "eager", "x eager", "x best", title="milliseconds, medians, one thread, float32", title_justify="left")
    console = Console()
    rivals: list[str] = []
    for subject, mode, batch in track([(s, m, b) for s in SUBJECTS for m in MODES for b in BATCHES], "measuring", console=console):
        case = Case(subject, batch, mode, compiled)
        case.check()
        medians = {name: times.median for name, times in measure(case).items()}
        ours, best = medians.pop("fused"), min(medians, key=medians.get)
        rivals = list(medians)
        times = [f"{1e3 * seconds:.3f}" for seconds in (ours, medians["eager"])]
        table.add_row(case.name, *times, f"{medians['eager'] / ours:.2f}", f"{medians[best] / ours:.2f} ({best})")
    console.print(table)
    console.print(f"x best: over the fastest of {'; '.join(rivals)}.")
    return 0
