"""What plans are written with: records in one array of integers, which name each other by their place
in it (`layout.py`)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fusedmoe.activation import DEFAULT_PARAMETER
from fusedmoe.kernels import layout
from fusedmoe.kernels.layout import FROM_BUFFER, FROM_X, TO_OUTPUT
from fusedmoe.kernels.program import NOTHING, Linear, Program, Source, Unit, X

# The number by which a plan names an activation.
CODES = {name: code for code, name in enumerate(DEFAULT_PARAMETER)}


@dataclass(frozen=True)
class Launch:
    """One launch: for each program of a row block, the place of its first tile and behind its last
    one; or of its operations, which one program does (`rowwise`)."""

    segments: tuple[int, ...]
    place: int
    programs: int
    rowwise: bool = False


class Writer:
    """Writes records into one array, each once."""

    def __init__(self, program: Program):
        self.program = program
        self.ints: list[int] = []
        self.floats: list[float] = []
        self.known: dict[object, int] = {}

    def put(self, values: Iterable[int]) -> int:
        """Append integers, and return the place of the first one."""
        place = len(self.ints)
        self.ints += values
        return place

    def operations(self, segments: Sequence[int], records: Sequence[tuple[int, int]]) -> Launch:
        """A launch of row-wise operations, by their kinds and the places of their records."""
        first = self.put(n for kind, at in records for n in layout.OPERATION.pack(kind=kind, record=at))
        return Launch(tuple(segments), self.put([first, len(self.ints)]), 1, rowwise=True)

    def launch(self, segments: Sequence[int], first: int, tiles: int, size: int, own: bool) -> Launch:
        """A launch of tiles that lie one after another: each has a program of its own (`own`), or
        all have the same one."""
        bounds = [first + size * tile for tile in range(tiles + 1)] if own else [first, first + size * tiles]
        place = self.put(end for pair in itertools.pairwise(bounds) for end in pair)
        return Launch(tuple(segments), place, len(bounds) - 1)

    def put_floats(self, values: Sequence[float]) -> int:
        place = len(self.floats)
        self.floats += values
        return place

    def place(self, segment: int, column: int) -> list[int]:
        """Where columns of x, of a segment's buffer or of the output begin."""
        if segment == X:
            return layout.PLACE.pack(kind=FROM_X, column=column, stride=0, buffer=0)
        width = self.program.segments[segment].width
        if segment + 1 == len(self.program.segments):
            return layout.PLACE.pack(kind=TO_OUTPUT, column=column, stride=width, buffer=0)
        return layout.PLACE.pack(kind=FROM_BUFFER, column=column, stride=width, buffer=self.program.offsets[segment])

    def source(self, source: Source, first: int = 0) -> list[int]:
        """A source that is multiplied by the columns of W from `first` on."""
        return layout.SOURCE.pack(place=self.place(source.segment, source.column), width=source.width, first=first)

    def linear(self, linear: Linear) -> int:
        if linear not in self.known:
            head = layout.LINEAR.pack(
                weight=linear.weight,
                bias=linear.bias,
                width=linear.width,
                reduction=linear.reduction,
                activation=CODES[linear.activation.name],
                parameter=self.put_floats([linear.activation.parameter]),
                hidden=self.linear(linear.hidden) if linear.hidden else NOTHING,
                sources=len(linear.sources),
            )
            firsts = itertools.accumulate((source.width for source in linear.sources), initial=0)
            sources = [
                number
                for source, first in zip(linear.sources, firsts, strict=False)
                for number in self.source(source, first)
            ]
            self.known[linear] = self.put(head + sources)
        return self.known[linear]

    def unit(self, segment: int, unit: Unit) -> int:
        if (segment, unit) not in self.known:
            values = layout.UNIT.pack(
                gate=self.linear(unit.gate) if unit.gate else NOTHING,
                reads=len(unit.reads),
                seen=self.put(read.seen for read in unit.reads),
                statics=unit.static,
                elements=self.put(read.element for read in unit.reads),
                fixed=self.put_floats([read.value for read in unit.reads]),
                place=self.place(segment, unit.column),
                mixing=self.put(unit.mixing) if unit.mixing else NOTHING,
            )
            self.known[segment, unit] = self.put(values)
        return self.known[segment, unit]
