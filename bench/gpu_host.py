"""Time what the host does for a call on a GPU, against launching the same kernels with the same
arguments and nothing else.

    python bench/gpu_host.py [--json bench/results/gpu_host.json]

It needs a device, or a driver that takes launches and runs none (then with FUSEDMOE_SELF_TEST=0),
which tells the host's part as well. Microseconds, the least of many short rounds, because
everything that disturbs a round makes it longer.

    launches   the compiled kernels alone, in a loop in C++: the difference between a
               call that launches each many times, and once
    launcher   as many launches of Triton's compiled kernels from Python, `CompiledKernel[grid](...)`
    operator   the call below autograd: tensors looked at, results allocated, kernels launched
    call       `fusion_network`, and for the backward `torch.autograd.grad`
    autograd   a `torch.autograd.Function` of as many tensors that computes nothing: what of a
               training step's call is PyTorch's
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from fusedmoe import available_backends
from fusedmoe.kernels import bound, network
from fusedmoe.kernels.launchers import LAUNCHERS
from fusedmoe.op import fusion_network
from fusedmoe.speed.subjects import MAIN, SUBJECTS, build
from fusedmoe.table import Table

ROWS = (16, 4096)
ROUNDS, CALLS, TIMES = 100, 10, 21


def microseconds(call: Callable[[], object]) -> float:
    """The time of one call on the host, the least of ROUNDS; the device finishes in between."""
    best = float("inf")
    for _ in range(3):
        call()
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, (time.perf_counter() - start) / CALLS)
    return best * 1e6


class Given(NamedTuple):
    """A call: leaves that want gradients, and the upstream gradient."""

    backend: str
    table: Table
    x: Tensor
    params: list[Tensor]
    d_out: Tensor


def given_of(name: str, rows: int, backend: str) -> Given:
    """Draw a call of a layer in bfloat16 on the current device."""
    layer = build(SUBJECTS[name], torch.bfloat16)
    table = layer.table
    params = [p.detach().cuda().requires_grad_() for p in layer.params]
    x = torch.randn(rows, table.inputs[0].slots, table.inputs[0].width).bfloat16().cuda().requires_grad_()
    return Given(backend, table, x, params, torch.ones(rows, *table.output).bfloat16().cuda())


def alone(call: Callable[[], object], record: object) -> float:
    """The time of a call's launches by themselves."""
    once = microseconds(call)
    record.times = TIMES
    try:
        return (microseconds(call) - once) / (TIMES - 1)
    finally:
        record.times = 1


def from_python(call: Callable[[], object]) -> float:
    """The time of as many launches of Triton's compiled kernels, each with the arguments that a
    call gives it."""
    from triton.compiler.compiler import CompiledKernel

    launched, plain = [], CompiledKernel.run.fget

    def noting(self):
        def run(*arguments):
            # x, y, z, stream, function, metadata twice, two hooks; then the kernel's own.
            launched.append((self[arguments[:3]], arguments[9:]))
            plain(self)(*arguments)

        return run

    with (
        patch.object(CompiledKernel, "run", property(noting)),
        patch("fusedmoe.kernels.triton.launch.watched", lambda: True),
    ):
        call()
    return microseconds(lambda: [launch(*arguments) for launch, arguments in launched])


class Empty(torch.autograd.Function):
    """Nothing, of many tensors."""

    @staticmethod
    def forward(ctx, given: Given, *tensors: Tensor):
        ctx.save_for_backward(*tensors)
        return torch.empty_like(given.d_out)

    @staticmethod
    def backward(ctx, d_out: Tensor):
        return None, *map(torch.empty_like, ctx.saved_tensors)


def record_of(found: bound.Bound) -> object:
    """What the operator in C++ was bound to, after a call; None where Triton launches by itself."""
    records = [getattr(one, "record", None) or one for one in found.made.values()]
    return next((one for one in records if hasattr(one, "times")), None)


def times_of(given: Given) -> dict[str, dict[str, float]]:
    """Return each direction's times by name."""
    backend, table, x, params, d_out = given
    leaves = [x, *params]
    call = partial(fusion_network, x, params, table, backend)
    out, nothing = call(), Empty.apply(given, *leaves)

    def gradients(of: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(of, leaves, d_out, retain_graph=True, allow_unused=True)

    def inference() -> Tensor:
        with torch.no_grad():
            return call()

    forward = partial(network.forward, x, params, table, False, False, backend=backend)
    with torch.no_grad():
        _, _, saved = network.forward(x, params, table, False, True, backend=backend)
    backward = partial(network.backward, d_out, None, x, params, saved, table, backend=backend)
    found = {
        "forward": {"call": microseconds(inference)},
        "backward": {
            "call": microseconds(lambda: gradients(out)),
            "autograd": microseconds(lambda: gradients(nothing)),
        },
    }
    keys = bound.key_of(x, table, False, None, backend), network._backward_key(x, saved, table, None, backend)
    with torch.no_grad():
        for name, operator, one in (
            ("forward", forward, bound.forward_of(keys[0])),
            ("backward", backward, bound.backward_of(keys[1])),
        ):
            found[name] |= {"operator": microseconds(operator)}
            found[name] |= {"launches": alone(operator, record)} if (record := record_of(one)) else {}
            found[name] |= {"launcher": from_python(operator)} if backend == "triton" else {}
    return found


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each call, and save all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to save the times")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "expected a GPU, or a driver that takes launches, got a machine (or a build of torch) without one",
            file=sys.stderr,
        )
        return 1
    lines = []
    for backend in LAUNCHERS:
        if reason := available_backends()[backend]:
            print(f"{backend}: {reason}")
            continue
        for name in MAIN:
            for rows in ROWS:
                given = given_of(name, rows, backend)
                for direction, times in times_of(given).items():
                    lines.append(
                        {
                            "backend": backend,
                            "layer": name,
                            "rows": rows,
                            "tensors": 1 + len(given.params),
                            "direction": direction,
                            **times,
                        }
                    )
                    print(
                        f"{backend:7}{name:14}{rows:6} {direction:9}"
                        + "".join(f"{key:>10} {value:6.1f}" for key, value in times.items()),
                        flush=True,
                    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps(
                {"torch": torch.__version__, "device": torch.cuda.get_device_name(), "microseconds": lines}, indent=1
            )
            + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
