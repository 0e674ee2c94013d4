"""Write the networks that the C++ test tries the kernels on: `python tests/cpp/tables.py FILE`.

A line is a case: its name, the seed of its random numbers, the rows of x, whether x has the same
numbers in all slots, and the encoded table, between tabs.
"""

# ruff: noqa: E402

from __future__ import annotations

import sys
import types
import zlib
from dataclasses import dataclass
from pathlib import Path

# The package's own __init__ imports torch, which this test does without.
package = sys.modules["fusedmoe"] = types.ModuleType("fusedmoe")
package.__path__ = [str(Path(__file__).parent.parent.parent.resolve() / "fusedmoe")]

from random_networks import KINDS, RandomNetwork

from fusedmoe.activation import Activation
from fusedmoe.codec import encode
from fusedmoe.families import mmoe
from fusedmoe.parts import Expert, Gate, Input, Level, Linear, Op, Source, Static, Task, Unit, from_slots, mlp
from fusedmoe.table import Table

RANDOM_TABLES = 40
ELU, GELU, LEAKY, RELU, SIGMOID, SILU, TANH = (
    KINDS[name] for name in ("elu", "gelu", "leaky_relu", "relu", "sigmoid", "silu", "tanh")
)


@dataclass(frozen=True)
class Case:
    """A network and the x that it is given."""

    name: str
    table: Table
    rows: int
    expanded: bool = False

    def line(self) -> str:
        """The case as tables.cpp reads it. The seed is the name's, so that cases may come and go."""
        numbers = zlib.crc32(self.name.encode()), self.rows, int(self.expanded)
        return "\t".join([self.name, *map(str, numbers), encode(self.table)])


def slot(index: int, first: int = 0, width: int | None = None, detached: bool = False) -> Source:
    """Columns of a slot of the level that reads."""
    return Source("slot", index, 0, first, width, detached)


def root(index: int, first: int = 0, width: int | None = None, detached: bool = False) -> Source:
    """Columns of a slot of x."""
    return Source("input", index, 0, first, width, detached)


def unit_of(level: int, index: int, first: int = 0, width: int | None = None, detached: bool = False) -> Source:
    """Columns of a unit of a level below."""
    return Source("unit", index, level, first, width, detached)


def expert(index: int, first: int = 0, width: int | None = None, detached: bool = False) -> Source:
    """Columns of an expert of the level that reads."""
    return Source("expert", index, 0, first, width, detached)


def gate(*selector: Source, sees: tuple[int, ...], hidden: tuple[Op, ...] = (), temperature: float = 1.0) -> Gate:
    """A gate with a bias that reads these sources."""
    return Gate((selector,), sees, hidden, temperature=temperature)


def linear_stack(*ops: int | Activation) -> tuple[Op, ...]:
    """Linear maps of these widths and the activations between them."""
    return tuple(Linear(op) if isinstance(op, int) else op for op in ops)


def alone(kind: Activation) -> Table:
    """One expert of one neuron without bias, whose output is the network's."""
    unit = Unit(static=Static((0,), (1.0,)))
    return Table((Input(1, 1),), (Level((Expert((slot(0),), mlp((1,), kind, False)),), (unit,)),))


