"""Use an installed fusedmoe away from its repository: check where it comes from, fuse a layer, run a forward and a backward."""

import copy
import sys
from pathlib import Path

import torch

import fusedmoe
import fusedmoe.kernels
from fusedmoe.demo.census import SOURCE
from fusedmoe.reference.layers import MMoE

for module in (fusedmoe, fusedmoe.kernels, fusedmoe._C):
    if not Path(module.__file__).is_relative_to(sys.argv[1]):
        raise SystemExit(f"expected {module.__name__} in {sys.argv[1]}, got {module.__file__}")
if not SOURCE.exists() or not (SOURCE.parent / "README.md").exists():
    raise SystemExit(f"expected the data and its licence in {SOURCE.parent}, got {[path.name for path in SOURCE.parent.iterdir()]}")

layer = MMoE(12, [16, 8], [], num_tasks=3, num_experts=4)
fused = copy.deepcopy(layer)
report = fusedmoe.fuse(fused, backend="cpu")
x = torch.randn(5, 12)
difference = (fused(x) - layer(x)).abs().max().item()
fused(x).sum().backward()
# Sums of a few dozen float32 products of size 1, in two orders.
if not report.fused or difference > 64 * 2.0**-24 or any(p.grad is None for p in fused.parameters()):
    raise SystemExit(f"expected the reference layer's numbers and all gradients, got a difference of {difference} and\n{report}")
print(f"fusedmoe {fusedmoe.__version__} works from {Path(fusedmoe.__file__).parent}; backends: {fusedmoe.available_backends()}")
