"""A table as GPU launches see it: segments of linears and units. Plain data, no tensors and no
Triton.

A *segment* is what every program of a launch can do without waiting for another row: linears over what
stands below, and units that mix their outputs. A level is one segment. What lies below its last
linears (the hidden layers of its experts and gates) makes segments of its own in front of it, whose
units hand on one linear each; the towers are one more level. So one kernel runs everything.

An expert that gates select is computed in such a segment in front, and its level then only copies
it: its gradient is accumulated like that of any source.

A segment of the second kind has *row-wise operations* in place of linears and units: what needs no
linear map, a vector of a row at a time. They read vectors that stand anywhere, also those that
operations before them in the segment wrote.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from fusedmoe.activation import IDENTITY, Activation
from fusedmoe.graph import NOTHING, Stage, product
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


class Part(NamedTuple):
    """Columns `first` .. `first + width` of a source; no gradient goes back where `detached`."""

    source: Source
    first: int
    width: int
    detached: bool


@dataclass(frozen=True)
class Gather:
    """The parts side by side, in columns `column`.. of the segment's buffer, as all operations write."""

    parts: tuple[Part, ...]
    width: int
    column: int


@dataclass(frozen=True)
class Rowwise:
    """dropout(act(head h)) of the source h: a stage of the graph without a linear map."""

    source: Source
    stage: Stage
    width: int
    column: int


@dataclass(frozen=True)
class Mix:
    """A unit over vectors: `unit.reads` name experts by their place in `experts`, and what they see
    by the column of the logits.

    elements: the first static weight a column of each expert among the parameter `channels`. The
    logits are `factor` times one of: the vector `logits`, the parameter `free`, or query . key, with a
    key for each of `experts` that is seen.
    """

    unit: Unit
    experts: tuple[Source, ...]
    elements: tuple[int, ...] = ()
    channels: int = NOTHING
    factor: float = 1.0
    logits: Source | None = None
    free: int = NOTHING
    query: Source | None = None
    keys: tuple[Source | None, ...] = ()

    @property
    def width(self) -> int:
        return self.unit.width

    @property
    def column(self) -> int:
        return self.unit.column


@dataclass(frozen=True)
class Product:
    """a * b, elementwise."""

    a: Source
    b: Source
    width: int
    column: int


Operation = Gather | Rowwise | Mix | Product


def with_sources(operation: Operation, change: Callable[[Source], Source]) -> Operation:
    """The operation over other sources."""

    def changed(value: Any) -> Any:
        if isinstance(value, Source):
            return change(value)
        if isinstance(value, Part):
            return value._replace(source=change(value.source))
        return tuple(changed(item) for item in value) if isinstance(value, tuple) else value

    return replace(operation, **{field.name: changed(getattr(operation, field.name)) for field in fields(operation)})


@dataclass(frozen=True)
class Segment:
    """Linears over earlier segments, and the units that mix them; or row-wise operations, in their
    order. `width` is the stride of the rows of its buffer."""

    name: str
    level: int
    experts: tuple[Linear, ...]
    units: tuple[Unit, ...]
    width: int
    operations: tuple[Operation, ...] = ()


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
    def operations(self) -> tuple[Operation, ...]:
        """Every row-wise operation."""
        return tuple(operation for segment in self.segments for operation in segment.operations)

    @functools.cached_property
    def shared(self) -> bool:
        """Whether some linears share a parameter W."""
        weights = Counter(linear.weight for linear in self.linears if linear.weight != NOTHING)
        return max(weights.values(), default=0) > 1

    @functools.cached_property
    def drops(self) -> bool:
        """Whether there is a dropout."""
        return any(isinstance(operation, Rowwise) and operation.stage.dropout for operation in self.operations)

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
                self.table.graph.inputs[0].width,
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
        return max((len(unit.reads) for segment in self.segments for unit in segment.units), default=0)

    @functools.cached_property
    def mixes(self) -> int:
        """The most vectors that a row-wise unit reads."""
        return max((len(mix.unit.reads) for mix in self.operations if isinstance(mix, Mix)), default=0)

    @functools.cached_property
    def rowwise_strides(self) -> tuple[int, ...]:
        """As `strides`, of row-wise operations: where what they read and write begins and ends."""
        numbers = {width for segment in self.segments if segment.operations for width in (segment.width,)}
        for operation in self.operations:
            numbers |= {operation.width, operation.column}
            if isinstance(operation, Gather):
                numbers |= {n for at, first, width, _ in operation.parts for n in (at.width, first, width)}
        return tuple(numbers)

    @functools.cached_property
    def rowwise_activations(self) -> tuple[str, ...]:
        """As `activations`, of row-wise operations."""
        stages = [operation.stage for operation in self.operations if isinstance(operation, Rowwise)]
        return tuple(sorted({stage.activation.name for stage in stages}))

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
        sizes = [product(p.shape) if p.live else 0 for p in self.table.graph.parameters]
        ends = list(itertools.accumulate(sizes, initial=0))
        return tuple(
            first if p.live else NOTHING for first, p in zip(ends, self.table.graph.parameters, strict=False)
        ), ends[-1]
