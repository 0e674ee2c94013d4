"""Compile what part c of `make gpu` will launch, in processes beside the first parts: on a machine
of many cores its time is then for measuring.

    python bench/gpu_warm.py LAYER MODE

Triton keeps what it compiles on disk. What is launched here is thrown away, and a process that
fails or is ended costs nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# `fusedmoe.speed.subjects.MAIN` and the modes of `calls.py`; the parent of the parts imports no
# fusedmoe.
WORK = [(layer, mode) for layer in ("AdaTT T3m2", "PLE T3m2s1", "MMoE T3e8") for mode in ("inference", "training step")]
# Rows of the three sets of tiles that the rule has.
ROWS = (4096, 64, 1024)
LEAST_CORES = 4


def start(environment: dict[str, str], compute_mode: int) -> list[subprocess.Popen]:
    """Start a process for each layer and mode, where there are cores for them and the device takes
    several processes."""
    # 0 is the mode that lets all in.
    if compute_mode or (os.cpu_count() or 1) < LEAST_CORES:
        return []
    base = [sys.executable, str(Path(__file__))]
    quiet = {
        "stdin": subprocess.DEVNULL,
        "stdout": subprocess.DEVNULL,
        "stderr": subprocess.DEVNULL,
        "start_new_session": True,
    }
    return [
        subprocess.Popen([*base, layer, mode], env=environment | {"FUSEDMOE_SELF_TEST": "0"}, **quiet)
        for layer, mode in WORK
    ]


def main(layer: str, mode: str) -> None:
    """Call a layer in every dtype and set of tiles."""
    from gpu_arms import Cell, Subject

    for dtype in ("bfloat16", "float32"):
        for rows in ROWS:
            Subject(Cell(layer, mode, rows, dtype)).ours("triton")()


if __name__ == "__main__":
    main(*sys.argv[1:])
