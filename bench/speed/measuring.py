"""How long a call takes: the arms of a case in turn, so that whatever slows the machine down slows
all of them.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch

# Calls of up to 6 ms come in pairs at least, after one that is not timed: caches and sleeping
# threads of a pool are then warm again.
SHORTEST_ROUND = 10e-3
ROUNDS = 20
# Threads of a pool spin for about a millisecond after their work (libgomp, ONNX Runtime, TBB) and
# would take the next arm's processor.
SETTLE = 5e-3


class Clocked(Protocol):
    """An arm that can be timed, in this process or another."""

    def repeats(self) -> int:
        """Warm up; return how many calls in a row last `SHORTEST_ROUND`."""

    def seconds(self, repeats: int) -> float:
        """Return the mean seconds of so many calls in a row."""


def repeats_of(call: Callable[[], object]) -> int:
    """Return how many calls in a row last `SHORTEST_ROUND`; warms the call up by the way."""
    for _ in range(3):
        call()
    start = time.perf_counter()
    call()
    return max(1, round(SHORTEST_ROUND / (time.perf_counter() - start)))


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Return the mean seconds of so many calls in a row.

    Short ones after a call that is not timed, for the caches.
    """
    if repeats > 1:
        call()
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


def processors() -> list[int]:
    """Return the processors that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Keep this thread, and those it starts, on as many of its processors as there are threads.

    No collection of garbage meanwhile.

    Pinned only while measuring: compilers may use all processors before.
    """
    before, count = processors(), torch.get_num_threads()
    torch.set_num_threads(threads)
    pin(before[:threads])
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        pin(before)
        torch.set_num_threads(count)


def pin(cores: Sequence[int]) -> None:
    """Let this thread run on these processors only, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def measure(
    arms: Mapping[str, Clocked], rounds: int = ROUNDS, settle: float = 0.0, advance: Callable[[], None] = lambda: None
) -> dict[str, Times]:
    """Time the arms in turn, each round begun by another one; return their times by name.

    Args:
        settle: seconds to wait before each arm's turn, for other pools to fall asleep.
        advance: called after every round.
    """
    names = list(arms)
    repeats = {name: arms[name].repeats() for name in names}
    seen: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(settle)
            seen[name].append(arms[name].seconds(repeats[name]))
        advance()
    return {name: times_of(values) for name, values in seen.items()}
