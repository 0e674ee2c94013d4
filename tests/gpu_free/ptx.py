"""Compiled PTX, executed on the CPU: what a kernel computes, and what it costs in bytes, MMAs and
barriers. No device, no driver.

One NumPy lane is one thread; the threads of a block advance together and part only where they
branch apart, the blocks run one after another. So the numbers are those of the compiled code,
rounding included. A barrier that is missing does not change them: in global memory it is noticed by
who wrote and read what since the last one, in shared memory not at all.

    ptx_text         the module as data
    ptx_numbers      rounding
    ptx_memory       checked and counted memory; ptx_order: barriers between its uses
    ptx_scope        operands, and the table of instructions
    ptx_arithmetic, ptx_convert, ptx_movement, ptx_matrix
                     the instructions
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np

# Each of these enters its instructions into the table.
from . import ptx_arithmetic, ptx_convert, ptx_matrix, ptx_movement  # noqa: F401
from .ptx_memory import WARP, Global, KernelFault, Range, Shared
from .ptx_numbers import numeric_error_ignored
from .ptx_scope import Lanes, Scope, Step, decode
from .ptx_text import Instruction, Kernel, PtxError, parse

__all__ = ["Counts", "Executable", "KernelFault", "PtxError", "Range"]


@dataclass
class Counts:
    """What launches did: bytes of global memory by range, MMAs of warps, barriers and instructions
    of blocks. They add up with +."""

    launches: int = 0
    blocks: int = 0
    instructions: int = 0
    mmas: int = 0
    barriers: int = 0
    read: Counter[str] = field(default_factory=Counter)
    written: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class Part(NamedTuple):
    """Instructions that always run together, and the number of the part at which the threads go on:
    one for all, or one each.

    Threads that go to the part behind the last one are done.
    """

    first: int
    steps: tuple[Step, ...]
    barrier: bool
    goes: int | Callable[[Lanes], np.ndarray]


class Executable:
    """A kernel, decoded once.

    Args:
        text: the PTX module of one kernel.
        shared: bytes of shared memory of a block.
    """

    def __init__(self, text: str, shared: int):
        self.kernel: Kernel = parse(text)
        if self.kernel.threads % WARP:
            raise PtxError(f"{self.kernel.name}: expected whole warps, got {self.kernel.threads} threads")
        self.memory, self.shared = Global(self.kernel.threads), Shared(shared)
        self.scope = Scope(self.kernel, self.memory, self.shared)
        self.parts = _parts(self.kernel, self.scope)

    def launch(self, grid: Sequence[int], arguments: Sequence[int], ranges: Iterable[Range]) -> Counts:
        """Run all blocks of a grid of up to three dimensions.

        Args:
            grid: blocks along x, y, z.
            arguments: addresses and integers in the order of the parameters; those left out are 0.
            ranges: the memory that the kernel may use.

        Raises: KernelFault for an access outside the ranges or misaligned, and for threads that
        meet no barrier, or part of a warp where all of it must take part.
        """
        if len(arguments) > len(self.kernel.parameters):
            raise ValueError(
                f"{self.kernel.name}: expected at most {len(self.kernel.parameters)} arguments, got {len(arguments)}"
            )
        self.memory.admit(ranges)
        self.scope.mmas = 0
        sizes = (*grid, 1, 1)[:3]
        given = {name: value for (_, name), value in zip(self.kernel.parameters, arguments, strict=False)}
        given |= {f"%nctaid.{axis}": size for axis, size in zip("xyz", sizes, strict=True)}
        counts = Counts(launches=1)
        with numeric_error_ignored():
            for z, y, x in product(*(range(size) for size in reversed(sizes))):
                self._block({**given, "%ctaid.x": x, "%ctaid.y": y, "%ctaid.z": z}, counts)
        counts.read, counts.written, counts.mmas = self.memory.read_bytes, self.memory.written_bytes, self.scope.mmas
        return counts

    def _block(self, values: dict[str, int], counts: Counts) -> None:
        lanes: Lanes = list(self.scope.initial)
        for name, value in values.items():
            if name in self.scope.slots:
                slot = self.scope.slots[name]
                kind = lanes[slot].dtype
                lanes[slot] = np.full(len(lanes[slot]), value & ((1 << 8 * kind.itemsize) - 1), kind)
        self.shared.poison()
        self.memory.begin_block()
        try:
            visits = _run(self.parts, lanes, self.memory.pass_barrier)
        except _Stopped as stopped:
            where = ", ".join(f"{name} {value}" for name, value in values.items() if name.startswith("%ctaid"))
            raise KernelFault(
                f"{self.kernel.name} ({where}), {self.kernel.instructions[stopped.number]}: {stopped.fault}"
            ) from stopped.fault
        counts.blocks += 1
        for part, count in zip(self.parts, visits, strict=True):
            counts.instructions += count * len(part.steps)
            counts.barriers += count * part.barrier


class _Stopped(Exception):
    """A fault, and the number of the instruction that it belongs to."""

    def __init__(self, number: int, fault: KernelFault):
        super().__init__(number, fault)
        self.number, self.fault = number, fault


def _run(parts: list[Part], lanes: Lanes, pass_barrier: Callable[[], None]) -> list[int]:
    """Run one block; return how often each part was entered. `pass_barrier` is called when all
    threads have met.

    While all threads stand at one part there is no mask. Where they branch apart, those at the
    earliest part go on, which brings them together again behind any `if` and loop that the compiler
    has laid out in order.
    """
    visits = [0] * len(parts)
    at, mask = 0, None
    places = np.empty(0)
    while at < len(parts):
        part = parts[at]
        visits[at] += 1
        for number, step in enumerate(part.steps):
            try:
                step(lanes, mask)
            except KernelFault as fault:
                raise _Stopped(part.first + number, fault) from fault
        if part.barrier and mask is not None and (others := int(np.count_nonzero(~mask & (places < len(parts))))):
            fault = KernelFault(f"expected all threads at the barrier, got {others} elsewhere")
            raise _Stopped(part.first + len(part.steps) - 1, fault)
        if part.barrier:
            pass_barrier()
        goes = part.goes
        if callable(goes):
            goes = goes(lanes)
            if mask is None and (goes == goes[0]).all():
                at = int(goes[0])
                continue
        elif mask is None:
            at = goes
            continue
        places = np.array(goes) if mask is None else np.where(mask, goes, places)
        at = int(places.min())
        mask = places == at
        if mask.all():
            mask = None
    return visits


DONE = ("ret", "exit")
JUMPS = ("bra", "brx", *DONE)


def _is_barrier(one: Instruction) -> bool:
    return one.parts[:2] in (("bar", "sync"), ("barrier", "sync"))


def _nothing(lanes: Lanes, mask: np.ndarray | None) -> None:
    """The step of what only directs threads."""


def _parts(kernel: Kernel, scope: Scope) -> list[Part]:
    """Cut a kernel before its labels and behind its jumps and barriers."""
    instructions = kernel.instructions
    cuts = {0, len(instructions), *kernel.labels.values()}
    cuts |= {i + 1 for i, one in enumerate(instructions) if one.parts[0] in JUMPS or _is_barrier(one)}
    numbers = {first: number for number, first in enumerate(sorted(cuts))}
    parts = []
    for first, behind in pairwise(sorted(cuts)):
        last = instructions[behind - 1]
        if _is_barrier(last) and (last.guard or last.operands != ("0",)):
            raise PtxError(f"{last}: expected barrier 0 of all threads")
        steps = tuple(
            _nothing if one.parts[0] in JUMPS or _is_barrier(one) else decode(scope, one)
            for one in instructions[first:behind]
        )
        parts.append(Part(first, steps, _is_barrier(last), _goes(last, numbers, numbers[behind], kernel, scope)))
    return parts


def _goes(
    last: Instruction, numbers: dict[int, int], following: int, kernel: Kernel, scope: Scope
) -> int | Callable[[Lanes], np.ndarray]:
    """Where threads go behind the last instruction of a part."""
    if last.parts[0] not in JUMPS:
        return following
    guard = scope.source(last.guard, 1) if last.guard else None
    if last.parts[0] == "brx":
        if guard is not None:
            raise PtxError(f"{last}: expected no guard")
        targets = np.array([numbers[kernel.labels[name]] for name in kernel.tables[last.operands[1]]])
        index = scope.source(last.operands[0], 32)
        # Only lanes that have branched here have an index that means something.
        return lambda lanes: targets.take(lanes[index], mode="clip")
    target = len(numbers) - 1 if last.parts[0] in DONE else numbers[kernel.labels[last.operands[0]]]
    if guard is None:
        return target
    holds, fails = (following, target) if last.negated else (target, following)
    return lambda lanes: np.where(lanes[guard], holds, fails)
