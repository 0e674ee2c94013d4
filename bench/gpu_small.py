"""Calls for a tool that watches a process: small networks, forward and backward, on one backend.

python bench/gpu_small.py BACKEND check        two networks, one launch and a launch a level, for compute-sanitizer
python bench/gpu_small.py BACKEND profile      one inference and one training step of a main layer
                                               after a warm-up, between start and stop, for ncu
"""

from __future__ import annotations

import os
import sys

os.environ["FUSEDMOE_SELF_TEST"] = "0"

import torch
from gpu_arms import DEVICE, Cell, Subject

from fusedmoe.kernels import self_test
from fusedmoe.op import fusion_network

# One launch for all stages, and a launch a level.
ROWS = (40, 300)


def check(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for table in self_test.tables():
            for rows in ROWS:
                shapes = [(rows, table.inputs[0].slots, table.inputs[0].width), *(p.shape for p in table.parameters)]
                x, *params = (
                    torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_() for shape in shapes
                )
                fusion_network(x, params, table, backend=backend).float().square().sum().backward()
    torch.cuda.synchronize()


def profile(backend: str) -> None:
    calls = [
        Subject(Cell("AdaTT T3m2", mode, 4096, "bfloat16")).ours(backend) for mode in ("inference", "training step")
    ]
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    for call in calls:
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    {"check": check, "profile": profile}[sys.argv[2]](sys.argv[1])
