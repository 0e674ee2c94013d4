"""Memory as a block sees it: global memory in registered ranges, every access checked and counted;
shared memory of the exact size, poisoned."""

from __future__ import annotations

import bisect
from collections import Counter, deque
from collections.abc import Iterable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from .ptx_numbers import UNSIGNED
from .ptx_order import Now, Trace

WARP = 32


class KernelFault(AssertionError):
    """What a device would have punished, or silently obeyed: an access outside, a misaligned one,
    one that no barrier orders."""


class Range(NamedTuple):
    """Bytes `first` to `end` (exclusive) of global memory that a kernel may use."""

    name: str
    first: int
    end: int


def distinct(ranges: Iterable[Range]) -> list[Range]:
    """Sort ranges and leave out those that lie in another one.

    Raises: ValueError for two that overlap in part.
    """
    kept: list[Range] = []
    for one in sorted(ranges, key=lambda one: (one.first, -one.end)):
        if one.end <= one.first or (kept and one.end <= kept[-1].end):
            continue
        if kept and one.first < kept[-1].end:
            raise ValueError(
                f"ranges: expected disjoint or nested ones, got {one.name} beginning inside {kept[-1].name} "
                f"and ending behind it"
            )
        kept.append(one)
    return kept


# The first page of an address space is never mapped; NumPy takes no array at address 0.
_PAGE = 4096


