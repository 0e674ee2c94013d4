"""A table as GPU launches see it: segments of linears and units. Plain data, no tensors and no
Triton.

A *segment* is what every program of a launch can do without waiting for another row: linears over what
stands below, and units that mix their outputs. A level is one segment. What lies below its last
linears (the hidden layers of its experts and gates) makes segments of its own in front of it, whose
units hand on one linear each; the towers are one more level. So one kernel runs everything.

An expert that gates select is computed in such a segment in front, and its level then only copies
it: its gradient is accumulated like that of any source.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

from fusedmoe.activation import IDENTITY, Activation
from fusedmoe.graph import NOTHING, product
from fusedmoe.table import Table

# Columns of a segment's buffer begin at a multiple of this many numbers: 32 bytes of bfloat16, and
# any vector load.
COLUMN = 16
# What the kernels' 32-bit offsets inside a tile reach.
MOST_COLUMNS = 65536
X = -1


def rounded_up(n: int, multiple: int) -> int:
    """The least multiple of `multiple` that is at least n."""
    return -(-n // multiple) * multiple


class Source(NamedTuple):
    """A vector of every row: input slot `column` of x (segment X), or columns `column`.. of the
    buffer of a segment."""

    segment: int
    column: int
    width: int


@dataclass(frozen=True)
class Linear:
    """act(W h + b); a copy of its one source where `weight` is NOTHING. h is the concatenation of
    the sources, or the output of `hidden`."""

    sources: tuple[Source, ...]
    width: int
    weight: int = NOTHING
    bias: int = NOTHING
    activation: Activation = IDENTITY
    hidden: Linear | None = None

    @property
    def reduction(self) -> int:
        """K, the width of h."""
        return self.hidden.width if self.hidden else sum(source.width for source in self.sources)

    @property
    def read(self) -> tuple[Source, ...]:
        """The sources that are read in the end."""
        return self.hidden.read if self.hidden else self.sources


class Read(NamedTuple):
    """One expert that a unit reads: its linear in the segment, its row of the gate, its fixed static
    weight, its element of the learned ones."""

    expert: int
    seen: int = NOTHING
    value: float = 0.0
    element: int = NOTHING


@dataclass(frozen=True)
class Unit:
    """One unit: out = sum over reads of (softmax of the gate + static weight) x expert, into
    columns `column`.. of the segment's buffer."""

    reads: tuple[Read, ...]
    width: int
    column: int
    gate: Linear | None = None
    static: int = NOTHING
    # The column of each read's mixing weight among [B, mixing]; empty: it has none.
    mixing: tuple[int, ...] = ()


@dataclass(frozen=True)
class Segment:
    """Linears over earlier segments, and the units that mix them; `width` is the stride of the
    rows of its buffer."""

    name: str
    level: int
    experts: tuple[Linear, ...]
    units: tuple[Unit, ...]
    width: int


@dataclass(frozen=True, eq=False)
class Program:
    """The segments of a table, in order; the last one writes the output. Parameters are numbered as
    `table.parameters`."""

    table: Table
    segments: tuple[Segment, ...]

    @functools.cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The segments of each level, towers last: those of one level can be one launch."""
        return tuple(
            tuple(numbers)
            for _, numbers in itertools.groupby(
                range(len(self.segments)), key=lambda number: self.segments[number].level
            )
        )

    @functools.cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where the buffer of each segment begins, in numbers a row; the last segment writes to the
        output and has none."""
        return tuple(itertools.accumulate((segment.width for segment in self.segments[:-1]), initial=0))

    @property
    def buffer_width(self) -> int:
        """Numbers a row of all buffers."""
        return self.offsets[-1]

    @functools.cached_property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear of the experts and the gates."""
        return tuple(
            linear
            for segment in self.segments
            for linear in (*segment.experts, *(unit.gate for unit in segment.units if unit.gate))
        )

    @functools.cached_property
    def hidden(self) -> bool:
        """Whether some linear has a hidden layer inside."""
        return any(linear.hidden for linear in self.linears)

    @functools.cached_property
    def copies(self) -> bool:
        """Whether some expert is a copy."""
        return any(linear.weight == NOTHING for segment in self.segments for linear in segment.experts)

    @functools.cached_property
    def strides(self) -> tuple[int, ...]:
        """Distances in memory that decide whether vector loads reach every row: those of the
        weights, and where sources begin and end."""
        linears = [*self.linears, *(linear.hidden for linear in self.linears if linear.hidden)]
        return tuple(
            {
                self.table.inputs[0].width,
                *(
                    size
                    for linear in linears
                    for size in (linear.reduction, *(source.width for source in linear.sources))
                ),
            }
        )

    @functools.cached_property
    def reads(self) -> int:
        """The most experts that a unit reads."""
        return max(len(unit.reads) for segment in self.segments for unit in segment.units)

    @functools.cached_property
    def activations(self) -> tuple[str, ...]:
        """The names of the activations that kernels may meet."""
        return tuple(
            sorted(
                {
                    linear.activation.name
                    for linear in (*self.linears, *(linear.hidden for linear in self.linears if linear.hidden))
                }
            )
        )

    @functools.cached_property
    def gradients(self) -> tuple[tuple[int, ...], int]:
        """Where the gradient of each live parameter begins among all (NOTHING for the others), and
        how many numbers all are."""
        sizes = [product(p.shape) if p.live else 0 for p in self.table.parameters]
        ends = list(itertools.accumulate(sizes, initial=0))
        return tuple(first if p.live else NOTHING for first, p in zip(ends, self.table.parameters, strict=False)), ends[
            -1
        ]
