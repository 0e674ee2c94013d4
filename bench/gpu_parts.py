"""The parts of `make gpu`, in their order, and the seconds that each may take: with the build ten
minutes in all."""

from __future__ import annotations

import os
from typing import NamedTuple

MOST_SECONDS = 600
# Of it the compilation of the extension, before the first part.
BUILD_SECONDS = 110


class Part(NamedTuple):
    """One part: what it is, the module of bench/ that has its cases, and the seconds that all of
    them, and one of them, may take."""

    title: str
    module: str
    seconds: int
    case_seconds: int


PARTS = {
    "a": Part("versions, device, clocks, a tiny call of each backend", "gpu_first", 40, 30),
    "b": Part("the self-test, and parity of the quick cases", "gpu_parity", 120, 60),
    "c": Part("times against PyTorch", "gpu_times", 170, 90),
    "d": Part("shares of the measured bandwidth and matrix rate", "gpu_shares", 30, 25),
    "e": Part("compute-sanitizer and the counters of ncu", "gpu_tools", 80, 60),
    "f": Part("tiles by the clock", "gpu_tuning", 50, 50),
}
# Those whose clocks want the machine for themselves.
TIMED = "cdf"
# The exit status of a part's process that lost its device in a case, and asks to be started again
# for the others.
LOST = 75


def patience() -> float:
    """A factor for every limit, of GPU_PATIENCE: a slow machine needs more than 1."""
    return float(os.environ.get("GPU_PATIENCE") or 1)
