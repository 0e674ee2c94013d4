"""The records of a plan: which integer of a record means what.

A plan is one array of 32-bit integers (`plan.py` writes that of a forward, `backward_plan.py` that
of a backward). A record is some integers of it, one after another, and is named by the place of its
first one. Here each kind has its fields, once: Python writes them by name, Triton's kernels take
their offsets as constants (`triton/records.py`), and the CUDA kernels from csrc/cuda/layout.h, which
this module writes: `python -m fusedmoe.kernels.layout csrc/cuda/layout.h`.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

# Kinds of a source: a slot of x, a buffer that a segment has written, the output.
FROM_X, FROM_BUFFER, TO_OUTPUT = range(3)
# What a tile of the forward does about the softmax: nothing, compute it, compute it and write the
# mixing weights.
NO_SOFTMAX, WRITE_SOFTMAX, WRITE_WEIGHTS = range(3)
# Kinds of a tile of the backward, and of a task of the parameters' gradients.
EXPERT_KIND, SOURCE_KIND = range(2)
MATRIX_KIND, STATIC_KIND = range(2)


class Record:
    """The fields of one kind of record. `UNIT.gate` is the offset of a field, `UNIT.size` how many
    integers all are.

    Args:
        name: of the kind, in lower case.
        tail: what follows the record, whose length only a call knows; empty for nothing.
        fields: a field's meaning by its name; a `Record` for one that stands inside.
    """

    def __init__(self, name: str, tail: str = "", /, **fields: str | Record):
        self.name, self.tail, self.fields, self.size = name, tail, fields, 0
        for field, meaning in fields.items():
            setattr(self, field, self.size)
            self.size += meaning.size if isinstance(meaning, Record) else 1

    def pack(self, **values: int | Sequence[int]) -> list[int]:
        """Return the record's integers.

        Raises: TypeError unless every field is given, and nothing else.
        """
        if values.keys() != self.fields.keys():
            raise TypeError(f"record {self.name}: expected {', '.join(self.fields)}, got {', '.join(values)}")
        numbers: list[int] = []
        for field, meaning in self.fields.items():
            value = values[field]
            inside = list(value) if isinstance(value, Sequence) else [value]
            if len(inside) != (meaning.size if isinstance(meaning, Record) else 1):
                raise TypeError(f"record {self.name}: expected {meaning} as {field}, got {value}")
            numbers += inside
        return numbers

    def unpack(self, ints: Sequence[int], place: int) -> SimpleNamespace:
        """Return the fields of the record that begins at a place; one that stands inside as a tuple
        of its integers."""
        found = SimpleNamespace()
        for field, meaning in self.fields.items():
            first = place + getattr(self, field)
            inside = isinstance(meaning, Record)
            setattr(found, field, tuple(ints[first : first + meaning.size]) if inside else ints[first])
        return found

    def __repr__(self) -> str:
        # With every offset: Triton compiles a kernel anew where the text of a constant that it
        # reads has changed.
        return f"{self.name}({', '.join(f'{field}={getattr(self, field)}' for field in self.fields)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Record) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


# Numbers of x's, a buffer's and the output's elements; rows of the softmax scratch, and of dw; -1
# for what is not there.
PLACE = Record(
    "place",
    kind="FROM_X, FROM_BUFFER or TO_OUTPUT",
    column="the first column, or x's slot",
    stride="elements from row to row of a buffer or of the output",
    buffer="elements a row that the buffers before this one have",
)
SOURCE = Record("source", place=PLACE, width="columns", first="the first column of W that multiplies it")
LINEAR = Record(
    "linear",
    "its sources",
    weight="number of the parameter W; -1: a copy of its source",
    bias="number of the parameter b, or -1",
    width="outputs",
    reduction="columns of W",
    activation="its code",
    parameter="of the activation: its place among the floats",
    hidden="the linear whose outputs this one reads without a buffer between them, or -1",
    sources="how many",
)
UNIT = Record(
    "unit",
    gate="the linear that gives its logits, or -1",
    reads="how many experts it mixes",
    seen="place of one integer a read: the row of the gate's W, or -1 for an expert that the gate does not see",
    statics="number of the parameter of its learned static weights, or -1",
    elements="place of one integer a read: the element of that parameter, or -1",
    fixed="place among the floats of one fixed static weight a read",
    place=PLACE,
    mixing="place of one integer a read: the column of the mixing weights; -1: nobody asks for them",
)
GROUP = Record(
    "group",
    "UNITS units, UNITS first rows of their softmax (-1 beyond the last one); runs of experts; copies, like experts",
    units="how many",
    width="of each",
    runs="runs of experts",
    copies="experts that are copies",
    selectors="place of the number of selectors, and the runs of gates behind it",
)
RUN = Record(
    "run", "those that read the source", source=SOURCE, count="experts (`expert_read`), or gates (`gate_read`)"
)
# Of a run of experts, and of a run of gates. An expert's is followed by its place among the reads
# of each of UNITS units, or -1.
EXPERT_READ = Record("expert_read", "UNITS places among the units' reads", linear="the expert")
GATE_READ = Record("gate_read", unit="whose gate it is", row="first row of its softmax, counted from the tile's")
TILE = Record(
    "tile",
    group="its group",
    column="first column of its units",
    softmax="first row of its softmax",
    task="NO_SOFTMAX, WRITE_SOFTMAX or WRITE_WEIGHTS",
    wait="whether to wait for what the tiles before wrote",
)
BACKWARD_TILE = Record(
    "backward_tile",
    kind="EXPERT_KIND or SOURCE_KIND",
    record="an expert_tile or a source_tile",
    wait="whether to wait for what the tiles before wrote",
)
EXPERT_TILE = Record(
    "expert_tile",
    "its readers",
    linear="the expert",
    column="first column of the tile",
    width="columns of the expert",
    dz="first column of its dz",
    readers="how many units read it",
)
READER = Record(
    "reader",
    place=PLACE,
    p="row of its softmax",
    dw="row of dw",
    unit="the unit",
    read="place of the expert among its reads",
)
SOURCE_TILE = Record(
    "source_tile",
    "its uses, its selections",
    place=PLACE,
    column="first column of the tile",
    width="columns of the source",
    add="whether to add to what is there",
    uses="how many linears read it",
    selections="how many gates read it",
)
USE = Record(
    "use",
    weight="number of the parameter W; -1: a copy",
    outputs="rows of W",
    reduction="columns of W",
    first="the first column of W that multiplies the source",
    dz="first column of its dz",
)
SELECTION = Record(
    "selection",
    unit="whose gate it is",
    weight="number of the gate's W",
    reduction="columns of W",
    dz="first column of its dz",
    p="first row of the softmax",
    dw="first row of dw",
    tiles="parts of dw",
    stride="rows of dw from part to part",
    store="whether this tile is to store dz",
)
MATRIX_TASK = Record(
    "matrix_task",
    kind="MATRIX_KIND",
    weight="where dW begins among the gradients",
    bias="where db begins; -1: not of this task",
    outputs="rows of W",
    reduction="columns of W",
    dz="first column of dz",
    row="first row of the tile of dW",
    column="first column of the tile, counted from the source's",
    source=SOURCE,
)
STATIC_TASK = Record(
    "static_task", "its terms", kind="STATIC_KIND", element="its place among the gradients", terms="how many"
)
TERM = Record(
    "term",
    dw="first row of dw",
    tiles="parts of dw",
    stride="rows of dw from part to part",
    mixing="column of its mixing weight, or -1",
)
RECORDS = (
    *(PLACE, SOURCE, LINEAR, UNIT, GROUP, RUN, EXPERT_READ, GATE_READ, TILE),
    *(BACKWARD_TILE, EXPERT_TILE, READER, SOURCE_TILE, USE, SELECTION, MATRIX_TASK, STATIC_TASK, TERM),
)
CONSTANTS = ("FROM_X", "FROM_BUFFER", "TO_OUTPUT", "WRITE_SOFTMAX", "WRITE_WEIGHTS", "EXPERT_KIND", "MATRIX_KIND")


def header() -> str:
    """Return csrc/cuda/layout.h: a struct of offsets for each record, and the constants."""
    constants = f"constexpr int {', '.join(f'{name.lower()} = {globals()[name]}' for name in CONSTANTS)};"
    lines = [
        "// The records of a plan, for the CUDA kernels. kernels/layout.py, which says what the fields",
        "// mean, writes this file:",
        "// python -m fusedmoe.kernels.layout csrc/cuda/layout.h",
        "#pragma once",
        "",
        "namespace fusedmoe::cuda {",
        "",
        *textwrap.wrap(constants, 100, subsequent_indent=" " * 14),
        "",
    ]
    for record in RECORDS:
        name = record.name.title().replace("_", "") + "Record"
        offsets = [f"{field} = {getattr(record, field)}" for field in record.fields]
        declared = f"static constexpr int {', '.join([*offsets, f'size = {record.size}'])};"
        lines += [
            f"struct {name} {{",
            *textwrap.wrap(declared, 100, initial_indent="  ", subsequent_indent=" " * 23),
            "};",
        ]
    return "\n".join([*lines, "", "}  // namespace fusedmoe::cuda", ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(header())