def two_levels(width: int, inner: int, outer: int, kind: Activation) -> Table:
    """Two levels in the manner of PLE and AdaTT: own and shared experts, ragged in depth, own slots
    as selectors, learned static weights."""
    tasks, own = 2, 2
    count = tasks * own + 1
    shared, levels = [], []
    for number, out in enumerate((inner, outer)):
        experts = tuple(
            Expert((slot(e // own),), mlp((out + 3, out) if e % own else (out,), kind)) for e in range(count)
        )
        units = []
        for u in range(tasks if number else tasks + 1):
            sees = tuple(range(count)) if u == tasks else (own * u, own * u + 1, count - 1)
            first = own * u % (count - 1)
            units.append(Unit(gate(slot(u), sees=sees), Static((first, first + 1), tensor=len(shared))))
            shared.append((own,))
        levels.append(Level(experts, tuple(units)))
    towers = tuple(Task(from_slots(u, 1 - u), linear_stack(9, kind, 2, SIGMOID)) for u in range(tasks))
    return Table((Input(tasks + 1, width),), tuple(levels), towers, tuple(shared))


def every_feature() -> Table:
    """Selectors of all kinds, gates with hidden layers and without bias, static weights fixed,
    learned and shared, experts and units that no output needs, a gate that sees nothing, a unit
    without anything, towers that share a unit."""

    def on(index: int, widths: tuple[int, ...], kind: Activation = RELU, bias: bool = True) -> Expert:
        return Expert((slot(index),), mlp(widths, kind, bias))

    lower = Level(
        (on(0, (5, 4), TANH), on(1, (4,), RELU, False), on(0, (6, 3, 5, 4), ELU), on(1, (4,)), on(0, (4,))),
        (
            Unit(gate(slot(1), sees=(2, 0), hidden=mlp((3,), GELU))),
            Unit(Gate(((expert(3),),), (0, 1), bias=False), Static((1, 2), tensor=0, offset=1)),
            Unit(gate(root(1), sees=(1, 2)), Static((2,), (0.5,))),
            Unit(gate(slot(0), sees=())),
            Unit(),
            Unit(gate(slot(0), sees=(4,))),
        ),
    )
    upper = Level(
        (on(0, (3,)), on(1, (7, 3), SILU), on(4, (3,)), on(3, (3,)), on(2, (3,), LEAKY)),
        (
            Unit(gate(root(1), sees=(0, 1, 4)), Static((0,), tensor=0)),
            Unit(None, Static((1, 2, 3), tensor=1)),
            Unit(gate(expert(0), sees=(3, 1))),
            Unit(None, Static((0,), tensor=2)),
        ),
    )
    tasks = (
        Task(from_slots(0), mlp((4, 2), RELU)),
        Task(from_slots(1, 0), mlp((2,), SIGMOID)),
        Task(from_slots(2), mlp((3, 2), RELU, False)),
    )
    return Table((Input(2, 5),), (lower, upper), tasks, ((2, 3), (3,), (1,)))


def readers(activation: Activation) -> Table:
    """Concatenations, columns, units of levels further below, x at upper levels, experts that read
    earlier ones, copies, detached reads, temperatures, units of two widths."""
    lower = Level(
        (
            Expert((slot(0),), linear_stack(6, SILU)),
            Expert((slot(1), slot(0)), linear_stack(4, activation, 6, TANH)),
            Expert((slot(2, 2, 3),), linear_stack(6, GELU)),
            Expert((slot(1, 0, 4), expert(0), expert(1, 1, 3, detached=True)), linear_stack(6, activation)),
            Expert((slot(0, 1),)),
            Expert((slot(1),)),
            Expert((slot(2, detached=True),), linear_stack(7, TANH)),
            Expert((expert(5),), linear_stack(7, SILU)),
            Expert((expert(3), slot(0)), linear_stack(6, SILU)),  # which nothing reads
        ),
        (
            Unit(gate(slot(0, 3), expert(2), sees=(0, 2, 4, 3), temperature=0.5)),
            Unit(gate(root(2, detached=True), sees=(1, 3)), Static((3, 0), tensor=0)),
            Unit(gate(expert(5), sees=(7, 5, 6), hidden=linear_stack(5, TANH), temperature=3.0)),
            Unit(None, Static((4,), (1.0,))),
            Unit(gate(slot(0), sees=(0, 1))),  # which nothing reads
        ),
    )
    middle = Level(
        (
            Expert((slot(0), root(1)), linear_stack(5, activation)),
            Expert((slot(2, 3), root(0, 0, 5), slot(3)), linear_stack(9, SILU, 5, activation)),
            Expert((root(1),), linear_stack(5)),
            Expert((slot(1, 1),)),
            Expert((slot(2, 0, 2), expert(0, 0, 3))),
            Expert((slot(0),), linear_stack(5, TANH)),
        ),
        (
            Unit(gate(slot(3), root(0), sees=(0, 1, 2, 3, 4, 5))),
            Unit(gate(slot(1, detached=True), sees=(3, 0)), Static((4, 1), (0.5, -1.5))),
            Unit(gate(slot(3), root(0), sees=(2, 4), temperature=2.0), Static((2,), tensor=0, offset=1)),
        ),
    )
    upper = Level(
        (
            Expert((unit_of(0, 0),), linear_stack(5, TANH)),
            Expert((unit_of(0, 1), slot(0), root(2)), linear_stack(5, activation)),
            Expert((unit_of(1, 2),)),
            Expert((unit_of(0, 2, detached=True),), linear_stack(8, SILU, 5)),
        ),
        (
            Unit(gate(unit_of(0, 3), slot(1, detached=True), expert(2, 2), sees=(0, 1, 2, 3))),
            Unit(gate(unit_of(0, 0), sees=(3, 2)), Static((0,), tensor=0)),
        ),
    )
    tasks = (
        Task((slot(0), slot(1)), linear_stack(6, TANH, 2)),
        Task((unit_of(0, 2, 1, 4), root(2, 3), slot(1, detached=True)), linear_stack(2, SIGMOID)),
        Task((unit_of(0, 1),), linear_stack(3, SILU, 2)),
    )
    return Table((Input(3, 7),), (lower, middle, upper), tasks, ((3,),))


def no_gradient_first() -> Table:
    """A concatenation that is read first by an expert without a gradient, then by another and a
    gate; and once with a detached part."""
    joined, apart = (slot(0, 1), expert(0), slot(1)), (slot(0, 1), expert(0), slot(1, detached=True))
    level = Level(
        (
            Expert((slot(1),), linear_stack(3, SILU)),
            Expert(joined, linear_stack(4, TANH)),
            Expert(joined, linear_stack(4, SILU)),
            Expert((expert(1, detached=True), slot(0, 0, 2)), linear_stack(4)),
            Expert((expert(1, 1, 3, detached=True), slot(1, 0, 1))),
            Expert(apart, linear_stack(4, TANH)),
        ),
        (Unit(gate(*joined, sees=(2, 3, 5))), Unit(gate(slot(0), sees=(4, 2)))),
    )
    return Table((Input(2, 5),), (level,))


def shared_weights(width: int, wide: int) -> Table:
    """Linear maps that share weights, biases or both: in one level, between levels, with gates and
    towers, with static weights, with maps that have no gradient or that nothing reads."""
    first, other, square, bias, other_bias, unread = range(6)
    tensors = ((wide, width), (wide, width), (wide, wide), (wide,), (wide,), (wide, width))

    def shared(weight: int | None, own_bias: int | None = None, has_bias: bool = True) -> Linear:
        return Linear(wide, has_bias, weight, own_bias)

    lower = Level(
        (
            Expert((slot(0),), (shared(first, bias), TANH)),
            Expert((slot(1),), (shared(other, other_bias), SILU)),
            # Its weight is that of one map, its bias that of another.
            Expert((slot(1),), (shared(first, other_bias), SILU)),
            Expert((slot(0),), (Linear(3), TANH, shared(None, bias))),
            Expert((slot(1),), (shared(other, has_bias=False), TANH, shared(square), SILU)),
            Expert((slot(0),), (shared(first, bias), RELU)),  # read without a gradient
            Expert((expert(5, detached=True),), (shared(square, bias), TANH)),
            Expert((slot(1),), (shared(unread, bias),)),  # which nothing reads
        ),
        (
            Unit(gate(slot(0), sees=(0, 1, 2), hidden=(shared(first), TANH))),
            Unit(gate(slot(1), sees=(2, 3, 4, 6)), Static((3, 0), tensor=bias, offset=0 if wide < 3 else 1)),
        ),
    )
    upper = Level(
        (
            Expert((slot(0),), (shared(square, other_bias), TANH)),
            Expert((slot(1),), (Linear(wide, shared=square), SILU, Linear(wide, shared=square))),
            Expert((root(0),), (shared(other, bias), SILU)),
        ),
        (Unit(gate(slot(1), sees=(0, 1, 2))), Unit(gate(root(1), sees=(2, 0), hidden=(shared(first, bias), SILU)))),
    )
    tasks = tuple(Task((slot(u),), (shared(square, other_bias), TANH, Linear(2))) for u in range(2))
    return Table((Input(2, width),), (lower, upper), tasks, tensors)


def mixture(
    width: int, widths: list[int], experts: int, tasks: int, kind: Activation, hidden: tuple[int, ...] = ()
) -> Table:
    """MMoE with towers of width 5 and 1."""
    return mmoe(width, [widths], tasks, experts, hidden, kind, (5, 1))


def cases() -> list[Case]:
    """Every activation, width, row count and feature by itself, and random tables of all of them."""
    # These have no rows: the points on which an activation is measured are accuracy.cpp's.
    found = [Case(f"{name} alone", alone(kind), 0) for name, kind in KINDS.items()]
    found.append(Case("every feature", every_feature(), 70))
    found += [Case(name, mixture(11, [9, 7], 3, 2, kind, (6,)), 37) for name, kind in KINDS.items()]
    # Around the vectors, tiles and panels of the kernels: as input, hidden and output width, and as
    # columns of gates.
    for width in (1, 2, 4, 7, 8, 15, 16, 17, 31, 32, 33, 47, 64, 100):
        found.append(Case(f"width {width}", mixture(width, [width, width], 3, 2, TANH, (width,)), 21))
    found += [Case(f"{count} experts", mixture(6, [5], count, 1, RELU), 40) for count in (1, 3, 7, 16, 30)]
    # Around the blocks of rows: few rows, a block and its remainder, chunks of blocks.
    for rows in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 129, 255, 256, 257, 300):
        found.append(Case(f"{rows} rows", two_levels(13, 9, 7, SILU), rows, rows % 2 == 1))
    # Reductions of several chains, and rows of weights 4 KB apart.
    found.append(Case("long sums", mixture(300, [257, 390], 1, 1, GELU), 34))
    found.append(Case("weights at a stride of 4 KB", mixture(1024, [33, 5], 1, 1, RELU), 20))
    for rows in (1, 3, 8, 9, 17, 24, 25, 70, 257):
        found.append(Case(f"readers of {rows} rows", readers(TANH), rows, rows % 2 == 1))
    found.append(Case("readers with kinks", readers(RELU), 20))
    found += [Case(f"no gradient first, {rows} rows", no_gradient_first(), rows) for rows in (7, 40)]
    # A second size whose weights are rows of several tasks.
    for rows, width, wide in ((6, 6, 4), (19, 6, 4), (300, 6, 4), (21, 33, 100)):
        found.append(Case(f"shared weights {wide}, {rows} rows", shared_weights(width, wide), rows, rows == 19))
    for seed in range(1, RANDOM_TABLES + 1):
        network = RandomNetwork(seed)
        found.append(Case(f"random table {seed}", network.build(), 1 + seed * 37 % 80, seed % 5 < 2))
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text("".join(f"{case.line()}\n" for case in cases()))