def _everything(bits: int) -> np.ndarray:
    """All memory of this process from the second page on, as one array. Only what `Global` has
    checked is touched."""
    dtype = np.dtype(UNSIGNED[bits])
    shape = ((1 << 47) // dtype.itemsize,)
    return np.asarray(
        SimpleNamespace(
            __array_interface__={"data": (_PAGE, False), "shape": shape, "typestr": dtype.str, "version": 3}
        )
    )


class Global:
    """Global memory. `read_bytes` and `written_bytes` count by range; an address that several lanes
    of a warp use in one access counts once.

    In ranges that a launch has begun to write, two warps may not use one place, one of them
    writing, without a barrier between, nor two blocks.
    """

    def __init__(self, threads: int):
        self.warps = np.arange(threads, dtype=np.uint64) // np.uint64(WARP)
        self.views = {bits: _everything(bits) for bits in (8, 16, 32, 64)}
        self.admit(())

    def admit(self, ranges: Iterable[Range]) -> None:
        """Let a launch use these ranges alone, and count from zero."""
        self.ranges = distinct(ranges)
        self.firsts = [one.first for one in self.ranges]
        self.read_bytes: Counter[str] = Counter()
        self.written_bytes: Counter[str] = Counter()
        self.traces: dict[str, Trace] = {}
        self.now = Now()

    def begin_block(self) -> None:
        self.now = Now(self.now.turn + 1, self.now.turn + 1)

    def pass_barrier(self) -> None:
        self.now = self.now._replace(turn=self.now.turn + 1)

    def load(self, at: np.ndarray, mask: np.ndarray | None, count: int, bits: int, step: int = 0) -> np.ndarray:
        """Return [count, lanes]: what stands at the addresses `at` [lanes] (of the lanes in `mask`)
        and behind them.

        They must be multiples of all bytes that are read, or of `step`.
        """
        size = count * bits // 8
        self._check_step(at, step or size, "read")
        self._check(at, mask, size, "read")
        return self.views[bits].take(self._places(at, count, bits))

    def store(self, at: np.ndarray, mask: np.ndarray | None, values: list[np.ndarray], bits: int) -> None:
        size = len(values) * bits // 8
        self._check_step(at, size, "write")
        self._check(at, mask, size, "write")
        places = self._places(at, len(values), bits)
        for place, value in zip(places, values, strict=True):
            self.views[bits][place] = value

    @staticmethod
    def _places(at: np.ndarray, count: int, bits: int) -> np.ndarray:
        size = bits // 8
        first = (at.view(np.int64) - _PAGE) // size
        return first[None] if count == 1 else first + np.arange(count)[:, None]

    def _check_step(self, at: np.ndarray, step: int, kind: str) -> None:
        if int(np.bitwise_or.reduce(at)) % step:
            bad = int(at[at % np.uint64(step) != 0][0])
            raise KernelFault(
                f"{self._near(bad, step)}: expected a {kind} at a multiple of {step} bytes, got one at {bad:#x}"
            )

    def _check(self, at: np.ndarray, mask: np.ndarray | None, size: int, kind: str) -> None:
        first, last = int(at.min()), int(at.max())
        count = self.written_bytes if kind == "write" else self.read_bytes
        known = bisect.bisect_right(self.firsts, first) - 1
        if known >= 0 and last + size <= self.ranges[known].end:
            count[self.ranges[known].name] += size * self._distinct(at, mask, first == last)
            self._trace(self.ranges[known], at, mask, size, kind)
            return
        self._check_each(at, mask, size, kind, count)

    def _check_each(self, at: np.ndarray, mask: np.ndarray | None, size: int, kind: str, count: Counter[str]) -> None:
        """As `_check`, for an access that reaches several ranges, or none."""
        outside = np.ones(len(at), bool)
        lanes = np.flatnonzero(np.ones(len(self.warps), bool) if mask is None else mask)
        for one in self.ranges:
            inside = (at >= np.uint64(one.first)) & (at + np.uint64(size) <= np.uint64(one.end))
            if inside.any():
                outside &= ~inside
                only = np.zeros(len(self.warps), bool)
                only[lanes[inside]] = True
                count[one.name] += size * self._distinct(at[inside], only, False)
                self._trace(one, at[inside], only, size, kind)
        if outside.any():
            bad = int(at[outside][0])
            raise KernelFault(
                f"expected a {kind} of {size} bytes inside a buffer, got {int(outside.sum())} lanes outside, "
                f"one at {self._near(bad, size)}"
            )

    def _trace(self, one: Range, at: np.ndarray, mask: np.ndarray | None, size: int, kind: str) -> None:
        """See that nothing but order that barriers give decides what this access reads or leaves."""
        trace = self.traces.get(one.name)
        if trace is None and kind == "write":
            trace = self.traces[one.name] = Trace(one.first, one.end)
        if trace is not None:
            warps = self.warps if mask is None else self.warps[mask]
            fault = trace.write(at, size, warps, self.now) if kind == "write" else trace.read(at, size, warps, self.now)
            if fault:
                raise KernelFault(f"{one.name}: expected a barrier between, but {fault}")

    def _near(self, at: int, size: int) -> str:
        """Where an address stands, told from the nearest buffer."""
        if not self.ranges:
            return f"{at:#x} (no buffer is registered)"
        near = min(self.ranges, key=lambda one: max(one.first - at, at + size - one.end, 0))
        return f"byte {at - near.first} of {near.name} ({near.end - near.first} bytes)"

    def _distinct(self, at: np.ndarray, mask: np.ndarray | None, uniform: bool) -> int:
        """How many different addresses the warps use, added over warps."""
        warps = self.warps if mask is None else self.warps[mask]
        if uniform:
            return int(np.count_nonzero(np.diff(warps))) + 1
        # Addresses of this process fit into 47 bits, warps of a block into 6.
        keys = at << np.uint64(6) | warps
        keys.sort()
        return int(np.count_nonzero(keys[1:] != keys[:-1])) + 1


class Shared:
    """Shared memory of a block. Bytes that nobody wrote are 0xFF, which is NaN in every float.

    What cp.async brings lands when the group that it belongs to is waited for, not earlier: a
    kernel that waits too little reads poison.
    """

    def __init__(self, size: int):
        self.size = size
        # Whole words, so that the views exist; accesses are checked against the exact size.
        self.bytes = np.empty(-(-size // 8) * 8, np.uint8)
        self.views = {bits: self.bytes.view(UNSIGNED[bits]) for bits in (8, 16, 32, 64)}
        self.poison()

    def poison(self) -> None:
        """Forget everything, as between two blocks."""
        self.bytes.fill(0xFF)
        self.open: list[tuple[np.ndarray, np.ndarray]] = []
        self.groups: deque[list[tuple[np.ndarray, np.ndarray]]] = deque()

    def load(self, at: np.ndarray, mask: np.ndarray | None, count: int, bits: int) -> np.ndarray:
        """Return [count, lanes], as `Global.load`."""
        self.check(at, count * bits // 8, "read")
        return self.views[bits].take(self._places(at, count, bits))

    def store(self, at: np.ndarray, mask: np.ndarray | None, values: list[np.ndarray], bits: int) -> None:
        self.check(at, len(values) * bits // 8, "write")
        for place, value in zip(self._places(at, len(values), bits), values, strict=True):
            self.views[bits][place] = value

    def copy_later(self, at: np.ndarray, words: np.ndarray) -> None:
        """Bring words [n, lanes] of 32 bits to the addresses `at` [lanes] when their group is
        waited for."""
        self.check(at, 4 * len(words), "cp.async")
        self.open.append((self._places(at, len(words), 32), words))

    def commit(self) -> None:
        """Close a group of copies."""
        self.groups.append(self.open)
        self.open = []

    def wait(self, left: int) -> None:
        """Let all groups land but the `left` latest ones."""
        while len(self.groups) > left:
            for places, words in self.groups.popleft():
                self.views[32][places] = words

    def wait_for_all(self) -> None:
        """Let everything land, the open group too."""
        self.commit()
        self.wait(0)

    @staticmethod
    def _places(at: np.ndarray, count: int, bits: int) -> np.ndarray:
        first = at.astype(np.int64) // (bits // 8)
        return first[None] if count == 1 else first + np.arange(count)[:, None]

    def check(self, at: np.ndarray, size: int, kind: str) -> None:
        if int(np.bitwise_or.reduce(at)) % size:
            bad = int(at[at % at.dtype.type(size) != 0][0])
            raise KernelFault(
                f"shared memory: expected a {kind} of {size} bytes at a multiple of them, got one at byte {bad}"
            )
        last = int(at.max())
        if last + size > self.size:
            raise KernelFault(
                f"shared memory: expected a {kind} of {size} bytes inside its {self.size}, got one at byte {last}"
            )
