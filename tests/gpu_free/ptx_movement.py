"""Instructions that move: registers, parameters, global and shared memory, asynchronous copies,
lanes of a warp."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np

from .ptx_memory import WARP, Global, KernelFault, Shared
from .ptx_numbers import SIGNED, UNSIGNED, Kind, kind_of
from .ptx_scope import Lanes, Scope, Step, assigned, instruction, put, whole_warps
from .ptx_text import Instruction, PtxError, address, elements

# What caches do is of no consequence to values and to what is counted.
CACHING = re.compile(r"ca|cg|cs|lu|cv|wb|wt|nc|L[12]::\w+")
SPACES = ("global", "shared", "param")


@instruction("mov")
def move(scope: Scope, one: Instruction) -> Step:
    """dest = source; a vector on one side is packed into, or unpacked from, the other, its first
    element lowest."""
    if len(one.parts) != 2:
        raise PtxError("expected no modifiers")
    kind = kind_of(one.parts[1])
    target, source = one.operands
    if target.startswith("{"):
        return _unpack(scope, elements(target), scope.source(source, kind.bits), kind.bits)
    if source.startswith("{"):
        return _pack(scope, target, elements(source), kind.bits)
    slot = scope.source(source, kind.bits)
    return assigned(scope.destination(target, kind.bits), lambda lanes: lanes[slot])


@instruction("cvta")
def convert_address(scope: Scope, one: Instruction) -> Step:
    """Between generic and global addresses, which are the same."""
    if "global" not in one.parts:
        raise PtxError("expected global addresses")
    slot = scope.source(one.operands[1], 64)
    return assigned(scope.destination(one.operands[0], 64), lambda lanes: lanes[slot])


def _unpack(scope: Scope, names: tuple[str, ...], source: int, bits: int) -> Step:
    size = bits // len(names)
    targets = [(scope.destination(name, size), UNSIGNED[bits](size * i)) for i, name in enumerate(names) if name != "_"]
    dtype = UNSIGNED[size]

    def step(lanes: Lanes, mask: np.ndarray | None) -> None:
        # Read first: a target may be the source.
        whole = lanes[source]
        for slot, distance in targets:
            put(lanes, slot, (whole >> distance).astype(dtype), mask)

    return step


def _pack(scope: Scope, target: str, names: tuple[str, ...], bits: int) -> Step:
    size, dtype = bits // len(names), UNSIGNED[bits]
    sources = [(scope.source(name, size), dtype(size * i)) for i, name in enumerate(names)]

    def compute(lanes: Lanes) -> np.ndarray:
        whole = lanes[sources[0][0]].astype(dtype)
        for slot, distance in sources[1:]:
            whole = whole | lanes[slot].astype(dtype) << distance
        return whole

    return assigned(scope.destination(target, bits), compute)


def _form(one: Instruction) -> tuple[str, int, Kind]:
    """(space, elements of the vector, kind) of a load or store."""
    space, count = None, 1
    for part in one.parts[1:-1]:
        if part in SPACES:
            space = part
        elif part in ("v2", "v4"):
            count = int(part[1:])
        elif not CACHING.fullmatch(part):
            raise PtxError(f"expected none of the modifiers but v2, v4 and hints to caches, got {part}")
    if space is None:
        raise PtxError(f"expected one of the spaces {', '.join(SPACES)}, got none")
    return space, count, kind_of(one.parts[-1])


def _memory(scope: Scope, space: str, operand: str) -> tuple[Global | Shared, Callable[[Lanes], np.ndarray]]:
    memory = scope.memory if space == "global" else scope.shared
    return memory, scope.address(operand, 64 if space == "global" else 32)


def _widened(kind: Kind, bits: int) -> Callable[[np.ndarray], np.ndarray]:
    """How to fill a register of so many bits from memory."""
    if bits < kind.bits:
        raise PtxError(f"expected a register of at least {kind.bits} bits, got {bits}")
    if bits == kind.bits:
        return lambda value: value
    if kind.letter == "s":
        return lambda value: value.view(SIGNED[kind.bits]).astype(SIGNED[bits]).view(UNSIGNED[bits])
    return lambda value: value.astype(UNSIGNED[bits])


@instruction("ld")
def load(scope: Scope, one: Instruction) -> Step:
    """From global or shared memory, one element or a vector; or a parameter of the kernel."""
    space, count, kind = _form(one)
    names = elements(one.operands[0])
    if len(names) != count:
        raise PtxError(f"expected {count} registers, got {len(names)}")
    if space == "param":
        name, offset = address(one.operands[1])
        if offset:
            raise PtxError(f"expected a whole parameter, got byte {offset} of {name}")
        source, bits = scope.parameter(name, kind.bits), scope.bits(names[0]) or kind.bits
        widen = _widened(kind, bits)
        return assigned(scope.destination(names[0], bits), lambda lanes: widen(lanes[source]))
    memory, find = _memory(scope, space, one.operands[1])
    sizes = [scope.bits(name) or kind.bits for name in names]
    targets = [(scope.destination(name, bits), _widened(kind, bits)) for name, bits in zip(names, sizes, strict=True)]

    def step(lanes: Lanes, mask: np.ndarray | None) -> None:
        at = find(lanes)
        values = memory.load(at if mask is None else at[mask], mask, count, kind.bits)
        for value, (slot, widen) in zip(values, targets, strict=True):
            if mask is None:
                lanes[slot] = widen(value)
            else:
                merged = lanes[slot].copy()
                merged[mask] = widen(value)
                lanes[slot] = merged

    return step


@instruction("st")
def store(scope: Scope, one: Instruction) -> Step:
    """To global or shared memory; of lanes that write to one address, the last one wins."""
    space, count, kind = _form(one)
    names = elements(one.operands[1])
    if len(names) != count or space == "param":
        raise PtxError(f"expected {count} registers for global or shared memory, got {len(names)} for {space}")
    memory, find = _memory(scope, space, one.operands[0])
    sources = [scope.source(name, scope.bits(name) or kind.bits) for name in names]
    dtype = UNSIGNED[kind.bits]

    def step(lanes: Lanes, mask: np.ndarray | None) -> None:
        at = find(lanes)
        values = [lanes[slot].astype(dtype, copy=False) for slot in sources]
        if mask is not None:
            at, values = at[mask], [value[mask] for value in values]
        memory.store(at, mask, values, kind.bits)

    return step


@instruction("cp")
def copy_asynchronously(scope: Scope, one: Instruction) -> Step:
    """cp.async: a copy of 4, 8 or 16 bytes to shared memory, of which the source gives as many as a
    fourth operand says, zeros the rest; groups; waits."""
    form = ".".join(one.parts)
    if form == "cp.async.commit_group":
        return _by_all(scope.shared.commit)
    if form == "cp.async.wait_group":
        left = int(one.operands[0], 0)
        return _by_all(lambda: scope.shared.wait(left))
    if form == "cp.async.wait_all":
        return _by_all(scope.shared.wait_for_all)
    if not re.fullmatch(r"cp\.async\.c[ag]\.shared\.global(\.L[12]::\w+)*", form) or len(one.operands) not in (3, 4):
        raise PtxError("expected cp.async.ca or .cg from global to shared memory")
    size = int(one.operands[2], 0)
    to, of = scope.address(one.operands[0], 32), scope.address(one.operands[1], 64)
    given = scope.source(one.operands[3], 32) if len(one.operands) == 4 else scope.immediate(size, 32)
    memory, shared = scope.memory, scope.shared

    def step(lanes: Lanes, mask: np.ndarray | None) -> None:
        active = np.ones(scope.threads, bool) if mask is None else mask
        words = np.zeros((size // 4, scope.threads), np.uint32)
        # Nearly always 0 or everything.
        for count in np.unique(lanes[given][active]):
            if count % 4 or count > size:
                raise KernelFault(f"expected whole words, at most {size} bytes, got {count}")
            if count:
                read = active & (lanes[given] == count)
                words[: count // 4, read] = memory.load(of(lanes)[read], read, int(count) // 4, 32, step=size)
        shared.copy_later(to(lanes)[active], words[:, active])

    return step


def _by_all(action: Callable[[], None]) -> Step:
    """Something that a block does as one: groups of copies belong to threads, and are kept here for
    all of them together."""

    def step(lanes: Lanes, mask: np.ndarray | None) -> None:
        if mask is not None:
            raise KernelFault("expected all threads to commit and wait together, got some")
        action()

    return step


@instruction("shfl")
def shuffle(scope: Scope, one: Instruction) -> Step:
    """A register of another lane of the warp: at an index, a distance up or down, or by exclusive
    or (bfly); one's own beyond the warp's ends."""
    mode = one.parts[2]
    if one.parts[1] != "sync" or one.parts[3:] != ("b32",) or mode not in SHUFFLES:
        raise PtxError("expected shfl.sync of up, down, bfly or idx of b32")
    target, *reached = (name.strip() for name in one.operands[0].split("|"))
    if int(one.operands[3], 0) != (0 if mode == "up" else WARP - 1):
        raise PtxError(f"expected whole warps, got the clamp {one.operands[3]}")
    value, by = scope.source(one.operands[1], 32), scope.source(one.operands[2], 32)
    slot = scope.destination(target, 32)
    inside = scope.destination(reached[0], 1) if reached else None
    lane, first = scope.lane, np.arange(scope.threads) - scope.lane

    def step(lanes: Lanes, mask: np.ndarray | None) -> None:
        whole_warps(mask)
        other = SHUFFLES[mode](lane, lanes[by].astype(np.int64))
        fits = (other >= 0) & (other < WARP)
        put(lanes, slot, lanes[value][first + np.where(fits, other, lane)], mask)
        if inside is not None:
            put(lanes, inside, fits, mask)

    return step


@instruction("bar")
def warp_barrier(scope: Scope, one: Instruction) -> Step:
    """Lanes of a warp wait for each other, as they do here between any two instructions. Barriers of a
    block are jumps (`ptx.py`)."""
    if one.parts != ("bar", "warp", "sync") or one.operands not in (("-1",), ("0xffffffff",)):
        raise PtxError("expected a barrier of whole warps")
    return lambda lanes, mask: whole_warps(mask)


SHUFFLES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "up": np.subtract, "down": np.add, "bfly": np.bitwise_xor, "idx": lambda lane, index: index % WARP,
}  # fmt: skip
