"""What an instruction becomes when it is decoded: a step, a closure over the places of its operands
in one list of lanes.

Every register, special register, parameter and immediate has a slot in that list, an array
[threads]. A step reads and replaces arrays there and never changes one in place, so that slots may
share them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .ptx_memory import WARP, Global, KernelFault, Shared
from .ptx_numbers import UNSIGNED, Kind, kind_of
from .ptx_text import Instruction, Kernel, PtxError, address, pattern

Lanes = list[np.ndarray]
# The mask has the lanes that execute; None stands for all.
Step = Callable[[Lanes, np.ndarray | None], None]
Decoder = Callable[["Scope", Instruction], Step]
Compute = Callable[[Lanes], np.ndarray]

# First part of an opcode -> how to decode it.
TABLE: dict[str, Decoder] = {}
SHARED_SYMBOL = "global_smem"


def instruction(*names: str) -> Callable[[Decoder], Decoder]:
    """Enter a decoder into the table."""

    def enter(decoder: Decoder) -> Decoder:
        TABLE.update(dict.fromkeys(names, decoder))
        return decoder

    return enter


class Scope:
    """The slots of a kernel while it is decoded, and the memories that its steps close over."""

    def __init__(self, kernel: Kernel, memory: Global, shared: Shared):
        self.kernel, self.memory, self.shared = kernel, memory, shared
        self.threads = kernel.threads
        self.warps = kernel.threads // WARP
        self.lane = np.arange(self.threads) % WARP
        self.mmas = 0
        self.slots: dict[object, int] = {}
        self.initial: Lanes = []

    def _slot(self, key: object, value: Callable[[], np.ndarray]) -> int:
        if key not in self.slots:
            self.slots[key] = len(self.initial)
            self.initial.append(value())
        return self.slots[key]

    def bits(self, operand: str) -> int | None:
        """The bits of a register, None for what is none."""
        return self.kernel.registers.get(operand)

    def register(self, name: str) -> int:
        """The slot of a register, poisoned at first: all bits set."""
        bits = self.kernel.registers[name]
        poison = UNSIGNED[bits](1 if bits == 1 else (1 << bits) - 1)
        return self._slot(name, lambda: np.full(self.threads, poison))

    def source(self, operand: str, bits: int) -> int:
        """The slot of an operand that is read as so many bits.

        Raises: PtxError for one of another size, or unknown.
        """
        if operand in self.kernel.registers:
            if self.kernel.registers[operand] != bits:
                raise PtxError(f"{operand}: expected a register of {bits} bits, got {self.kernel.registers[operand]}")
            return self.register(operand)
        if operand.startswith("%"):
            return self.special(operand, bits)
        if operand == SHARED_SYMBOL:
            # Shared memory begins at its address 0.
            return self.immediate(0, bits)
        if bits == 1:
            return self._slot((bool, operand), lambda: np.full(self.threads, bool(int(operand))))
        return self.immediate(pattern(operand, bits), bits)

    def immediate(self, value: int, bits: int) -> int:
        return self._slot((value, bits), lambda: np.full(self.threads, UNSIGNED[bits](value)))

    def special(self, name: str, bits: int) -> int:
        """The slot of %tid.x and its like; those that differ between blocks are set by the
        executor."""
        fixed = {
            "%tid.x": np.arange(self.threads),
            "%laneid": self.lane,
            "%warpid": np.arange(self.threads) // WARP,
            "%ntid.x": self.threads,
        }
        fixed |= {"%tid.y": 0, "%tid.z": 0, "%ntid.y": 1, "%ntid.z": 1}
        if name not in fixed and name not in BLOCK_REGISTERS:
            raise PtxError(f"{name}: expected a special register that the executor knows")
        if bits != 32:
            raise PtxError(f"{name}: expected 32 bits to be read, got {bits}")
        return self._slot(name, lambda: np.broadcast_to(np.asarray(fixed.get(name, 0), np.uint32), self.threads).copy())

    def parameter(self, name: str, bits: int) -> int:
        kind = next((kind for kind, known in self.kernel.parameters if known == name), None)
        if kind is None or kind_of(kind).bits != bits:
            raise PtxError(f"{name}: expected a parameter of {bits} bits, got {kind or 'none'}")
        return self._slot(name, lambda: np.zeros(self.threads, UNSIGNED[bits]))

    def destination(self, operand: str, bits: int) -> int:
        """The slot that a result of so many bits goes to; "_" drops it."""
        if operand == "_":
            return self._slot("_", lambda: np.zeros(self.threads, UNSIGNED[bits]))
        if self.bits(operand) != bits:
            raise PtxError(f"{operand}: expected a register of {bits} bits, got {self.bits(operand)}")
        return self.register(operand)

    def address(self, operand: str, bits: int) -> Compute:
        """How to find the addresses of "[base + offset]"."""
        base, offset = address(operand)
        slot = self.source(base, bits)
        if not offset:
            return lambda lanes: lanes[slot]
        distance = UNSIGNED[bits](offset & ((1 << bits) - 1))
        return lambda lanes: lanes[slot] + distance


BLOCK_REGISTERS = tuple(f"%{name}.{axis}" for name in ("ctaid", "nctaid") for axis in "xyz")


def put(lanes: Lanes, slot: int, value: np.ndarray, mask: np.ndarray | None) -> None:
    """Write a register in the lanes of the mask."""
    lanes[slot] = value if mask is None else np.where(mask, value, lanes[slot])


def assigned(slot: int, compute: Compute) -> Step:
    """A step that writes what it computes."""

    def step(lanes: Lanes, mask: np.ndarray | None) -> None:
        value = compute(lanes)
        lanes[slot] = value if mask is None else np.where(mask, value, lanes[slot])

    return step


def decode(scope: Scope, one: Instruction) -> Step:
    """Return the step of an instruction, its guard included.

    Raises: PtxError, naming the instruction, for one that the executor does not know.
    """
    decoder = TABLE.get(one.parts[0])
    if decoder is None:
        raise PtxError(f"expected an instruction that the executor knows, got {one}")
    try:
        step = decoder(scope, one)
    except (PtxError, ValueError, IndexError) as error:
        raise PtxError(f"{one}: {error}") from error
    if one.guard is None:
        return step
    guard, negated = scope.source(one.guard, 1), one.negated

    def guarded(lanes: Lanes, mask: np.ndarray | None) -> None:
        runs = ~lanes[guard] if negated else lanes[guard]
        if mask is not None:
            runs = runs & mask
        count = np.count_nonzero(runs)
        if count:
            step(lanes, None if count == len(runs) else runs)

    return guarded


def modifiers(one: Instruction, *allowed: str, types: int = 1) -> set[str]:
    """Return what stands between an opcode's name and its `types` last parts.

    Raises: PtxError for a modifier that is not allowed.
    """
    given = set(one.parts[1:-types] if types else one.parts[1:])
    if given - set(allowed):
        raise PtxError(
            f"expected none of the modifiers but {' '.join(allowed) or 'none'}, got "
            f"{' '.join(sorted(given - set(allowed)))}"
        )
    return given


def kinds(one: Instruction, count: int = 1) -> list[Kind]:
    """The types that an opcode ends with."""
    return [kind_of(name) for name in one.parts[-count:]]


def whole_warps(mask: np.ndarray | None) -> None:
    """Raise KernelFault if a warp executes with some of its lanes only, where all must take part."""
    if mask is not None:
        warps = mask.reshape(-1, WARP)
        if (warps.any(1) != warps.all(1)).any():
            raise KernelFault(
                f"expected whole warps, got one of {int(warps.sum(1)[warps.any(1) != warps.all(1)][0])} lanes"
            )
