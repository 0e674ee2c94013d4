"""Use an installed fusedmoe away from its repository: see where it comes from, fuse a layer, run a
forward and a backward, try its commands.
"""

import copy
import subprocess
import sys
from pathlib import Path

import torch

import fusedmoe
import fusedmoe.demo.census
import fusedmoe.kernels
import fusedmoe.speed
from fusedmoe.reference.layers import MMoE

for module in (fusedmoe, fusedmoe.kernels, fusedmoe.speed, fusedmoe.demo, fusedmoe._C):
    if not Path(module.__file__).is_relative_to(sys.argv[1]):
        raise SystemExit(f"expected {module.__name__} in {sys.argv[1]}, got {module.__file__}")

layer = MMoE(12, [16, 8], [], num_tasks=3, num_experts=4)
fused = copy.deepcopy(layer)
report = fusedmoe.fuse(fused, backend="cpu")
x = torch.randn(5, 12)
difference = (fused(x) - layer(x)).abs().max().item()
fused(x).sum().backward()
# Sums of a few dozen float32 products of size 1, in two orders.
if not report.fused or difference > 64 * 2.0**-24 or any(p.grad is None for p in fused.parameters()):
    raise SystemExit(
        f"expected the reference layer's numbers and all gradients, got a difference of {difference} and\n{report}"
    )


def check(words: str, status: int, expected: str) -> None:
    """Run a command of `python -m fusedmoe`; end with its messages if it does something else."""
    result = subprocess.run([sys.executable, "-m", "fusedmoe", *words.split()], capture_output=True, text=True)
    if result.returncode != status or expected not in result.stdout + result.stderr:
        raise SystemExit(
            f"{words}: expected status {status} and {expected!r}, got {result.returncode} "
            f"and\n{result.stdout}{result.stderr}"
        )


check("doctor", 0, fusedmoe.__version__)
check("bench --family mmoe --input 8 --experts 4 --batch 2 --rounds 2 --no-compile", 0, "mmoe")
check("demo --steps 2", 2, "python -m fusedmoe demo --data census-income.test.gz")
check("demo --steps 2 --data synthetic --threads 1", 0, "training step")
if len(sys.argv) > 2:
    check(f"demo --steps 2 --data {sys.argv[2]} --threads 1", 0, "69,833 rows to train on")
print(
    f"fusedmoe {fusedmoe.__version__} works from {Path(fusedmoe.__file__).parent}; backends: "
    f"{fusedmoe.available_backends()}"
)
